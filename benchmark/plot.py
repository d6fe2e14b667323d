"""Learning curves, tables and a CSV of evaluations from TensorBoard folders, sweeps or a committed CSV.

    python benchmark/plot.py runs/sweep --to-csv benchmark/results/hopper.csv --device "RTX 5090"
    python benchmark/plot.py benchmark/results/cpu.csv --figures runs/figures

It prints two tables in Markdown, of the mean of the last 10 evaluations: in the paper's form, mean and standard error
over seeds and the average over tasks in percent of SAC; and the interquartile mean with a 95% interval by bootstrap.
With --figures it draws a picture for each environment: interquartile mean over seeds and its interval at every step.

A variant is a script with its flags, and is named after the flags that not all runs of an environment have. A curve
ends where its shortest run does. SAC's returns are those of Table 2 of the paper (arXiv 2603.10250).
"""

import csv
import pathlib
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.sweep import describe_device, read_defaults, read_index  # noqa: E402 (the line above finds it)

COLUMNS = ("script", "env_id", "seed", "step", "return", "device", "commit", "flags")
TASKS = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Walker2d-v5", "Hopper-v5", "Swimmer-v5")
# Table 2 of the paper: mean of the last 10 evaluations of 1M steps and its standard error over 5 seeds.
PAPER = {
    "GeMPO-Exp": ((10989, 329), (5293, 55), (4719, 58), (4695, 197), (3350, 58), (99, 13)),
    "GeMPO-Linear": ((9812, 506), (5265, 74), (4819, 73), (4683, 96), (3062, 97), (99, 13)),
    "GeMPO-Square": ((10679, 500), (5179, 49), (4942, 75), (4622, 83), (3325, 113), (102, 20)),
    "SAC": ((10938, 68), (5131, 97), (4945, 186), (4463, 151), (2509, 276), (61, 5)),
    "TD3": ((9820, 1543), (5263, 47), (4400, 1196), (3732, 388), (3387, 302), (88, 25)),
}
SAC = {task: mean for task, (mean, _) in zip(TASKS, PAPER["SAC"], strict=True)}


@dataclass(frozen=True)
class Args:
    paths: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]  # folders of sweeps or runs, or CSV files
    to_csv: pathlib.Path | None = None  # CSV file to write all evaluations to
    figures: pathlib.Path | None = None  # folder to draw {env_id}.png in
    paper: bool = False  # whether the table also has the rows of the paper's Table 2
    tag: str = "eval/episodic_return"  # TensorBoard tag that is read as the return, such as charts/speed
    device: str = "unknown"  # device of runs that no sweep's index describes
    commit: str = "unknown"  # commit of runs that no sweep's index describes
    last: int = 10  # evaluations at the end of a run that the tables average
    confidence: float = 0.95  # of the intervals
    resamples: int = 2000  # of the bootstrap


class Evaluation(NamedTuple):
    """A row of the CSV."""

    script: str
    env_id: str
    seed: int
    step: int
    value: float
    device: str
    commit: str
    flags: str


# ===================================================== READING =====================================================
def read_events(folder: pathlib.Path, tag: str) -> tuple[list[tuple[int, float]], dict[str, str]]:
    """[(step, value)] of `tag` and {flag: value} of the hyperparameters in a TensorBoard folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    series = {event.step: event.value for event in events.Scalars(tag)} if tag in tags["scalars"] else {}
    rows = ""
    if "hyperparameters/text_summary" in tags["tensors"]:
        rows = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    return sorted(series.items()), dict(re.findall(r"^\|(\w+)\|(.*)\|$", rows, re.MULTILINE))


def flags_from(hyperparameters: dict[str, str], script: str) -> str:
    """The flags that reproduce these hyperparameters: those that are not the script's defaults, nor its name."""
    path = ROOT / f"{script}.py"
    defaults = read_defaults(path) if path.is_file() else {}
    given = {name: value for name, value in hyperparameters.items() if value != str((defaults or {}).get(name))}
    words = []
    for name, value in given.items():
        if name not in ("exp_name", "env_id", "seed", "resume", "flag"):
            flag = name.replace("_", "-")
            words += {"True": [f"--{flag}"], "False": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
    return shlex.join(words)


def read_folder(folder: pathlib.Path, args: Args) -> list[Evaluation]:
    """All evaluations below a folder: of the runs of every sweep (index.jsonl) and of all other TensorBoard folders."""
    indexed = {}  # a run's folder in a sweep: what the index says
    for index in folder.rglob("index.jsonl"):
        indexed |= {(index.parent / name).resolve(): entry for name, entry in read_index(index).items()}
    runs, rows = sorted({path.parent.resolve() for path in folder.rglob("events.out.tfevents.*")}), {}
    for run in sorted(runs, key=lambda run: run.name.rpartition("__")[2]):  # by time: a newer run replaces an older one
        series, hyperparameters = read_events(run, args.tag)
        named = re.fullmatch(r"(.+)__(.+)__(\d+)__\d+", run.name)
        entry = indexed.get(run.parents[1])  # {folder}/runs/{run}
        if not series or not (named or entry):
            continue
        if entry:
            key = (entry["script"], entry["env_id"], entry["seed"], entry["flags"])
            device = describe_device(run.parents[1] / "log.txt")  # the index's is of when the run began
            origin = (entry["device"] if device == "unknown" else device, entry["commit"])
        else:
            env_id, seed = hyperparameters.get("env_id", named[1]), int(named[3])
            key, origin = (named[2], env_id, seed, flags_from(hyperparameters, named[2])), (args.device, args.commit)
        script, env_id, seed, flags = key
        if key in rows:
            print(f"{run.name} replaces an older run of the same script, environment, seed and flags", file=sys.stderr)
        rows[key] = [Evaluation(script, env_id, seed, step, value, *origin, flags) for step, value in series]
    return [row for series in rows.values() for row in series]


def read_csv(path: pathlib.Path) -> list[Evaluation]:
    """The rows of a CSV with the columns COLUMNS; SystemExit on other content."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {','.join(COLUMNS)}")
            return [
                Evaluation(r["script"], r["env_id"], int(r["seed"]), int(r["step"]), float(r["return"]), r["device"],
                           r["commit"], r["flags"]) for r in reader
            ]  # fmt: skip
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read as a CSV of evaluations: {error}") from None


def write_csv(path: pathlib.Path, rows: list[Evaluation]) -> None:
    """Write evaluations, sorted by environment, script, flags, seed and step; returns are rounded to 0.01."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=lambda r: (r.env_id, r.script, r.flags, r.seed, r.step)):
            writer.writerow([round(value, 2) if isinstance(value, float) else value for value in row])


# ==================================================== STATISTICS ===================================================
def interquartile_mean(x, axis: int = -1):
    """Mean along `axis` without the lowest and the highest quarter, floor(n / 4) values on each side."""
    return stats.trim_mean(x, 0.25, axis=axis)


def stratified_iqm(*strata, axis: int = -1):
    """Interquartile mean of all strata taken together along `axis`."""
    return interquartile_mean(np.concatenate(strata, axis=axis), axis=axis)


def bootstrap_interval(strata: list[np.ndarray], confidence: float, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval (...), (...) of the interquartile mean of strata (..., n_i), seeds resampled within each.

    NaN with a stratum of fewer than two values. As in Agarwal et al. (2021, arXiv 2108.13264), a stratum is a task.
    """
    if min(stratum.shape[-1] for stratum in strata) < 2:
        nothing = np.full(strata[0].shape[:-1], np.nan)
        return nothing, nothing
    interval = stats.bootstrap(
        strata, stratified_iqm, n_resamples=resamples, confidence_level=confidence, method="percentile", axis=-1,
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return interval.low, interval.high


# ===================================================== VARIANTS ====================================================
Curves = dict[str, dict[str, dict[int, dict[int, float]]]]  # environment, variant, seed, step: value


def split_flags(flags: str) -> list[str]:
    """["--ell -0.1", "--save-model"] of "--ell -0.1 --save-model"."""
    return [part.strip() for part in re.split(r"(?:^|\s)(?=--)", flags) if part.strip()]


def group(rows: list[Evaluation]) -> Curves:
    """Evaluations by environment, variant, seed and step."""
    curves = {}
    for env_id in sorted({row.env_id for row in rows}, key=lambda e: (TASKS.index(e) if e in TASKS else 9, e)):
        ours = [row for row in rows if row.env_id == env_id]
        shared = set.intersection(*(set(split_flags(flags)) for flags in {row.flags for row in ours}))
        variants = defaultdict(lambda: defaultdict(dict))
        for row in ours:
            own = [flag for flag in split_flags(row.flags) if flag not in shared]
            variants[" ".join([row.script, *own])][row.seed][row.step] = row.value
        curves[env_id] = {name: dict(variants[name]) for name in sorted(variants)}
    return curves


def align(seeds: dict[int, dict[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) that every seed has, and values (T, seeds) there."""
    steps = sorted(set.intersection(*(set(series) for series in seeds.values())))
    return np.array(steps), np.array([[series[step] for series in seeds.values()] for step in steps])


def final_returns(seeds: dict[int, dict[int, float]], last: int) -> np.ndarray:
    """Mean of each seed's last evaluations (seeds,)."""
    return np.array([np.mean([series[step] for step in sorted(series)[-last:]]) for series in seeds.values()])


# ===================================================== TABLES ======================================================
def mean_and_error(x: np.ndarray) -> str:
    """Mean, standard error and number of values; the error needs two values."""
    error = f" ± {format_number(stats.sem(x), np.mean(x))}" if len(x) > 1 else ""
    return f"{format_number(np.mean(x), np.mean(x))}{error} ({len(x)})"


def format_number(value: float, scale: float) -> str:
    """Whole numbers from a scale of 100 on, one decimal below."""
    return f"{value:.0f}" if abs(scale) >= 100 else f"{value:.1f}"


def markdown(rows: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def variant_names(curves: Curves) -> list[str]:
    return sorted({name for variants in curves.values() for name in variants})


def reached(variants: dict, last: int) -> str:
    """The number of steps that the runs of an environment reached, and evaluations averaged where there are fewer."""
    ends = sorted({max(series) for seeds in variants.values() for series in seeds.values()})
    fewest = min(len(series) for seeds in variants.values() for series in seeds.values())
    steps = f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}"
    return f"{steps} steps" + (f", last {fewest}" if fewest < last else "")


def paper_table(curves: Curves, last: int, with_paper: bool = False) -> str:
    """Mean of the last evaluations ± standard error (number of seeds), and the average in percent of SAC.

    The average is over the tasks of the paper's Table 2 among `curves` and is left out where a variant lacks one.
    """
    normalized = [env_id for env_id in curves if env_id in SAC]
    head = ["", *(f"{env_id} ({reached(variants, last)})" for env_id, variants in curves.items())]
    if normalized:
        head.append(f"% of the paper's SAC ({len(normalized)} task{'s' if len(normalized) > 1 else ''})")
    rows = [head]
    for name in variant_names(curves):
        finals = {env: final_returns(v[name], last) for env, v in curves.items() if name in v}
        rows.append([name, *(mean_and_error(finals[env]) if env in finals else "" for env in curves)])
        if normalized:
            means = [100 * finals[env].mean() / SAC[env] for env in normalized if env in finals]
            rows[-1].append(f"{np.mean(means):.1f}" if len(means) == len(normalized) else "")
    if with_paper and normalized:
        for name, results in PAPER.items():
            means = {task: mean for task, (mean, _) in zip(TASKS, results, strict=True)}
            cells = {task: f"{mean} ± {error} (5)" for task, (mean, error) in zip(TASKS, results, strict=True)}
            share = np.mean([100 * means[env] / SAC[env] for env in normalized])
            rows.append([f"paper, 1M steps: {name}", *(cells.get(env, "") for env in curves), f"{share:.1f}"])
    return markdown(rows)


def interval_table(curves: Curves, args: Args) -> str:
    """Interquartile mean over seeds [interval] of the last evaluations; over tasks too, in percent of SAC."""
    normalized = [env_id for env_id in curves if env_id in SAC]

    def cell(strata):
        low, high = bootstrap_interval(strata, args.confidence, args.resamples)
        middle = stratified_iqm(*strata)
        interval = "" if np.isnan(low) else f" [{format_number(low, middle)}, {format_number(high, middle)}]"
        return f"{format_number(middle, middle)}{interval}"

    rows = [["", *curves, *(["all, % of the paper's SAC"] if len(normalized) > 1 else [])]]
    for name in variant_names(curves):
        finals = {env: final_returns(v[name], args.last) for env, v in curves.items() if name in v}
        rows.append([name, *(cell([finals[env]]) if env in finals else "" for env in curves)])
        if len(normalized) > 1:
            strata = [100 * finals[env] / SAC[env] for env in normalized if env in finals]
            rows[-1].append(cell(strata) if len(strata) == len(normalized) else "")
    return markdown(rows)


# ===================================================== FIGURES =====================================================
def draw(env_id: str, variants: dict, names: list[str], args: Args) -> Figure:
    """Interquartile mean over seeds and its interval by step, one line a variant; colours follow `names`."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, seeds in variants.items():
        steps, values = align(seeds)
        if not len(steps):
            print(f"{env_id}: {name} is not drawn, its seeds have no step in common", file=sys.stderr)
            continue
        low, high = bootstrap_interval([values], args.confidence, args.resamples)
        colour = f"C{names.index(name) % 10}"
        count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        axes.plot(steps, interquartile_mean(values), color=colour, label=f"{name} ({count}, {steps[-1]:,} steps)")
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    interval = f"{100 * args.confidence:g}% interval"
    axes.set(title=f"{env_id}: interquartile mean and {interval}", xlabel="environment steps", ylabel=args.tag)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    return figure


def main(args: Args) -> None:
    """Read, write the CSV, print the tables and draw the figures."""
    rules = [
        ("last", "a whole number, at least 1", args.last >= 1),
        ("confidence", "a number between 0 and 1", 0 < args.confidence < 1),
        ("resamples", "a whole number, at least 1", args.resamples >= 1),
    ]
    for name, allowed, is_allowed in rules:
        if not is_allowed:
            raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, name)}")
    rows = []
    for path in args.paths:
        if path.suffix != ".csv" and not path.is_dir():
            raise SystemExit(f"paths must be folders or .csv files, got {path}")
        rows += read_csv(path) if path.suffix == ".csv" else read_folder(path, args)
    if not rows:
        raise SystemExit(f"paths must hold evaluations (the tag {args.tag}), got {' '.join(map(str, args.paths))}")
    curves = group(rows)
    try:
        if args.to_csv:
            write_csv(args.to_csv, rows)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            for env_id, variants in curves.items():
                name = re.sub(r"[^\w.-]", "-", env_id)
                draw(env_id, variants, variant_names(curves), args).savefig(args.figures / f"{name}.png", dpi=100)
    except OSError as error:
        raise SystemExit(f"--to-csv and --figures must be places that can be written: {error}") from None
    print(f"Mean of the last {args.last} evaluations ± standard error (seeds):\n")
    print(paper_table(curves, args.last, args.paper))
    print(f"\nInterquartile mean of the same [{100 * args.confidence:g}% interval]:\n")
    print(interval_table(curves, args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
