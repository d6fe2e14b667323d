"""Learning curves, tables and a CSV of evaluations from runs, sweeps or a committed CSV.

    python benchmark/plot.py runs/sweep --to-csv benchmark/results/hopper.csv
    python benchmark/plot.py benchmark/results/cpu.csv --figures runs/figures

It prints two tables in Markdown, of the mean of the last 10 evaluations: in the paper's form, mean
and standard error over seeds and the average over tasks in percent of SAC; and the interquartile
mean with a 95% interval by bootstrap. With --figures it draws a picture for each environment:
interquartile mean over seeds and its interval at every step.

The last 10 are the same steps for all seeds of a variant, so they end where its shortest run does, as
its curve does. A step counts only if every run in that environment that got so far was evaluated
there: beside runs evaluated every 10,000 steps, one evaluated every 5,000 has its mean over multiples
of 10,000, too. Where no step is left, as for a tag of training episodes, each run has its own last 10,
and the table's head says so.

A variant is a script with its flags, and is named after the flags in which the runs of that script in
an environment differ, without those that change no learning (NOT_LEARNING). 1e-3 is 0.001, and a flag
with its default counts as not given, also where the script derives it from other flags (--target-kl);
the defaults are those of the script as it is here now. Of several runs of a variant with one seed the
one that got furthest counts, of equals the last that was read. What is left out, which runs of a sweep
have not finished, and which means are over other steps than a run's last, is told on stderr. SAC's
returns are those of Table 2 of the paper (arXiv 2603.10250).
"""

import ast
import csv
import math
import pathlib
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cache
from types import CodeType
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
RETURNS = ("eval/episodic_return", "charts/episodic_return")  # tags that are compared with SAC's
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
    last: int = 10  # evaluations that the tables average: the last that runs have in common
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
        # The last, since a resumed run may have been extended.
        (table,) = events.Tensors("hyperparameters")[-1].tensor_proto.string_val
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
        if is_default or name in ("script", "env_id", "seed", "resume", "extend_to"):
            continue
        if name == "exp_name" and value == script:
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

    Empty if it has none, or if neither the entry, its hyperparameters nor its name says what was
    run. Tells on stderr of what is left out, and of a sweep's run that has not finished.
    """
    series, hyperparameters = read_events(folder, args.tag)
    name = re.fullmatch(r"(?P<env_id>.+)__(?P<exp_name>.+)__(?P<seed>\d+)__\d+", folder.name)
    known = name.groupdict() if name else {}
    known |= hyperparameters  # the folder may have been renamed
    script = known.get("script", known.get("exp_name"))  # older runs tell the latter only
    if entry:
        if entry["state"] != "finished":
            state = f"{entry['state']} in the index of its sweep"
            end = f"{max(series, default=0):,}"
            print(f"{folder.name}: {state}, last evaluated at step {end}", file=sys.stderr)
        device = describe_device(folder.parent.parent / "log.txt")
        if device == "unknown":
            device = entry["device"]  # from when the run began
        what = (entry["script"], entry["env_id"], entry["seed"])
        origin = (device, entry["commit"], entry["flags"])
    elif {"exp_name", "env_id", "seed"} <= set(known):
        what = (script, known["env_id"], int(known["seed"]))
        origin = (args.device, args.commit, flags_from(hyperparameters, script))
    else:
        if series:
            reason = "neither hyperparameters nor its name say what was run"
            print(f"left out: {folder}: {reason}", file=sys.stderr)
        return []
    if not series:
        print(f"left out: {folder}: it has no {args.tag}", file=sys.stderr)
    return [Evaluation(*what, step, value, *origin) for step, value in sorted(series.items())]


def read_folder(folder: pathlib.Path, args: Args) -> list[Evaluation]:
    """All evaluations below a folder: of the runs of every sweep, and of all other runs."""
    entries = {}  # of the sweeps' indices, by the folder of the run
    for index in folder.rglob("index.jsonl"):
        for name, entry in read_index(index).items():
            entries[(index.parent / name).resolve()] = entry
    folders = {path.parent.resolve() for path in folder.rglob("events.out.tfevents.*")}
    runs = {}
    for run in sorted(folders, key=lambda run: run.name.rpartition("__")[2]):  # by time
        entry = entries.get(run.parent.parent)  # {folder}/runs/{run}
        rows = read_run(run, entry, args)
        if rows:
            add_run(runs, setting(rows[0]), rows)
    return [row for rows in runs.values() for row in rows]


def split_runs(rows: list[Evaluation]) -> list[list[Evaluation]]:
    """The rows of each run: those that differ in nothing but step and value."""
    runs = defaultdict(list)
    for row in rows:
        runs[row._replace(step=0, value=0.0)].append(row)
    return list(runs.values())


def last_step(run: list[Evaluation]) -> int:
    return max(row.step for row in run)


def add_run(runs: dict[object, list[Evaluation]], key: object, run: list[Evaluation]) -> None:
    """Set runs[key]; of two runs the one stays that got further, of equals the new one.

    Tells on stderr which one is left out.
    """
    kept = run
    if key in runs:
        left_out = runs[key]
        if last_step(left_out) > last_step(run):
            kept, left_out = left_out, run
        row = left_out[0]
        what = f"{row.script} {row.env_id} seed {row.seed}, commit {row.commit}, {row.flags}"
        ends = f"it ends at step {last_step(left_out):,}, another run of it at {last_step(kept):,}"
        print(f"left out: {what}: {ends}", file=sys.stderr)
    runs[key] = kept


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
    """Write evaluations by environment, script, flags, seed and step; to 0.01, below 1 to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row.env_id, row.script, row.flags, row.seed, row.step))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            value = round(row.value, 2) if abs(row.value) >= 1 else float(f"{row.value:.6g}")
            writer.writerow(row._replace(value=value))


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
        batch=100,  # resamples that are in memory at once
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
    """{"ell": "-0.1", "track": "False"} of "--ell -0.1 --no-track"."""
    values = {}
    for part in re.split(r"(?:^|\s)(?=--)", flags):
        flag, _, value = re.sub(r"[\s=]+", " ", part.strip(), count=1).partition(" ")
        name = flag.removeprefix("--").removeprefix("no-").replace("_", "-")
        if name:
            values[name] = value or str(not flag.startswith("--no-"))
    return values


@cache
def read_script(script: str) -> tuple[dict[str, object], CodeType | None]:
    """{field: default} of a script's Args, and the code of its two classes and learning_part.

    Empty and None if the script is not here to be read.
    """
    path = find_script(script)
    if path is None:
        return {}, None
    tree = ast.parse(path.read_text())
    wanted = ("Hyperparameters", "Args", "learning_part")
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    return read_defaults(path), compile(tree, path, "exec")


def find_defaults(script: str, env_id: str, given: dict[str, str]) -> dict[str, object]:
    """{flag: default}; in place of None what the script derives from `given` and the environment.

    Its own learning_part tells, run without the rest of the script, whose import is that of JAX.
    """
    defaults, code = read_script(script)
    values = {"env_id": env_id}
    names = {"__name__": script, "math": math, "dataclass": dataclass, "fields": fields}
    derived = {}
    try:
        for flag, text in given.items():
            name = flag.replace("-", "_")
            if isinstance(defaults.get(name), int | float):
                values[name] = ast.literal_eval(text)
        exec(code, names)
        derived = vars(names["learning_part"](names["Args"](**values)))
    except Exception:  # of any kind: there is none, or one of the user's own that needs more names
        derived = {}
    found = {}
    for name, default in defaults.items():
        found[name.replace("_", "-")] = derived.get(name) if default is None else default
    return found


def spell(text: str, default: object) -> str:
    """A flag's value as Python spells it: 0.001 for 1e-3, and 0.0 for 0 where the default is a float."""
    try:
        number = float(text)
    except ValueError:
        return text
    if number.is_integer() and not isinstance(default, float):
        return str(int(number))
    return str(number)


def read_flags(run: Evaluation) -> tuple[dict[str, str], dict[str, str]]:
    """{flag: value} that a run was given, and its script's {flag: default}."""
    given = split_flags(run.flags)
    defaults = find_defaults(run.script, run.env_id, given)
    given = {flag: spell(text, defaults.get(flag)) for flag, text in given.items()}
    return given, {flag: str(default) for flag, default in defaults.items()}


def own_flags(run: Evaluation) -> dict[str, str]:
    """{flag: value} of those that differ from the defaults."""
    given, defaults = read_flags(run)
    return {flag: value for flag, value in given.items() if value != defaults.get(flag)}


def setting(run: Evaluation) -> tuple:
    """What a run is; two with the same one are repetitions."""
    return run.script, run.env_id, run.seed, *sorted(own_flags(run).items())


def variant_flags(rows: list[Evaluation]) -> dict[str, list[str]]:
    """{flags of a run: those to name its variant by}, of runs of one script in one environment.

    That is each flag in which the runs differ and which changes what is learned; and ALWAYS_NAMED.
    """
    runs = {row.flags: row for row in rows}
    own = [own_flags(run) for run in runs.values()]
    given_flags = {flag for flags in runs for flag in split_flags(flags)}
    differing = []
    for flag in sorted(given_flags):
        values = {flags.get(flag) for flags in own}
        if flag in ALWAYS_NAMED or len(values) > 1 and flag not in NOT_LEARNING:
            differing.append(flag)
    names = {}
    for text, run in runs.items():
        given, defaults = read_flags(run)
        names[text] = []
        for flag in differing:
            value = given.get(flag) or defaults.get(flag)
            if value in ("True", "False"):
                names[text].append(f"--{flag}" if value == "True" else f"--no-{flag}")
            elif value:
                names[text].append(f"--{flag} {value}")
    return names


def task_order(env_id: str) -> tuple[int, str]:
    """The paper's tasks in its order, then others by name."""
    return TASKS.index(env_id) if env_id in TASKS else len(TASKS), env_id


def group(rows: list[Evaluation]) -> Curves:
    """Evaluations by environment, variant, seed and step; of runs with one seed, one (add_run)."""
    curves = {}
    for env_id in sorted({row.env_id for row in rows}, key=task_order):
        ours = [row for row in rows if row.env_id == env_id]
        by_script = defaultdict(list)
        for row in ours:
            by_script[row.script].append(row)
        names = {script: variant_flags(script_rows) for script, script_rows in by_script.items()}
        runs = {}
        for run in split_runs(ours):
            name = " ".join([run[0].script, *names[run[0].script][run[0].flags]])
            add_run(runs, (name, run[0].seed), run)
        variants = defaultdict(dict)
        for (name, seed), run in runs.items():
            variants[name][seed] = {row.step: row.value for row in run}
        curves[env_id] = {name: variants[name] for name in sorted(variants)}
    return curves


def align(seeds: Seeds) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) that every seed has, and values (T, seeds) there."""
    steps = sorted(set.intersection(*(set(series) for series in seeds.values())))
    values = [[series[step] for series in seeds.values()] for step in steps]
    return np.array(steps), np.array(values)


def final_steps(variants: dict[str, Seeds], name: str, last: int) -> list[int]:
    """The last steps that all seeds of a variant have, on a grid that the environment's runs share.

    A step is on it if every run, of whichever variant, has it or ended before. May be empty.
    """
    runs = [series for seeds in variants.values() for series in seeds.values()]
    ends = [max(series) for series in runs]
    first, *others = variants[name].values()
    steps = set(first).intersection(*others)
    for series, end in zip(runs, ends, strict=True):
        steps = {step for step in steps if step in series or step > end}
    return sorted(steps)[-last:]


def tell_windows(curves: Curves, last: int) -> None:
    """Tell on stderr of variants whose means are not over the last evaluations of all their runs."""
    for env_id, variants in curves.items():
        for name, seeds in variants.items():
            shared = final_steps(variants, name, last)
            own = [sorted(series)[-last:] for series in seeds.values()]
            if shared and any(steps != shared for steps in own):
                what = f"{len(shared)} shared evaluations, steps {shared[0]:,} to {shared[-1]:,}"
                print(f"{env_id} {name}: mean over {what}", file=sys.stderr)


def tell_settings(rows: list[Evaluation]) -> None:
    """Tell on stderr of scripts whose runs have other flags in one environment than in another.

    They are one row of the tables all the same: flags may be tuned for each task.
    """
    settings = defaultdict(lambda: defaultdict(set))  # script, flag: {environment and value}
    for run in split_runs(rows):
        flags = own_flags(run[0])
        for flag in flags.keys() - set(NOT_LEARNING):
            settings[run[0].script][flag].add((run[0].env_id, flags[flag]))
    for script, flags in settings.items():
        env_ids = {row.env_id for row in rows if row.script == script}
        differing = []
        for flag, found in sorted(flags.items()):
            by_task = [{value for env_id, value in found if env_id == own} for own in env_ids]
            if any(values != by_task[0] for values in by_task):
                differing.append(f"--{flag}")
        if differing:
            what = ", ".join(differing)
            print(f"{script}: the environments' runs differ in {what}", file=sys.stderr)


def final_returns(variants: dict[str, Seeds], name: str, last: int) -> np.ndarray:
    """Mean of each seed's evaluations at the final steps, or else of its own last ones (seeds,)."""
    shared = final_steps(variants, name, last)
    means = []
    for series in variants[name].values():
        steps = shared or sorted(series)[-last:]
        means.append(np.mean([series[step] for step in steps]))
    return np.array(means)


def variant_names(curves: Curves) -> list[str]:
    return sorted({name for variants in curves.values() for name in variants})


# ============================================ TABLES =============================================
def format_number(value: float, scale: float) -> str:
    """Whole numbers from a scale of 100 on, one decimal from 1 on, two digits of the scale below."""
    if abs(scale) >= 100:
        return f"{value:.0f}"
    if abs(scale) >= 1 or scale == 0:
        return f"{value:.1f}"
    decimals = 1 - math.floor(math.log10(abs(scale)))
    return f"{value:.{decimals}f}"


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
    """The steps that the runs of an environment reached, and evaluations averaged if fewer.

    Where a variant has no final steps, that these differ.
    """
    series = [series for seeds in variants.values() for series in seeds.values()]
    ends = [max(steps) for steps in series]
    text = f"{max(ends):,} steps"
    if min(ends) < max(ends):
        text = f"{min(ends):,} to {text}"
    fewest = min(len(final_steps(variants, name, last)) for name in variants)
    if fewest == 0:
        return f"{text}, evaluated at different ones"
    return f"{text}, last {fewest}" if fewest < last else text


def tasks_of_paper(curves: Curves, tag: str) -> list[str]:
    """The environments among `curves` that the paper's Table 2 has; none if `tag` is no return."""
    return [env_id for env_id in curves if env_id in SAC and tag in RETURNS]


def paper_table(
    curves: Curves, last: int, with_paper: bool = False, tag: str = "eval/episodic_return"
) -> str:
    """Mean of the last evaluations ± standard error (number of seeds), and the average of SAC's.

    The average, in percent of SAC, is over the tasks of the paper's Table 2 among `curves`, and is
    left out where a variant lacks one.
    """
    normalized = tasks_of_paper(curves, tag)
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
            returns = final_returns(variants, name, last)
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

    The last column is over several tasks of the paper, too, in percent of SAC. Where their numbers
    of seeds differ it is that of the tasks' means, so that each task counts once, and has no interval.
    """
    normalized = tasks_of_paper(curves, args.tag)
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
            returns = final_returns(variants, name, args.last)
            row.append(interval_cell([returns], args))
            if env_id in normalized:
                strata.append(100 * returns / SAC[env_id])
        if len(normalized) > 1:
            if len({len(stratum) for stratum in strata}) > 1:
                strata = [stratum.mean(keepdims=True) for stratum in strata]
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
        place = names.index(name)
        colour = f"C{place % 10}"
        line = ("-", "--", ":", "-.")[place // 10 % 4]  # there are ten colours
        plural = "s" if len(seeds) > 1 else ""
        label = f"{name} ({len(seeds)} seed{plural}, {steps[-1]:,} steps)"
        axes.plot(steps, interquartile_mean(values), line, color=colour, label=label)
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
    runs = {}
    for path in args.paths:
        found = read_csv(path) if path.suffix == ".csv" else read_folder(path, args)
        for run in split_runs(found):
            add_run(runs, setting(run[0]), run)
    rows = [row for run in runs.values() for row in run]
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
    tell_settings(rows)
    tell_windows(curves, args.last)
    print(f"Mean of the last {args.last} evaluations ± standard error (seeds):\n")
    print(paper_table(curves, args.last, args.paper, args.tag))
    print(f"\nInterquartile mean of the same [{100 * args.confidence:g}% interval]:\n")
    print(interval_table(curves, args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
