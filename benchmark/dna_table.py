"""The table of benchmark/DNA.md: metrics of DNA runs, beside the paper's Table 3.

    python benchmark/dna_table.py runs/*__dna_*                                  # folders of runs
    python benchmark/dna_table.py runs/*__dna_* --to-csv benchmark/results/dna/metrics.csv
    python benchmark/dna_table.py benchmark/results/dna/metrics.csv

Folders without metrics.json (unfinished runs) are left out and named. A number is the mean over
seeds ± its standard error; the runs of a weighting must have equal flags but for the seed. All runs
must have equal flags of data, pretraining and sampling, which earlier CSV files do not tell.

The last columns are means over the last 20 updates of the medians of their samples, from the runs'
TensorBoard logs: a single update, such as the last one, moves the model by much.
"""

import csv
import json
import math
import pathlib
import statistics
from dataclasses import dataclass

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = ("predicted_activity", "reward", "true_activity", "kmer_pearson", "motif_spearman")
COLUMNS += ("log_likelihood_bound", "unique_fraction", "hamming_distance", "gc")
LAST_UPDATES = 20
LAST_TAGS = {  # column: its scalar in the log
    f"predicted_last_{LAST_UPDATES}": "charts/predicted_activity",
    f"true_last_{LAST_UPDATES}": "charts/true_activity",
}
COLUMNS += tuple(LAST_TAGS)
# Table 3 of the paper (arXiv 2603.10250): median predicted activity. Our exp is its RL-D2.
PAPER = {
    "pretrained": 0.17,
    "cg": 3.3,
    "wd1": 3.78,
    "tds": 4.64,
    "drakes": 6.44,
    "exp": 6.52,
    "linear": 6.54,
    "square": 6.77,
    "neg(-0.05)": 6.75,
    "neg(-0.1)": 6.95,
    "neg(-0.3)": 7.45,
    "neg(-0.5)": 5.62,
}
# Flags that may differ between the runs of a weighting.
OWN = ("script", "weighting", "method", "ell", "seed", "exp_name", "cache_path", "resume")
OWN += ("checkpoint_frequency", "preset")  # a preset's values are in the other flags
# Flags that the samples before the fine-tuning depend on.
PRETRAINED = ("data_seed", "data_path", "sequence_column", "activity_column", "split_column")
PRETRAINED += ("sequence_length", "data_size", "denoiser_path", "hidden_dim", "num_layers")
PRETRAINED += ("pretrain_steps", "pretrain_batch_size", "pretrain_lr", "pretrain_warmup")
PRETRAINED += ("pretrain_decay", "oracle_dim", "oracle_steps", "sample_steps", "eval_samples")
PRETRAINED += ("num_groups", "group_size")  # samples are drawn in batches of that size


@dataclass(frozen=True)
class Args:
    paths: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders of runs, or CSV files of them
    to_csv: pathlib.Path | None = None  # write the runs' metrics to this file, too


def read_run(folder: pathlib.Path) -> list[dict]:
    """A row each for the samples before and after: {"name", "seed", "flags", metric: value}."""
    args = json.loads((folder / "args.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    name = args.get("method", args["weighting"])
    if name == "neg":
        name = f"neg({args['ell']:g})"
    if args.get("normalizer") == "simplex":
        name += f", simplex({args['target_kl']:g})"  # with its KL budget in nats
    flags = join_flags({flag: value for flag, value in args.items() if flag not in OWN})
    first_flags = join_flags({flag: args[flag] for flag in PRETRAINED if flag in args})
    before = {"name": "pretrained", "seed": args["seed"], "flags": first_flags}
    after = {"name": name, "seed": args["seed"], "flags": flags}
    return [before | metrics["pretrained"], after | metrics["finetuned"] | read_last(folder)]


def read_last(folder: pathlib.Path) -> dict[str, float]:
    """The mean of each scalar of LAST_TAGS over the last updates; none of a run without updates."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # all, not a random part
    log.Reload()
    means = {}
    for column, tag in LAST_TAGS.items():
        if tag in log.Tags()["scalars"]:
            by_update = {event.step: event.value for event in log.Scalars(tag)}
            last = sorted(by_update)[-LAST_UPDATES:]
            means[column] = statistics.mean(by_update[update] for update in last)
    return means


def join_flags(flags: dict) -> str:
    """`flag=value` of all flags, with spaces between."""
    return " ".join(f"{flag}={value}" for flag, value in flags.items())


def read_path(path: pathlib.Path) -> list[dict]:
    """The rows of a run's folder or a CSV file, with numbers as numbers."""
    if path.is_dir() and not (path / "metrics.json").exists():
        print(f"left out, unfinished: {path}")
        return []
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
    else:
        rows = read_run(path)
    for row in rows:
        if None in row.values():  # what csv gives for fields that are not there
            raise ValueError(f"the line of {row['name']} is cut off")
        row["seed"] = int(row["seed"])
        for column in COLUMNS:
            if row.get(column) == "":
                del row[column]  # a metric that this run has not, in a CSV
            elif column in row:
                row[column] = float(row[column])
    return rows


def shared_columns(row: dict, other: dict) -> list[str]:
    """The metrics that both rows have."""
    return [column for column in COLUMNS if column in row and column in other]


def require_equal_flags(row: dict, other: dict) -> None:
    """Raise ValueError, with the flags that differ, unless two rows of a name have the same ones."""
    flags = row["flags"].split()
    other_flags = other["flags"].split()
    own = [flag for flag in flags if flag not in other_flags]
    others = [flag for flag in other_flags if flag not in flags]
    if own or others:
        differences = f"{' '.join(own) or 'nothing'} instead of {' '.join(others) or 'nothing'}"
        runs = f"{row['name']}, seed {row['seed']}, has other flags than seed {other['seed']}"
        raise ValueError(f"{runs}: {differences}")


def read_rows(paths: tuple[pathlib.Path, ...]) -> list[dict]:
    """The rows of all paths, one of each name and seed; exits with one line where two disagree."""
    rows = {}
    first_rows = {}  # the first one of each name, among those with flags
    for path in paths:
        try:
            for row in read_path(path):
                if row.get("flags"):
                    require_equal_flags(row, first_rows.setdefault(row["name"], row))
                other = rows.setdefault((row["name"], row["seed"]), row)
                if any(row[column] != other[column] for column in shared_columns(row, other)):
                    run = f"{row['name']}, seed {row['seed']},"
                    raise ValueError(f"another run of {run} has other metrics")
                rows[row["name"], row["seed"]] = row | other  # one of them may have more columns
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"{path}: {' '.join(str(error).split())}") from None
    if not rows:
        what = "no finished run is among the paths"
        raise SystemExit(f"{what}: give folders with metrics.json, or a CSV file")
    return list(rows.values())


def format_cell(values: list[float | None]) -> str:
    """Mean ± standard error; empty if one of the values is missing."""
    if None in values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def make_table(rows: list[dict]) -> str:
    """A Markdown table of the rows, in the paper's order, then the others."""
    order = list(PAPER)
    names = {row["name"] for row in rows}
    known = [name for name in order if name in names]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    header = ["", "seeds", *columns, "paper's Table 3"]
    lines = [f"| {' | '.join(header)} |".replace("|  |", "| |"), "| --- " * len(header) + "|"]
    for name in known + sorted(names - set(order)):
        own_rows = [row for row in rows if row["name"] == name]
        cells = [format_cell([row.get(column) for row in own_rows]) for column in columns]
        cells = [name, str(len(own_rows)), *cells, str(PAPER.get(name, ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Print the table, and write the CSV file if asked to."""
    rows = read_rows(args.paths)
    print(make_table(rows))
    if args.to_csv:
        try:
            write_csv(args.to_csv, rows)
        except OSError as error:
            what = "must be a file that can be written"
            raise SystemExit(f"--to-csv {what}, got {args.to_csv}: {error}") from None


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
    """Write the rows to a CSV file that `read_path` reads; its folder is made."""
    columns = ["name", "seed", *COLUMNS, "flags"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        options = {"restval": "", "extrasaction": "ignore", "lineterminator": "\n"}
        writer = csv.DictWriter(file, columns, **options)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
