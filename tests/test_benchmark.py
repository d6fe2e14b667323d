"""Sweeps that lose workers, processes and themselves; curves and tables against numbers computed by hand."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from tensorboardX import SummaryWriter

from benchmark import dna_table, plot, sweep

# A script with the interface of the siblings and no JAX: it counts, and has accidents that its environment's id names.
FAKE = """
import argparse, os, pathlib, signal, sys, time
from dataclasses import dataclass

@dataclass
class Args:
    env_id: str = ""
    seed: int = 1
    steps: int = 12
    pause: float = 0.02
    save_model: bool = False
    resume: str | None = None{own}

parser = argparse.ArgumentParser()
for name in Args.__dataclass_fields__:
    parser.add_argument("--" + name.replace("_", "-"), nargs="?")
given = parser.parse_args()
if given.resume:
    run = pathlib.Path(given.resume)
    env_id, steps, pause = (run / "args").read_text().split()
    step = max(int(path.name) for path in run.glob("checkpoints/*"))
else:
    env_id, steps, pause, step = given.env_id, given.steps or 12, given.pause or 0.02, 0
    run = pathlib.Path("runs", f"{env_id}__fake__{given.seed}__{time.time_ns()}")
    (run / "checkpoints").mkdir(parents=True)
    (run / "args").write_text(f"{env_id} {steps} {pause}")
print(f"{env_id} on cpu: tensorboard --logdir {run}", flush=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
while step < int(steps):
    step += 1
    with open("trace", "a") as trace:
        trace.write(f"{os.getpid()} {step}\\n")
    time.sleep(float(pause))
    while env_id == "Waits" and step == 5 and not stopped:
        time.sleep(0.05)
    if step % 4 == 0 or stopped:
        (run / "checkpoints" / str(step)).mkdir(exist_ok=True)
    if stopped:
        sys.exit(143)
    if step == 6 and not given.resume:
        if env_id == "WorkerKilled":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(8)  # longer than it takes to start a replacement
        if env_id == "Killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if env_id == "Preempted":
            os.kill(os.getpid(), signal.SIGTERM)
    if step == 6 and env_id == "Diverges":
        sys.exit("stopped at step 6: non-finite actions")
print("counted to", step)
"""


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """Two fake scripts, of which only fake_b has --ell."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "fake_a.py").write_text(FAKE.replace("{own}", ""))
    (folder / "fake_b.py").write_text(FAKE.replace("{own}", "\n    ell: float = 0.0"))
    return [str(folder / "fake_a.py"), str(folder / "fake_b.py")]


def start_sweep(output, scripts, env_ids, *words, seeds=(1,), flags=()):
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "sweep.py"),
        "--output-path",
        str(output),
        "--scripts",
        *scripts,
    ]
    command += ["--env-ids", *env_ids, "--seeds", *map(str, seeds), "--num-cpus", "2", *words, "--", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_sweep(*args, **kwargs):
    process = start_sweep(*args, **kwargs)
    output = process.communicate()[0]
    return process.returncode, output


def traces(output):
    """{folder: [(process, step)]} of all steps that the fakes made."""
    paths = output.glob("*/trace")
    return {
        path.parent.name: [tuple(map(int, line.split())) for line in path.read_text().splitlines()] for path in paths
    }


def one(states, start):
    """The only value whose key begins with `start`."""
    (value,) = (value for key, value in states.items() if key.startswith(start))
    return value


# --------------------------------------------------- a real sweep ---------------------------------------------------
@pytest.fixture(scope="module")
def accidents(fakes, tmp_path_factory):
    """A sweep of two scripts, five environments and two seeds with a local Ray: folder, exit code, output."""
    pytest.importorskip("ray")
    output = tmp_path_factory.mktemp("sweep")
    env_ids = ("Good", "WorkerKilled", "Killed", "Preempted", "Diverges")
    return output, *run_sweep(output, fakes, env_ids, seeds=(1, 2), flags=("--ell", "-0.1", "--save-model"))


def test_a_sweep_runs_every_row_of_its_table_with_its_flags(accidents):
    output, code, text = accidents
    index = sweep.read_index(output / "index.jsonl")
    assert len(index) == 2 * 5 * 2 == len(traces(output)), text
    assert {entry["flags"] for entry in index.values() if entry["script"] == "fake_a"} == {"--save-model"}
    assert {entry["flags"] for entry in index.values() if entry["script"] == "fake_b"} == {"--ell -0.1 --save-model"}
    for folder, entry in index.items():
        log = (output / folder / "log.txt").read_text()
        assert f"--env-id {entry['env_id']} --seed {entry['seed']} {entry['flags']}" in log
        assert entry["state"] == ("failed" if entry["env_id"] == "Diverges" else "finished")
        assert entry["device"].endswith(f", {os.cpu_count()} cores") and entry["commit"] != "unknown"
        assert [(output / run).is_dir() for run in entry["runs"]] == [True]
    assert "--ell goes to fake_b alone" in text
    assert "16 finished, 0 running, 0 waiting, 4 failed" in text


@pytest.mark.parametrize("env_id", ["WorkerKilled", "Killed", "Preempted"])
def test_a_lost_run_goes_on_from_its_checkpoint_in_one_process_at_a_time(accidents, env_id):
    output, _, text = accidents
    # Checkpoints are at 4 and 8. Told to stop after step 6, a script ends its next step and writes one there.
    end, begin = {"WorkerKilled": (6, 5), "Killed": (6, 5), "Preempted": (7, 8)}[env_id]
    ours = {folder: steps for folder, steps in traces(output).items() if f"__{env_id}__" in folder}
    assert len(ours) == 4
    for steps in ours.values():
        first, second = steps[0][0], steps[-1][0]
        # Not a step more of the first process, although only its parent was killed.
        assert steps == [(first, n) for n in range(1, end + 1)] + [(second, n) for n in range(begin, 13)], text
        assert first != second


def test_a_diverged_run_fails_once_and_its_last_lines_are_shown(accidents):
    output, code, text = accidents
    assert code == 1
    for folder, steps in traces(output).items():
        if "Diverges" in folder:
            assert [step for _, step in steps] == [1, 2, 3, 4, 5, 6]
    assert text.count("    stopped at step 6: non-finite actions\n") == 4


def test_the_device_is_what_the_script_names_else_the_machine(tmp_path):
    log = tmp_path / "log.txt"
    assert sweep.describe_device(log) == "unknown"
    log.write_text(f"# {sweep.describe_machine()}\n$ python a.py\nHopper-v5 on cpu: tensorboard --logdir runs/a\n")
    assert sweep.describe_device(log) == sweep.describe_machine()
    log.write_text(log.read_text().replace("on cpu", "on NVIDIA H100 80GB HBM3"))
    assert sweep.describe_device(log) == "NVIDIA H100 80GB HBM3"


def test_a_good_run_runs_once(accidents):
    good = [steps for folder, steps in traces(accidents[0]).items() if "__Good__" in folder]
    assert len(good) == 4
    for steps in good:
        assert steps == [(steps[0][0], n) for n in range(1, 13)]


def test_the_same_sweep_again_runs_nothing_and_retries_failures_only_when_asked(accidents, fakes):
    output, _, _ = accidents
    before, flags = traces(output), ("--save-model", "--ell=-0.1")  # another order and form of the same flags
    code, text = run_sweep(output, fakes, ("Good", "Diverges"), seeds=(1, 2), flags=flags)
    assert code == 1 and "4 finished, 0 running, 0 waiting, 4 failed" in text
    assert traces(output) == before
    code, text = run_sweep(output, fakes[:1], ("Good", "Diverges"), "--retry-failed", flags=("--save-model",))
    assert code == 1, text
    after = traces(output)
    changed = [folder for folder in before if before[folder] != after[folder]]
    assert len(changed) == 1 and changed[0].startswith("fake_a__Diverges__1__")
    assert [step for _, step in one(after, "fake_a__Diverges__1__")] == [1, 2, 3, 4, 5, 6, 5, 6]  # resumed at 4


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stopped_sweep_writes_checkpoints_and_goes_on_later(fakes, tmp_path):
    pytest.importorskip("ray")
    args = (tmp_path, fakes[:1], ("Waits", "Good"), "--cpus-per-run", "2")  # one at a time
    process = start_sweep(*args)
    wait_for(lambda: [len(steps) for steps in traces(tmp_path).values()] == [5])
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 130, text
    ((folder, steps),) = traces(tmp_path).items()  # the other run did not begin
    assert [step for _, step in steps] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("*/runs/*/checkpoints/*")) == ["4", "5"]
    assert sweep.read_index(tmp_path / "index.jsonl")[folder]["state"] == "stopped"
    code, text = run_sweep(*args)
    assert code == 0, text
    assert len(traces(tmp_path)) == 2
    for steps in traces(tmp_path).values():
        assert [step for _, step in steps] == list(range(1, 13))


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind(fakes, tmp_path):
    pytest.importorskip("ray")
    process = start_sweep(tmp_path, fakes, ("Good",), flags=("--pause", "0.3", "--steps", "1000"))
    wait_for(lambda: len(traces(tmp_path)) == 2)
    process.kill()
    process.wait()
    pids = {steps[0][0] for steps in traces(tmp_path).values()}
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def processes_in(folder):
    """Processes whose working directory is `folder`."""
    links = ((path.parent.name, path) for path in pathlib.Path("/proc").glob("[0-9]*/cwd"))
    return [int(pid) for pid, path in links if os.access(path, os.R_OK) and path.resolve() == folder]


def parent(pid):
    return int(re.search(r"^PPid:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])


@pytest.mark.slow
def test_a_killed_worker_of_a_real_script_changes_nothing_but_the_time(tmp_path):
    """gempo_neg.py, its Ray worker killed after a checkpoint, logs the evaluations of an undisturbed run."""
    pytest.importorskip("ray")
    flags = ["--total-timesteps=600", "--learning-starts=60", "--hidden-dim=16", "--num-particles=2", "--batch-size=8"]
    flags += ["--diffusion-steps=2", "--buffer-size=1000", "--eval-frequency=100", "--eval-episodes=1"]
    flags += ["--checkpoint-frequency=100"]
    rows = {}
    for name in ("killed", "undisturbed"):
        output = tmp_path / name
        process = start_sweep(output, ("gempo_neg",), ("InvertedPendulum-v5",), flags=flags)
        if name == "killed":
            wait_for(lambda output=output: list(output.glob("*/runs/*/checkpoints/[1-9]00")), 120)
            (log,) = output.glob("*/log.txt")
            (worker,) = {parent(pid) for pid in processes_in(log.parent)}
            os.kill(worker, signal.SIGKILL)
        text = process.communicate()[0]
        assert process.returncode == 0, text
        rows[name] = [row._replace(flags="") for row in plot.read_folder(output, plot.Args(paths=()))]
    assert "--resume" in log.read_text()
    assert [row.step for row in rows["killed"]] == list(range(100, 601, 100))
    assert rows["killed"] == rows["undisturbed"]


# --------------------------------------------------- the sweep's table ----------------------------------------------
def test_a_flag_with_several_values_is_an_axis_for_the_scripts_that_have_it(fakes):
    args = sweep.Args(scripts=tuple(fakes), env_ids=("E",), seeds=(3,))
    runs = sweep.list_runs(args, ["--ell", "0", "-0.1", "--steps", "5", "6", "--no-save-model"])
    assert [(run.name, sweep.join(run.flags)) for run in runs] == [
        ("fake_a", "--no-save-model --steps 5"),
        ("fake_a", "--no-save-model --steps 6"),
        ("fake_b", "--ell 0 --no-save-model --steps 5"),
        ("fake_b", "--ell 0 --no-save-model --steps 6"),
        ("fake_b", "--ell -0.1 --no-save-model --steps 5"),
        ("fake_b", "--ell -0.1 --no-save-model --steps 6"),
    ]
    assert len({run.folder for run in runs}) == 6


def test_the_siblings_flags_are_read_without_importing_them():
    defaults = {name: sweep.read_defaults(ROOT / f"{name}.py") for name in ("gempo_neg", "gempo_linear")}
    assert defaults["gempo_neg"]["ell"] == -0.1 and defaults["gempo_neg"]["total_timesteps"] == 1_000_000
    assert defaults["gempo_neg"]["target_kl"] is None and "ell" not in defaults["gempo_linear"]
    runs = sweep.list_runs(sweep.Args(env_ids=("Hopper-v5",), seeds=(1,)), ["--ell", "-0.1", "-0.2"])
    assert [run.name for run in runs] == ["gempo_exp", "gempo_linear", "gempo_square", "gempo_neg", "gempo_neg"]


@pytest.mark.parametrize(
    ("flags", "words", "message"),
    [
        (dict(scripts=("gempo_nag",)), [], "--scripts must be script files or of .*gempo_neg.*, got gempo_nag"),
        (dict(scripts=()), [], "--scripts must be one or more names"),
        (dict(seeds=(1, -1)), [], "--seeds must be .*at least 0, got .*-1"),
        (dict(cpus_per_run=0.0), [], "--cpus-per-run must be a finite number above 0, got 0"),
        (dict(gpus_per_run=1.5), [], "--gpus-per-run must be from 0 to 1, or a whole number, got 1.5"),
        (dict(max_restarts=-1), [], "--max-restarts must be a whole number, at least 0, got -1"),
        (dict(num_cpus=1, cpus_per_run=2.0), [], "--num-cpus must be .*--cpus-per-run, got 1"),
        (dict(num_cpus=1, address="auto"), [], "--num-cpus and --num-gpus must not be given with --address"),
        ({}, ["--gama", "0.9"], "--gama must be a flag of one of the scripts"),
        ({}, ["0.9"], "-- must be followed by flags of the scripts .*, got 0.9"),
        ({}, ["--seed", "1"], "--seed must not be given after --"),
        ({}, ["--gamma", "0.9", "--gamma", "0.8"], "--gamma must be given once"),
    ],
)  # fmt: skip
def test_bad_input_of_a_sweep_ends_in_one_line_and_writes_nothing(tmp_path, flags, words, message):
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.Args(output_path=tmp_path / "new", **flags), words)
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code
    assert not list(tmp_path.iterdir())


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    import fcntl

    with open(tmp_path / "index.jsonl", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="--output-path must be a folder .* that no other sweep is using"):
            sweep.main(sweep.Args(output_path=tmp_path), [])


def test_a_run_gets_its_share_of_threads_and_of_the_gpus_memory(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    env = sweep.training_env(cpus=2.0, gpus=0.25)
    assert (env["PJRT_NPROC"], env["OMP_NUM_THREADS"], env["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("2", "2", "0.225")
    assert "JAX_PLATFORMS" not in env
    env = sweep.training_env(cpus=0.5, gpus=0)
    assert (env["PJRT_NPROC"], env["JAX_PLATFORMS"]) == ("1", "cpu")


def test_an_index_cut_off_by_a_crash_is_read(tmp_path):
    (tmp_path / "index.jsonl").write_text('{"folder": "a", "state": "running"}\n{"folder": "a", "sta')
    assert sweep.read_index(tmp_path / "index.jsonl") == {"a": {"folder": "a", "state": "running"}}


# ------------------------------------------------------- plots ------------------------------------------------------
def evaluations(script="gempo_neg", env_id="Hopper-v5", flags="", **seeds):
    """Rows of the series s1=[...], s2=[...], evaluated every 10 steps."""
    return [
        plot.Evaluation(script, env_id, int(seed[1:]), 10 * (i + 1), float(value), "CPU, 2 cores", "abc", flags)
        for seed, series in seeds.items()
        for i, value in enumerate(series)
    ]


def test_interquartile_mean_by_hand():
    assert plot.interquartile_mean(np.array([100.0, 1, 2, 3, -50])) == 2  # of five values the middle three
    assert plot.interquartile_mean(np.array([1.0, 2, 30, 5])) == 3.5
    np.testing.assert_array_equal(plot.interquartile_mean(np.array([[1.0, 2], [3, 5]])), [1.5, 4])
    assert plot.stratified_iqm(np.array([0.0, 0, 0, 9]), np.array([1.0, 1, 1, 1])) == 0.75  # of 0 0 [0 1 1 1] 1 9


def test_bootstrap_resamples_within_strata_only():
    """Two tasks with equal seeds each leave nothing to chance; drawn from one pot, their shares would vary."""
    low, high = plot.bootstrap_interval([np.zeros(4), np.full(4, 10.0)], 0.95, 200)
    assert low == high == 5


def test_bootstrap_interval_agrees_with_plain_resampling():
    rng = np.random.default_rng(1)
    strata = [rng.normal(size=5), 3 + rng.normal(size=7)]
    draws = [np.concatenate([rng.choice(x, len(x)) for x in strata]) for _ in range(20_000)]
    expected = np.quantile([np.sort(x)[3:9].mean() for x in draws], [0.05, 0.95])
    np.testing.assert_allclose(plot.bootstrap_interval(strata, 0.9, 20_000), expected, atol=0.03)
    both = plot.bootstrap_interval([np.stack([strata[0], strata[0] + 1])], 0.9, 20_000)
    np.testing.assert_allclose(both[0][1] - both[0][0], 1, atol=0.03)  # one interval a row


def test_one_seed_has_no_interval():
    assert np.isnan(plot.bootstrap_interval([np.ones((3, 1))], 0.95, 100)).all()


def cells(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_the_table_is_the_mean_of_the_last_ten_and_its_standard_error():
    rows = evaluations(s1=[9999, 9999, *range(100, 110)], s2=[-9999, *range(200, 210)])  # 104.5 and 204.5
    rows += evaluations("gempo_exp", s1=[200, 400])
    head, body = cells(plot.paper_table(plot.group(rows), 10))
    assert head == ["", "Hopper-v5 (20 to 120 steps, last 2)", "% of the paper's SAC (1 task)"]
    assert body["gempo_neg"] == ["154 ± 50 (2)", f"{100 * 154.5 / 2509:.1f}"]  # error: 70.71 / sqrt(2)
    assert body["gempo_exp"] == ["300 (1)", f"{100 * 300 / 2509:.1f}"]


def test_normalization_gives_the_papers_averages():
    """The last column of Table 2, from its other columns."""
    rows = []
    for name in ("GeMPO-Exp", "GeMPO-Square", "GeMPO-Linear"):
        for env_id, (mean, _) in zip(plot.TASKS, plot.PAPER[name], strict=True):
            rows += evaluations(name, env_id, s1=[mean], s2=[mean])
    head, body = cells(plot.paper_table(plot.group(rows), 10, with_paper=True))
    assert [re.match(r"\S+", cell)[0] for cell in head[1:-1]] == list(plot.TASKS)
    printed = {"GeMPO-Exp": "116.7", "GeMPO-Square": "117.0", "GeMPO-Linear": "113.2", "SAC": "100.0", "TD3": "107.4"}
    assert {name: body[name][-1] for name in list(printed)[:3]} == dict(list(printed.items())[:3])
    assert {name: body[f"paper, 1M steps: {name}"][-1] for name in printed} == printed
    assert body["paper, 1M steps: GeMPO-Square"][4] == "3325 ± 113 (5)"


def test_a_variant_without_all_tasks_has_no_average():
    rows = evaluations(s1=[1]) + evaluations(env_id="Ant-v5", s1=[1]) + evaluations("gempo_exp", s1=[1])
    _, body = cells(plot.paper_table(plot.group(rows), 10))
    assert body["gempo_exp"][0] == body["gempo_exp"][-1] == "" and body["gempo_neg"][-1] != ""


def test_variants_are_named_after_the_flags_that_differ_in_an_environment():
    rows = evaluations(flags="--ell -0.1 --hidden-dim 16", s1=[1]) + evaluations(
        flags="--ell 0 --hidden-dim 16", s1=[2]
    )
    rows += evaluations(env_id="Ant-v5", flags="--ell -0.1 --hidden-dim 32", s1=[3])
    names = {env_id: list(variants) for env_id, variants in plot.group(rows).items()}
    assert names == {"Ant-v5": ["gempo_neg"], "Hopper-v5": ["gempo_neg --ell -0.1", "gempo_neg --ell 0"]}


def test_a_curve_is_the_interquartile_mean_as_far_as_all_seeds_go():
    rows = evaluations(s1=[1, 5, 9], s2=[3, 7], s3=[100, 8, 7], s4=[-9, 6, 1])
    (axes,) = plot.draw("Hopper-v5", plot.group(rows)["Hopper-v5"], ["gempo_neg"], plot.Args(paths=())).axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[10, 2], [20, 6.5]])
    assert line.get_label() == "gempo_neg (4 seeds, 20 steps)"
    (band,) = axes.collections
    low, high = plot.bootstrap_interval([np.array([[1, 3, 100, -9.0], [5, 7, 8, 6]])], 0.95, 2000)
    assert band.get_datalim(axes.transData).y0 == low.min() and band.get_datalim(axes.transData).y1 == high.max()


def write_run(folder, values, **hyperparameters):
    with SummaryWriter(str(folder)) as writer:
        rows = "\n".join(f"|{flag}|{value}|" for flag, value in hyperparameters.items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
        for i, value in enumerate(values):
            writer.add_scalar("eval/episodic_return", value, 10 * (i + 1))
            writer.add_scalar("charts/speed", -value, 10 * (i + 1))


def test_folders_become_a_csv_and_the_csv_the_same_rows(tmp_path, capsys):
    runs = tmp_path / "runs"
    flags = dict(exp_name="gempo_neg", seed=3, env_id="Hopper-v5", gamma=0.99, ell=-0.2, save_model=True)
    write_run(runs / "Hopper-v5__gempo_neg__3__100", [7.0], **flags)  # replaced by the newer one
    write_run(runs / "Hopper-v5__gempo_neg__3__200", [1.0, 2.123456], **flags)
    write_run(tmp_path / "sweep" / "a" / "runs" / "Hopper-v5__gempo_exp__4__100", [5.0], seed=4)
    entry = dict(folder="a", script="gempo_exp", env_id="Hopper-v5", seed=4, flags="--gamma 0.9", device="GPU, 1")
    entry |= dict(commit="abc", state="running")
    (tmp_path / "sweep" / "index.jsonl").write_text(json.dumps(entry) + "\n")
    table = tmp_path / "new" / "results.csv"
    plot.main(plot.Args(paths=(tmp_path,), to_csv=table, device="CPU", commit="def", figures=tmp_path / "figures"))
    assert list(csv.reader(table.open())) == [
        ["script", "env_id", "seed", "step", "return", "device", "commit", "flags"],
        ["gempo_exp", "Hopper-v5", "4", "10", "5.0", "GPU, 1", "abc", "--gamma 0.9"],
        ["gempo_neg", "Hopper-v5", "3", "10", "1.0", "CPU", "def", "--ell -0.2 --save-model"],
        ["gempo_neg", "Hopper-v5", "3", "20", "2.12", "CPU", "def", "--ell -0.2 --save-model"],
    ]
    first = capsys.readouterr()
    assert "replaces an older run" in first.err
    assert (tmp_path / "figures" / "Hopper-v5.png").stat().st_size > 5_000
    plot.main(plot.Args(paths=(table,)))
    assert capsys.readouterr().out == first.out
    plot.main(plot.Args(paths=(runs,), tag="charts/speed", last=1))
    assert "| -2.1 (1) |" in capsys.readouterr().out


def test_committed_results_have_the_columns_and_are_plotted(capsys):
    paths = sorted((ROOT / "benchmark" / "results").glob("*.csv"))
    assert paths
    for path in paths:
        plot.main(plot.Args(paths=(path,), resamples=20))
    assert "InvertedPendulum-v5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(last=0), "--last must be a whole number, at least 1, got 0"),
        (dict(confidence=95.0), "--confidence must be a number between 0 and 1, got 95.0"),
        (dict(resamples=0), "--resamples must be a whole number, at least 1, got 0"),
        (dict(paths=("missing",)), "paths must be folders or .csv files, got .*missing"),
        (dict(paths=("other.csv",)), ".*other.csv cannot be read as a CSV of evaluations: its columns are not script,"),
        (dict(paths=("cut.csv",)), ".*cut.csv cannot be read as a CSV of evaluations"),
        (dict(paths=(".",)), "paths must hold evaluations"),
    ],
)
def test_bad_input_of_a_plot_ends_in_one_line(tmp_path, flags, message):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cut.csv").write_text(",".join(plot.COLUMNS) + "\ngempo_neg,Hopper-v5,1\n")
    paths = tuple(tmp_path / path for path in flags.pop("paths", (".",)))
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args(paths=paths, **flags))
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code


# ----------------------------------------------------- the DNA table ------------------------------------------------
def write_dna_run(folder, value, seed=1, weighting="neg", metrics=True, **more):
    folder.mkdir()
    flags = dict(script="dna_finetune", weighting=weighting, ell=-0.3, seed=seed, num_updates=100) | more
    (folder / "args.json").write_text(json.dumps(flags))
    samples = {name: dict.fromkeys(dna_table.COLUMNS, v) for name, v in (("pretrained", 0.0), ("finetuned", value))}
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(samples))
    return folder


def test_the_dna_table_has_mean_and_standard_error_and_its_csv_gives_the_same(tmp_path, capsys):
    runs = [write_dna_run(tmp_path / str(seed), value, seed) for seed, value in ((1, 1.0), (2, 2.0), (3, 6.0))]
    runs += [write_dna_run(tmp_path / "tds", 4.0, weighting="exp", method="tds", alpha=0.2)]
    runs += [write_dna_run(tmp_path / "unfinished", 0.0, metrics=False)]
    dna_table.main(dna_table.Args(tuple(runs), to_csv=tmp_path / "dna.csv"))
    note, *table = capsys.readouterr().out.splitlines()
    assert note == f"left out, unfinished: {tmp_path}/unfinished"
    assert table[2].startswith("| pretrained | 3 | 0.00 ± 0.00 |") and table[2].endswith("| 0.17 |")
    assert table[3].startswith("| tds | 1 | 4.00 | ") and table[3].endswith("| 4.64 |")
    assert table[4].startswith("| neg(-0.3) | 3 | 3.00 ± 1.53 |") and len(table) == 5  # sqrt(7 / 3)
    dna_table.main(dna_table.Args((tmp_path / "dna.csv",)))
    assert capsys.readouterr().out.splitlines() == table


def test_the_committed_dna_results_make_the_table_of_the_document(capsys):
    dna_table.main(dna_table.Args((ROOT / "benchmark/results/dna/metrics.csv",)))
    assert capsys.readouterr().out in (ROOT / "benchmark/DNA.md").read_text()


def test_what_is_no_dna_result_ends_in_one_line(tmp_path):
    good = write_dna_run(tmp_path / "a", 1.0)
    other = write_dna_run(tmp_path / "b", 1.0, num_updates=50)
    (tmp_path / "c.csv").write_text("name\nx\n")
    for paths, message in (((good, other), "other flags"), ((tmp_path / "none",), "No such"), ((), "no finished run"),
                           ((tmp_path / "c.csv",), "seed")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            dna_table.main(dna_table.Args(paths))
        assert message in stop.value.code and "\n" not in stop.value.code
