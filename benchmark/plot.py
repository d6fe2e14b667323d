"""Learning curves, tables and a CSV of evaluations from runs, sweeps or a committed CSV.

    python benchmark/plot.py runs/sweep --to-csv benchmark/results/hopper.csv
    python benchmark/plot.py benchmark/results/cpu.csv --figures runs/figures

It prints two tables in Markdown, of the mean of the last 10 evaluations: in the paper's form, mean
and standard error over seeds and the average over tasks in percent of SAC; and the interquartile
mean with a 95% interval by bootstrap. With --figures it draws a picture for each environment:
interquartile mean over seeds and its interval at every step.

A variant is a script with its flags, and is named after the flags in which the runs of that script in
an environment differ, without those that change no learning (NOT_LEARNING). A curve ends where its
shortest run does. A run that two of the paths hold counts as the later one has it. SAC's returns are
those of Table 2 of the paper (arXiv 2603.10250).
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
from benchmark.sweep import (  # noqa: E402 (the line above finds it)
    describe_device,
    find_script,
    read_defaults,
    read_index,
)

COLUMNS = ("script", "env_id", "seed", "step", "return", "device", "commit", "flags")
TASKS = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Walker2d-v5", "Hopper-v5", "Swimmer-v5")
# Table 2 of the paper, by task: mean of the last 10 evaluations of 1M steps, and its standard error
# over 5 seeds.
PAPER = {
    "GeMPO-Exp": ((10989, 329), (5293, 55), (4719, 58), (4695, 197), (3350, 58), (99, 13)),
    "GeMPO-Linear": ((9812, 506), (5265, 74), (4819, 73), (4683, 96), (3062, 97), (99, 13)),
    "GeMPO-Square": ((10679, 500), (5179, 49), (4942, 75), (4622, 83), (3325, 113), (102, 20)),
    "SAC": ((10938, 68), (5131, 97), (4945, 186), (4463, 151), (2509, 276), (61, 5)),
    "TD3": ((9820, 1543), (5263, 47), (4400, 1196), (3732, 388), (3387, 302), (88, 25)),
}
# Flags of a run that make it no other variant: what it writes, and how long it goes on.
NOT_LEARNING = ("total-timesteps", "eval-frequency", "eval-episodes", "checkpoint-frequency")
NOT_LEARNING += ("save-model", "track", "capture-video", "wandb-project-name", "wandb-entity")
ALWAYS_NAMED = ("ell",)  # where a run was given it: it makes gempo_neg.py what it is
SAC = {task: mean for task, (mean, _) in zip(TASKS, PAPER["SAC"], strict=True)}


@dataclass(frozen=True)
class Args:
    paths: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """folders of sweeps or runs, or CSV files"""
    to_csv: pathlib.Path | None = None  # CSV file to write all evaluations to
    figures: pathlib.Path | None = None  # folder to draw {env_id}.png in
    paper: bool = False  # whether the table also has the rows of the paper's Table 2
    tag: str = "eval/episodic_return"  # TensorBoard tag that is read as the return
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


# ============================================ READING ============================================
def read_events(folder: pathlib.Path, tag: str) -> tuple[dict[int, float], dict[str, str]]:
    """{step: value} of `tag` and {flag: value} of the hyperparameters in a TensorBoard folder."""
    unlimited = {"scalars": 0, "tensors": 0}
    events = EventAccumulator(str(folder), size_guidance=unlimited).Reload()
    tags = events.Tags()
    series = {}
    if tag in tags["scalars"]:
        series = {event.step: event.value for event in events.Scalars(tag)}
    hyperparameters = {}
    if "hyperparameters" in tags["tensors"]:
        (table,) = events.Tensors("hyperparameters")[0].tensor_proto.string_val
        rows = re.findall(r"^\|(\w+)\|(.*)\|$", table.decode(), re.MULTILINE)
        hyperparameters = dict(rows[1:])  # without the head
    return series, hyperparameters


def flags_from(hyperparameters: dict[str, str], script: str) -> str:
    """The flags that reproduce these hyperparameters: those that are not the script's defaults."""
    path = find_script(script)
    defaults = read_defaults(path) if path else {}
    words = []
    for name, value in hyperparameters.items():
        is_default = name in defaults and value == str(defaults[name])
        if is_default or name in ("exp_name", "env_id", "seed", "resume"):
            continue
        flag = name.replace("_", "-")
        if value == "True":
            words.append(f"--{flag}")
        elif value == "False":
            words.append(f"--no-{flag}")
        else:
            words += [f"--{flag}", value]
    return shlex.join(words)


def read_run(folder: pathlib.Path, entry: dict | None, args: Args) -> list[Evaluation]:
    """The evaluations of a TensorBoard folder, which `entry` of a sweep's index may describe.

    Empty if it has none, or if neither the entry nor its name says what was run.
    """
    series, hyperparameters = read_events(folder, args.tag)
    name = re.fullmatch(r"(.+)__(.+)__(\d+)__\d+", folder.name)
    if entry:
        device = describe_device(folder.parent.parent / "log.txt")
        if device == "unknown":
            device = entry["device"]  # from when the run began
        what = (entry["script"], entry["env_id"], entry["seed"])
        origin = (device, entry["commit"], entry["flags"])
    elif name:
        env_id, script, seed = name.groups()
        what = (script, hyperparameters.get("env_id", env_id), int(seed))
        origin = (args.device, args.commit, flags_from(hyperparameters, script))
    else:
        return []
    return [Evaluation(*what, step, value, *origin) for step, value in sorted(series.items())]


def read_folder(folder: pathlib.Path, args: Args) -> list[Evaluation]:
    """All evaluations below a folder: of the runs of every sweep, and of all other runs."""
    entries = {}  # of the sweeps' indices, by the folder of the run
    for index in folder.rglob("index.jsonl"):
        for name, entry in read_index(index).items():
            entries[(index.parent / name).resolve()] = entry
    runs = {path.parent.resolve() for path in folder.rglob("events.out.tfevents.*")}
    rows = []
    for run in sorted(runs, key=lambda run: run.name.rpartition("__")[2]):  # by time
        entry = entries.get(run.parent.parent)  # {folder}/runs/{run}
        rows = replace_runs(rows, read_run(run, entry, args), run.name)
    return rows


def replace_runs(old: list[Evaluation], new: list[Evaluation], origin) -> list[Evaluation]:
    """`old` and `new`, read from `origin`; runs that both have, as `new` has them."""

    def run_of(row):
        return row.script, row.env_id, row.seed, row.flags

    new_runs = {run_of(row) for row in new}
    kept = [row for row in old if run_of(row) not in new_runs]
    if len(kept) < len(old):
        what = "an earlier run of the same script, environment, seed and flags"
        print(f"{origin} replaces {what}", file=sys.stderr)
    return kept + new


def read_csv(path: pathlib.Path) -> list[Evaluation]:
    """The rows of a CSV with the columns COLUMNS; SystemExit on other content."""
    rows = []
    try:
        with open(path, newline="") as file:
            head, *body = csv.reader(file)
        if tuple(head) != COLUMNS:
            raise ValueError(f"its columns are not {','.join(COLUMNS)}")
        for script, env_id, seed, step, value, *origin in body:
            rows.append(Evaluation(script, env_id, int(seed), int(step), float(value), *origin))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read as a CSV of evaluations: {error}") from None
    return rows


def write_csv(path: pathlib.Path, rows: list[Evaluation]) -> None:
    """Write evaluations by environment, script, flags, seed and step; returns to 0.01."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row.env_id, row.script, row.flags, row.seed, row.step))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(row._replace(value=round(row.value, 2)))


# ========================================== STATISTICS ===========================================
def interquartile_mean(x, axis: int = -1):
    """Mean along `axis` without its lowest and highest quarter, floor(n / 4) values on a side."""
    return stats.trim_mean(x, 0.25, axis=axis)


def stratified_iqm(*strata, axis: int = -1):
    """Interquartile mean of all strata taken together along `axis`."""
    return interquartile_mean(np.concatenate(strata, axis=axis), axis=axis)


def bootstrap_interval(strata: list[np.ndarray], confidence: float, resamples: int):
    """Percentile interval, low (...) and high (...), of the interquartile mean of strata.

    A stratum (..., n_i) is a task; seeds are resampled within each, as in Agarwal et al. (2021,
    arXiv 2108.13264). NaN where a stratum has fewer than two values.
    """
    if min(stratum.shape[-1] for stratum in strata) < 2:
        nothing = np.full(strata[0].shape[:-1], np.nan)
        return nothing, nothing
    result = stats.bootstrap(
        strata,
        stratified_iqm,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        axis=-1,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return result.confidence_interval.low, result.confidence_interval.high


# =========================================== VARIANTS ============================================
Seeds = dict[int, dict[int, float]]  # seed, step: value
Curves = dict[str, dict[str, Seeds]]  # environment, variant


def split_flags(flags: str) -> dict[str, str]:
    """{"ell": "--ell -0.1", "track": "--no-track"} of "--ell -0.1 --no-track"."""
    parts = re.split(r"(?:^|\s)(?=--)", flags)
    texts = [part.strip() for part in parts if part.strip()]
    return {text.split()[0].removeprefix("--").removeprefix("no-"): text for text in texts}


def default_flag(script: str, flag: str) -> str:
    """`flag` as a run has it that was not given it; "" if the script is not here to be read."""
    path = find_script(script)
    defaults = read_defaults(path) if path else {}
    name = flag.replace("-", "_")
    if name not in defaults:
        return ""
    if isinstance(defaults[name], bool):
        return f"--{flag}" if defaults[name] else f"--no-{flag}"
    return f"--{flag} {defaults[name]}"


def variant_flags(rows: list[Evaluation]) -> dict[str, list[str]]:
    """{flags of a run: those to name its variant by}, of runs of one script in one environment.

    That is each flag in which the runs differ and which changes what is learned; and ALWAYS_NAMED.
    """
    flag_sets = {row.flags: split_flags(row.flags) for row in rows}
    differing = []
    for flag in sorted({flag for flags in flag_sets.values() for flag in flags}):
        values = {flags.get(flag) for flags in flag_sets.values()}
        if flag in ALWAYS_NAMED or len(values) > 1 and flag not in NOT_LEARNING:
            differing.append(flag)
    names = {}
    for text, flags in flag_sets.items():
        values = [flags.get(flag) or default_flag(rows[0].script, flag) for flag in differing]
        names[text] = [value for value in values if value]
    return names


def task_order(env_id: str) -> tuple[int, str]:
    """The paper's tasks in its order, then others by name."""
    return TASKS.index(env_id) if env_id in TASKS else len(TASKS), env_id


def group(rows: list[Evaluation]) -> Curves:
    """Evaluations by environment, variant, seed and step."""
    curves = {}
    for env_id in sorted({row.env_id for row in rows}, key=task_order):
        ours = [row for row in rows if row.env_id == env_id]
        by_script = defaultdict(list)
        for row in ours:
            by_script[row.script].append(row)
        names = {script: variant_flags(script_rows) for script, script_rows in by_script.items()}
        variants = defaultdict(lambda: defaultdict(dict))
        for row in ours:
            name = " ".join([row.script, *names[row.script][row.flags]])
            variants[name][row.seed][row.step] = row.value
        curves[env_id] = {name: dict(variants[name]) for name in sorted(variants)}
    return curves


def align(seeds: Seeds) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) that every seed has, and values (T, seeds) there."""
    steps = sorted(set.intersection(*(set(series) for series in seeds.values())))
    values = [[series[step] for series in seeds.values()] for step in steps]
    return np.array(steps), np.array(values)


def final_returns(seeds: Seeds, last: int) -> np.ndarray:
    """Mean of each seed's last evaluations (seeds,)."""
    means = []
    for series in seeds.values():
        steps = sorted(series)[-last:]
        means.append(np.mean([series[step] for step in steps]))
    return np.array(means)


def variant_names(curves: Curves) -> list[str]:
    return sorted({name for variants in curves.values() for name in variants})


# ============================================ TABLES =============================================
def format_number(value: float, scale: float) -> str:
    """Whole numbers from a scale of 100 on, one decimal below."""
    return f"{value:.0f}" if abs(scale) >= 100 else f"{value:.1f}"


def mean_and_error(x: np.ndarray) -> str:
    """Mean, standard error and number of values; the error needs two values."""
    mean = np.mean(x)
    text = format_number(mean, mean)
    if len(x) > 1:
        text += f" ± {format_number(stats.sem(x), mean)}"
    return f"{text} ({len(x)})"


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def reached(variants: dict[str, Seeds], last: int) -> str:
    """The steps that the runs of an environment reached, and evaluations averaged if fewer."""
    series = [series for seeds in variants.values() for series in seeds.values()]
    ends = [max(steps) for steps in series]
    text = f"{max(ends):,} steps"
    if min(ends) < max(ends):
        text = f"{min(ends):,} to {text}"
    fewest = min(len(steps) for steps in series)
    return f"{text}, last {fewest}" if fewest < last else text


def paper_table(curves: Curves, last: int, with_paper: bool = False) -> str:
    """Mean of the last evaluations ± standard error (number of seeds), and the average of SAC's.

    The average, in percent of SAC, is over the tasks of the paper's Table 2 among `curves`, and is
    left out where a variant lacks one.
    """
    normalized = [env_id for env_id in curves if env_id in SAC]
    head = [""]
    for env_id, variants in curves.items():
        head.append(f"{env_id} ({reached(variants, last)})")
    if normalized:
        plural = "s" if len(normalized) > 1 else ""
        head.append(f"% of the paper's SAC ({len(normalized)} task{plural})")
    rows = [head]
    for name in variant_names(curves):
        row = [name]
        shares = []
        for env_id, variants in curves.items():
            if name not in variants:
                row.append("")
                continue
            returns = final_returns(variants[name], last)
            row.append(mean_and_error(returns))
            if env_id in normalized:
                shares.append(100 * returns.mean() / SAC[env_id])
        if normalized:
            is_complete = len(shares) == len(normalized)
            row.append(f"{np.mean(shares):.1f}" if is_complete else "")
        rows.append(row)
    if with_paper and normalized:
        rows += paper_rows(list(curves), normalized)
    return markdown(rows)


def paper_rows(env_ids: list[str], normalized: list[str]) -> list[list[str]]:
    """The rows of the paper's Table 2, in the form of `paper_table`."""
    rows = []
    for name, results in PAPER.items():
        by_task = dict(zip(TASKS, results, strict=True))
        row = [f"paper, 1M steps: {name}"]
        for env_id in env_ids:
            row.append("{} ± {} (5)".format(*by_task[env_id]) if env_id in by_task else "")
        shares = [100 * by_task[env_id][0] / SAC[env_id] for env_id in normalized]
        row.append(f"{np.mean(shares):.1f}")
        rows.append(row)
    return rows


def interval_cell(strata: list[np.ndarray], args: Args) -> str:
    """Interquartile mean [interval], without the interval where there is none."""
    low, high = bootstrap_interval(strata, args.confidence, args.resamples)
    middle = stratified_iqm(*strata)
    text = format_number(middle, middle)
    if np.isnan(low):
        return text
    return f"{text} [{format_number(low, middle)}, {format_number(high, middle)}]"


def interval_table(curves: Curves, args: Args) -> str:
    """Interquartile mean over seeds [interval] of the last evaluations.

    The last column is over several tasks of the paper, too, in percent of SAC.
    """
    normalized = [env_id for env_id in curves if env_id in SAC]
    head = ["", *curves]
    if len(normalized) > 1:
        head.append("all, % of the paper's SAC")
    rows = [head]
    for name in variant_names(curves):
        row = [name]
        strata = []
        for env_id, variants in curves.items():
            if name not in variants:
                row.append("")
                continue
            returns = final_returns(variants[name], args.last)
            row.append(interval_cell([returns], args))
            if env_id in normalized:
                strata.append(100 * returns / SAC[env_id])
        if len(normalized) > 1:
            is_complete = len(strata) == len(normalized)
            row.append(interval_cell(strata, args) if is_complete else "")
        rows.append(row)
    return markdown(rows)


# ============================================ FIGURES ============================================
def draw(env_id: str, variants: dict[str, Seeds], names: list[str], args: Args) -> Figure:
    """Interquartile mean over seeds and its interval by step, a line for each variant.

    Its colour is that of its place in `names`, so that it has the same one in every figure.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, seeds in variants.items():
        steps, values = align(seeds)
        if not len(steps):
            reason = "its seeds have no step in common"
            print(f"{env_id}: {name} is not drawn, {reason}", file=sys.stderr)
            continue
        low, high = bootstrap_interval([values], args.confidence, args.resamples)
        colour = f"C{names.index(name) % 10}"
        plural = "s" if len(seeds) > 1 else ""
        label = f"{name} ({len(seeds)} seed{plural}, {steps[-1]:,} steps)"
        axes.plot(steps, interquartile_mean(values), color=colour, label=label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    what = f"interquartile mean and {100 * args.confidence:g}% interval"
    if all(len(seeds) == 1 for seeds in variants.values()):
        what = "one seed each"
    axes.set_title(f"{env_id}: {what}")
    axes.set_xlabel("environment steps")
    axes.set_ylabel(args.tag)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    return figure


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for name in ("last", "resamples"):
        value = getattr(args, name)
        if value < 1:
            raise SystemExit(f"--{name} must be a whole number, at least 1, got {value}")
    if not 0 < args.confidence < 1:
        raise SystemExit(f"--confidence must be a number between 0 and 1, got {args.confidence}")
    for path in args.paths:
        if path.suffix != ".csv" and not path.is_dir():
            raise SystemExit(f"paths must be folders or .csv files, got {path}")


def main(args: Args) -> None:
    """Read, write the CSV, print the tables and draw the figures."""
    check_args(args)
    rows = []
    for path in args.paths:
        new = read_csv(path) if path.suffix == ".csv" else read_folder(path, args)
        rows = replace_runs(rows, new, path)
    if not rows:
        given = " ".join(str(path) for path in args.paths)
        raise SystemExit(f"paths must hold evaluations (the tag {args.tag}), got {given}")
    curves = group(rows)
    try:
        if args.to_csv:
            write_csv(args.to_csv, rows)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            for env_id, variants in curves.items():
                file = re.sub(r"[^\w.-]", "-", env_id) + ".png"
                figure = draw(env_id, variants, variant_names(curves), args)
                figure.savefig(args.figures / file, dpi=100)
    except OSError as error:
        what = "--to-csv and --figures must be places that can be written"
        raise SystemExit(f"{what}: {error}") from None
    print(f"Mean of the last {args.last} evaluations ± standard error (seeds):\n")
    print(paper_table(curves, args.last, args.paper))
    print(f"\nInterquartile mean of the same [{100 * args.confidence:g}% interval]:\n")
    print(interval_table(curves, args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
