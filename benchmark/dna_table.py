"""The table of benchmark/DNA.md: metrics of runs of dna_finetune.py and baselines/dna_guidance.py, beside the paper's.

    python benchmark/dna_table.py runs/*__dna_*                                  # from the folders of runs
    python benchmark/dna_table.py runs/*__dna_* --to-csv benchmark/results/dna/metrics.csv
    python benchmark/dna_table.py benchmark/results/dna/metrics.csv

Folders without metrics.json (unfinished runs) are left out and named. A number is the mean over seeds ± its standard
error; the runs of a weighting must have equal flags but for the seed.
"""

import csv
import json
import math
import pathlib
import statistics
from dataclasses import dataclass

import tyro

COLUMNS = ("pred_activity", "train_oracle_activity", "true_activity", "kmer_pearson", "motif_correlation",
           "log_likelihood", "unique_fraction", "hamming_distance", "gc")  # fmt: skip
# Table 3 of the paper (arXiv 2603.10250): median predicted activity. Ours of exp is its RL-D2.
PAPER = {"pretrained": 0.17, "cg": 3.3, "wd1": 3.78, "tds": 4.64, "drakes": 6.44, "exp": 6.52, "linear": 6.54,
         "square": 6.77, "neg(-0.05)": 6.75, "neg(-0.1)": 6.95, "neg(-0.3)": 7.45, "neg(-0.5)": 5.62}  # fmt: skip
OWN = ("script", "weighting", "method", "ell", "seed", "exp_name", "cache_path", "resume", "checkpoint_frequency")


@dataclass(frozen=True)
class Args:
    paths: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders of runs, or CSV files made of them
    to_csv: pathlib.Path | None = None  # write the runs' metrics to this file, too


def read_run(folder: pathlib.Path) -> list[dict]:
    """The rows of a run: the samples before and after, each {"name", "seed", "flags", metric: value}."""
    args = json.loads((folder / "args.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    name = args.get("method", args["weighting"])
    name += f"({args['ell']:g})" if name == "neg" else ""
    flags = " ".join(f"{flag}={value}" for flag, value in args.items() if flag not in OWN)
    rows = (("pretrained", "", metrics["pretrained"]), (name, flags, metrics["finetuned"]))
    return [{"name": name, "seed": args["seed"], "flags": flags} | values for name, flags, values in rows]


def read_rows(paths: tuple[pathlib.Path, ...]) -> list[dict]:
    """The rows of all runs and CSV files, one of each name and seed; exits with one line where two disagree."""
    rows = {}
    for path in paths:
        try:
            if path.is_dir() and not (path / "metrics.json").exists():
                print(f"left out, unfinished: {path}")
                continue
            found = csv.DictReader(path.read_text().splitlines()) if path.suffix == ".csv" else read_run(path)
            for row in found:
                row |= {column: float(row[column]) for column in COLUMNS if row.get(column, "") != ""}
                row["seed"] = int(row["seed"])
                other = rows.setdefault((row["name"], row["seed"]), row)
                if other != row:
                    raise ValueError(f"another run of {row['name']}, seed {row['seed']}, has other flags or metrics")
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"{path}: {' '.join(str(error).split())}") from None
    if not rows:
        raise SystemExit("no finished run is among the paths: give folders with metrics.json, or a CSV file")
    return list(rows.values())


def make_table(rows: list[dict]) -> str:
    """A Markdown table of the rows, in the paper's order, then the others'."""
    names = sorted(
        {row["name"] for row in rows}, key=lambda name: (list(PAPER).index(name) if name in PAPER else 99, name)
    )
    columns = [column for column in COLUMNS if all(column in row for row in rows)]
    lines = ["| | seeds | " + " | ".join(columns) + " | paper's Table 3 |", "| --- " * (len(columns) + 3) + "|"]
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        cells = []
        for column in columns:
            values = [row[column] for row in mine]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.2f}" + (f" ± {error:.2f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + f" | {PAPER.get(name, '')} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    rows = read_rows(args.paths)
    print(make_table(rows))
    if args.to_csv:
        with open(args.to_csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["name", "seed", *COLUMNS, "flags"], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
