"""Sweeps that lose workers, processes, their node and themselves; tables against numbers by hand.

Also: an agent that is watched plays as in its evaluation, and FLOPs are those of the compiled code.
"""

import contextlib
import csv
import fcntl
import gzip
import inspect
import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.extend.core import jaxprs_in_params
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import gempo_linear
from benchmark import dna_table, plot, sweep, throughput, watch

# A script with the interface of the siblings and without JAX: it counts, and has accidents that its
# environment's id names.
FAKE = """
import argparse, os, pathlib, signal, sys, time
from dataclasses import dataclass

@dataclass
class Hyperparameters:
    pause: float = 0.02{own}

@dataclass
class Args(Hyperparameters):
    env_id: str = ""
    seed: int = 1
    steps: int = 12
    save_model: bool = False
    resume: str | None = None

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
    while env_id == "Waits" and step == 5 and not given.resume and not stopped:
        time.sleep(0.05)
    if step % 4 == 0 or stopped:
        (run / "checkpoints" / str(step)).write_text("")
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


def start_sweep(output, scripts, env_ids, *words, flags=()):
    command = [sys.executable, str(ROOT / "benchmark" / "sweep.py")]
    command += ["--output-path", str(output), "--scripts", *scripts, "--env-ids", *env_ids]
    command += ["--seeds", "1", "--num-cpus", "2", *words, "--", *flags]
    env = os.environ | {"RAY_worker_niceness": "0"}  # Ray's 15 would starve beside other work
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, env=env, text=True, **pipes)


def run_sweep(*args, **kwargs):
    process = start_sweep(*args, **kwargs)
    output = process.communicate()[0]
    return process.returncode, output


def traces(output):
    """{folder: [(process, step)]} of all steps that the fakes made."""
    found = {}
    for path in output.glob("*/trace"):
        lines = path.read_text().splitlines()
        found[path.parent.name] = [tuple(map(int, line.split())) for line in lines]
    return found


def steps_of(trace):
    return [step for _, step in trace]


def one(states, start):
    """The only value whose key begins with `start`."""
    (value,) = (value for key, value in states.items() if key.startswith(start))
    return value


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ------------------------------------------ a real sweep ------------------------------------------
@pytest.fixture(scope="module")
def accidents(fakes, tmp_path_factory):
    """Two scripts and five environments with a local Ray: folder, exit code, output."""
    pytest.importorskip("ray")
    output = tmp_path_factory.mktemp("sweep")
    env_ids = ("Good", "WorkerKilled", "Killed", "Preempted", "Diverges")
    flags = ("--ell", "-0.1", "--save-model")
    code, text = run_sweep(output, fakes, env_ids, flags=flags)
    return output, code, text


def test_a_sweep_runs_every_row_of_its_table_with_its_flags(accidents):
    output, code, text = accidents
    index = sweep.read_index(output / "index.jsonl")
    assert len(index) == 2 * 5 == len(traces(output)), text
    for folder, entry in index.items():
        own = "--ell -0.1 " if entry["script"] == "fake_b" else ""
        assert entry["flags"] == f"{own}--save-model"
        log = (output / folder / "log.txt").read_text()
        assert f"--env-id {entry['env_id']} --seed {entry['seed']} {entry['flags']}" in log
        assert entry["state"] == ("failed" if entry["env_id"] == "Diverges" else "finished")
        assert entry["device"].endswith(f", {os.cpu_count()} cores")
        assert entry["commit"] != "unknown"
        assert [(output / run).is_dir() for run in entry["runs"]] == [True]
    assert "--ell goes to fake_b alone" in text
    assert "8 finished, 0 running, 0 waiting, 2 failed" in text


@pytest.mark.parametrize("env_id", ["WorkerKilled", "Killed", "Preempted"])
def test_a_lost_run_goes_on_from_its_checkpoint_in_one_process_at_a_time(accidents, env_id):
    output, _, text = accidents
    # Checkpoints are at 4 and 8. Told to stop after step 6, a script ends its next step and writes
    # one there.
    end, begin = {"WorkerKilled": (6, 5), "Killed": (6, 5), "Preempted": (7, 8)}[env_id]
    ours = [trace for folder, trace in traces(output).items() if f"__{env_id}__" in folder]
    assert len(ours) == 2
    for trace in ours:
        first, second = trace[0][0], trace[-1][0]
        assert first != second
        # Not a step more of the first process, although only its parent was killed.
        expected = [(first, step) for step in range(1, end + 1)]
        expected += [(second, step) for step in range(begin, 13)]
        assert trace == expected, text


def test_a_diverged_run_fails_once_and_its_last_lines_are_shown(accidents):
    output, code, text = accidents
    assert code == 1
    for folder, trace in traces(output).items():
        if "Diverges" in folder:
            assert steps_of(trace) == [1, 2, 3, 4, 5, 6]
    assert text.count("    stopped at step 6: non-finite actions\n") == 2


def test_a_good_run_runs_once(accidents):
    good = [trace for folder, trace in traces(accidents[0]).items() if "__Good__" in folder]
    assert len(good) == 2
    for trace in good:
        process = trace[0][0]
        assert trace == [(process, step) for step in range(1, 13)]


def test_the_same_sweep_again_runs_nothing_and_retries_failures_only_when_asked(accidents, fakes):
    output, _, _ = accidents
    before = traces(output)
    flags = ("--save-model", "--ell=-0.1")  # another order and form of the same flags
    code, text = run_sweep(output, fakes, ("Good", "Diverges"), flags=flags)
    assert code == 1 and "2 finished, 0 running, 0 waiting, 2 failed" in text
    assert traces(output) == before
    again = (output, fakes[:1], ("Good", "Diverges"), "--retry-failed")
    code, text = run_sweep(*again, flags=("--save-model",))
    assert code == 1, text
    after = traces(output)
    changed = [folder for folder in before if before[folder] != after[folder]]
    assert len(changed) == 1 and changed[0].startswith("fake_a__Diverges__1__")
    trace = one(after, "fake_a__Diverges__1__")
    assert steps_of(trace) == [1, 2, 3, 4, 5, 6, 5, 6]  # resumed at 4


def test_a_stopped_sweep_writes_checkpoints_and_goes_on_later(fakes, tmp_path):
    pytest.importorskip("ray")
    args = (tmp_path, fakes[:1], ("Waits", "Good"), "--cpus-per-run", "2")  # one at a time
    process = start_sweep(*args)
    wait_for(lambda: [len(trace) for trace in traces(tmp_path).values()] == [5])
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 130, text
    ((folder, trace),) = traces(tmp_path).items()  # the other run did not begin
    assert steps_of(trace) == [1, 2, 3, 4, 5]
    checkpoints = tmp_path.glob("*/runs/*/checkpoints/*")
    assert sorted(path.name for path in checkpoints) == ["4", "5"]
    assert sweep.read_index(tmp_path / "index.jsonl")[folder]["state"] == "stopped"
    code, text = run_sweep(*args)
    assert code == 0, text
    assert len(traces(tmp_path)) == 2
    for trace in traces(tmp_path).values():
        assert steps_of(trace) == list(range(1, 13))


def child(parent, name):
    """The only child of a process that is called `name`."""
    children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    names = {int(pid): pathlib.Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
    (pid,) = (pid for pid, process in names.items() if process == name)
    return pid


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_sweep_whose_ray_node_is_killed_ends_in_one_line_and_goes_on_later(
    fakes, tmp_path, victim
):
    pytest.importorskip("ray")
    args = (tmp_path, fakes[:1], ("Waits", "Good"), "--cpus-per-run", "2")  # one at a time
    process = start_sweep(*args)
    wait_for(lambda: [len(trace) for trace in traces(tmp_path).values()] == [5])
    ((folder, trace),) = traces(tmp_path).items()
    os.kill(child(process.pid, victim), signal.SIGKILL)
    text = process.communicate()[0]
    assert process.returncode == 1, text
    died = "the Ray node of this machine died, 0 finished, 0 running, 2 waiting, 0 failed"
    assert text.splitlines()[-1] == f"{died}: the same command goes on"
    assert text.count("lost") == 1 and "Traceback" not in text
    assert sweep.read_index(tmp_path / "index.jsonl")[folder]["state"] == "lost"
    wait_for(lambda: not os.path.exists(f"/proc/{trace[0][0]}"))
    code, text = run_sweep(*args)
    assert code == 0, text
    for trace in traces(tmp_path).values():
        # The run of the killed node from its checkpoint, which is at 4.
        assert steps_of(trace) in ([1, 2, 3, 4, 5, *range(5, 13)], list(range(1, 13)))
    states = [entry["state"] for entry in sweep.read_index(tmp_path / "index.jsonl").values()]
    assert states == ["finished", "finished"]


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind(fakes, tmp_path):
    pytest.importorskip("ray")
    process = start_sweep(tmp_path, fakes, ("Good",), flags=("--pause", "0.3", "--steps", "1000"))
    wait_for(lambda: len(traces(tmp_path)) == 2)
    process.kill()
    process.wait()
    pids = {trace[0][0] for trace in traces(tmp_path).values()}
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def processes_in(folder):
    """Processes whose working directory is `folder`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it may have ended
            if path.resolve() == folder:
                found.append(int(path.parent.name))
    return found


def parent(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])


TINY = dict(hidden_dim=16, num_particles=2, diffusion_steps=2, batch_size=8, buffer_size=1000)
TINY |= dict(env_id="InvertedPendulum-v5", learning_starts=60, eval_best_of=2)


@pytest.mark.slow
def test_a_killed_worker_of_a_real_script_changes_nothing_but_the_time(tmp_path):
    """gempo_neg.py, its worker killed after a checkpoint, evaluates as an undisturbed run does."""
    pytest.importorskip("ray")
    args = TINY | dict(total_timesteps=600, eval_frequency=100, eval_episodes=1)
    args |= dict(checkpoint_frequency=100)
    env_id = args.pop("env_id")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in args.items()]
    rows = {}
    for name in ("killed", "undisturbed"):
        output = tmp_path / name
        process = start_sweep(output, ("gempo_neg",), (env_id,), flags=flags)
        if name == "killed":
            checkpoints = partial(output.glob, "*/runs/*/checkpoints/[1-9]00")
            wait_for(lambda found=checkpoints: list(found()))
            (log,) = output.glob("*/log.txt")
            (worker,) = {parent(pid) for pid in processes_in(log.parent)}
            os.kill(worker, signal.SIGKILL)
        text = process.communicate()[0]
        assert process.returncode == 0, text
        found = plot.read_folder(output, plot.Args(paths=()))
        rows[name] = [row._replace(flags="") for row in found]
    assert "--resume" in log.read_text()
    assert [row.step for row in rows["killed"]] == list(range(100, 601, 100))
    assert rows["killed"] == rows["undisturbed"]


# ---------------------------------------- the sweep's table ---------------------------------------
def test_a_flag_with_several_values_is_an_axis_for_the_scripts_that_have_it(fakes):
    args = sweep.Args(scripts=tuple(fakes), env_ids=("E",), seeds=(3,))
    words = ["--ell", "0", "-0.1", "--steps", "5", "6", "--no-save-model"]
    runs = sweep.list_runs(args, words)
    assert [(run.name, sweep.join(run.flags)) for run in runs] == [
        ("fake_a", "--no-save-model --steps 5"),
        ("fake_a", "--no-save-model --steps 6"),
        ("fake_b", "--ell 0 --no-save-model --steps 5"),
        ("fake_b", "--ell 0 --no-save-model --steps 6"),
        ("fake_b", "--ell -0.1 --no-save-model --steps 5"),
        ("fake_b", "--ell -0.1 --no-save-model --steps 6"),
    ]
    assert len({run.folder for run in runs}) == 6


def test_flags_are_read_from_a_script_and_its_base_classes_without_importing_it():
    linear = sweep.read_defaults(ROOT / "gempo_linear.py")
    neg = sweep.read_defaults(ROOT / "gempo_neg.py")
    assert "ell" not in linear and neg["ell"] == -0.1
    assert neg["total_timesteps"] == 1_000_000 and neg["batch_size"] == 256
    assert neg["target_kl"] is None
    expected = {field: getattr(gempo_linear.Args(), field) for field in linear}
    assert linear == expected and "env_id" in linear


def test_scripts_are_found_by_name_with_folder_or_path(monkeypatch, tmp_path):
    neg, td3 = ROOT / "gempo_neg.py", ROOT / "baselines" / "td3.py"
    monkeypatch.chdir(tmp_path)
    for name in ("gempo_neg", "gempo_neg.py", str(neg)):
        assert sweep.find_script(name) == neg
    for name in ("baselines/td3", "td3", str(td3)):
        assert sweep.find_script(name) == td3
    (tmp_path / "mine.py").write_text("")
    assert sweep.find_script("mine") == tmp_path / "mine.py"
    assert sweep.find_script("gempo_nag") is None
    scripts = ("gempo_linear", "baselines/td3", "gempo_neg")
    args = sweep.Args(scripts=scripts, env_ids=("Hopper-v5",), seeds=(1, 2))
    words = ["--ell", "-0.1", "-0.2", "--num-particles", "8"]
    runs = sweep.list_runs(args, words)
    assert [run.seed for run in runs] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [(run.name, sweep.join(run.flags)) for run in runs[:4]] == [
        ("gempo_linear", "--num-particles 8"),
        ("td3", ""),
        ("gempo_neg", "--ell -0.1 --num-particles 8"),
        ("gempo_neg", "--ell -0.2 --num-particles 8"),
    ]


@pytest.mark.parametrize(
    ("flags", "words", "message"),
    [
        (dict(scripts=("gempo_nag",)), [], "--scripts must be .*gempo_neg.*, got gempo_nag"),
        (dict(scripts=("bandit",)), [], "--scripts must be .*, got bandit"),  # no environment
        (dict(scripts=("td3", "other/td3.py")), [], "--scripts must have different names, got td3"),
        (dict(scripts=()), [], "--scripts must be one or more names"),
        (dict(scripts=("broken.py",)), [], ".*broken.py cannot be read: "),
        (dict(seeds=(1, -1)), [], "--seeds must be .*at least 0, got .*-1"),
        (dict(cpus_per_run=0.0), [], "--cpus-per-run must be a finite number above 0, got 0"),
        (dict(gpus_per_run=1.5), [], "--gpus-per-run must be from 0 to 1, or .*, got 1.5"),
        (dict(num_cpus=1, cpus_per_run=2.0), [], "--num-cpus must be .*--cpus-per-run, got 1"),
        (dict(address="ray://head:10001"), [], "--address must be auto or HOST:PORT, of a cluster"),
        (dict(num_cpus=1, address="auto"), [], "--num-cpus must be left out with --address"),
        ({}, ["--gama", "0.9"], "--gama must be a flag of one of the scripts"),
        ({}, ["0.9"], "-- must be followed by flags of the scripts .*, got 0.9"),
        ({}, ["--seed", "1"], "--seed must not be given after --"),
        ({}, ["--extend-to", "9"], "--extend-to must not be given after --: .* are the sweep's"),
        ({}, ["--gamma", "0.9", "--gamma", "0.8"], "--gamma must be given once"),
    ],
)  # fmt: skip
def test_bad_input_of_a_sweep_ends_in_one_line_and_writes_nothing(
    monkeypatch, tmp_path, flags, words, message
):
    (tmp_path / "broken.py").write_text("class Args\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "td3.py").write_text("class Args:\n    env_id: str\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sweep.main(sweep.Args(output_path=tmp_path / "new", **flags), words)
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code
    assert not (tmp_path / "new").exists()


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    message = "--output-path must be a folder .* that no other sweep is using"
    with open(tmp_path / "index.jsonl", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=message):
            sweep.main(sweep.Args(output_path=tmp_path), [])


def test_a_run_gets_its_share_of_threads_and_of_the_gpus_memory(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    origin = sweep.Origin("/somewhere", {"XLA_FLAGS": "--of_the_sweep"}, "")
    env = sweep.training_env(cpus=2.0, gpus=0.25, origin=origin)
    assert env["XLA_FLAGS"] == "--of_the_sweep"
    assert (env["PJRT_NPROC"], env["OMP_NUM_THREADS"]) == ("2", "2")
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.225"
    assert "JAX_PLATFORMS" not in env
    paths = env["PYTHONPATH"].split(os.pathsep)
    assert paths[:2] == [str(ROOT), "/somewhere"]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    env = sweep.training_env(cpus=0.5, gpus=0, origin=origin)
    assert (env["PJRT_NPROC"], env["JAX_PLATFORMS"]) == ("1", "cpu")


class FakeRay:
    """Ray that keeps what it is given to run."""

    def __init__(self):
        self.calls = []

    def remote(self, **options):
        return self.make_task

    def make_task(self, function):
        def submit(*inputs):
            self.calls.append(inspect.signature(function).bind(*inputs).arguments)
            return "ref"

        return SimpleNamespace(remote=submit)


def test_a_run_is_told_where_the_sweep_was_started(fakes, tmp_path, monkeypatch):
    """A worker of a cluster has another working directory."""
    args = sweep.Args(scripts=(fakes[0],), env_ids=("E",), seeds=(1,), output_path=tmp_path)
    runs = sweep.list_runs(args, [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_THREEFRY_PARTITIONABLE", "0")
    ray = FakeRay()
    sweep.Sweep(args, runs).submit(ray, runs[0])
    (call,) = ray.calls
    assert call["origin"].folder == str(tmp_path)
    assert call["origin"].variables["JAX_THREEFRY_PARTITIONABLE"] == "0"
    assert "HOME" not in call["origin"].variables


@pytest.fixture
def begun(tmp_path):
    """Arguments of a sweep of one run, the run, and a function that makes its index."""
    script = tmp_path / "mine.py"
    script.write_text(FAKE.replace("{own}", ""))
    output = tmp_path / "output"
    output.mkdir()
    args = sweep.Args(scripts=(str(script),), env_ids=("E",), seeds=(1,), output_path=output)
    (run,) = sweep.list_runs(args, [])

    def note(*states):
        first = sweep.Sweep(args, [run])
        for state in states:
            first.note(run, state)

    return args, run, note


REFUSED = r"mine__E__1__\w+ was begun with \S+mine.py of commit .*: give another --output-path"


@pytest.mark.parametrize("state", ["running", "lost", "stopped", "finished"])
def test_a_run_that_another_version_of_its_script_began_is_refused(begun, tmp_path, state):
    args, run, note = begun
    note("running", state)
    again = sweep.Sweep(args, [run])
    assert again.states[run] == ("finished" if state == "finished" else "waiting")
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(pathlib.Path(run.script).read_text())
    (moved,) = sweep.list_runs(replace(args, scripts=(str(other),)), [])
    assert moved.folder == run.folder
    with pytest.raises(SystemExit, match=REFUSED) as stop:
        sweep.Sweep(args, [moved])
    assert f"which is not {other}" in stop.value.code and "\n" not in stop.value.code
    with open(run.script, "a") as file:
        file.write("# edited\n")
    with pytest.raises(SystemExit, match=REFUSED) as stop:
        sweep.Sweep(args, [run])
    assert "which has changed since" in stop.value.code and "\n" not in stop.value.code


def test_the_version_of_a_run_is_that_of_its_start(begun):
    args, run, note = begun
    original = pathlib.Path(run.script).read_text()
    first = sweep.Sweep(args, [run])
    first.note(run, "running")
    with open(run.script, "a") as file:
        file.write("# edited while it trains\n")
    first.note(run, "finished")
    with pytest.raises(SystemExit, match=REFUSED):
        sweep.Sweep(args, [run])
    pathlib.Path(run.script).write_text(original)
    assert sweep.Sweep(args, [run]).states[run] == "finished"


def test_another_version_is_refused_for_new_seeds_too(begun):
    """plot.py would take the mean of both."""
    args, run, note = begun
    note("running", "finished")
    (other_seed,) = sweep.list_runs(replace(args, seeds=(2,)), [])
    sweep.Sweep(args, [other_seed])
    with open(run.script, "a") as file:
        file.write("# edited\n")
    with pytest.raises(SystemExit, match=REFUSED):
        sweep.Sweep(args, [other_seed])


def test_a_script_that_was_edited_while_the_sweep_trains_is_not_started(begun, tmp_path):
    args, run, note = begun
    ray = FakeRay()
    sweep.Sweep(args, [run]).submit(ray, run)
    (call,) = ray.calls
    assert call["origin"].sha256 == sweep.hash_source(run.script)
    with open(run.script, "a") as file:
        file.write("# edited\n")
    folder = args.output_path / run.folder
    assert sweep.train(run, folder, 1, 0, call["origin"]) == 1
    assert (folder / "log.txt").read_text().endswith("when the sweep began: not started\n")
    assert not (folder / "runs").exists()


def test_a_run_that_finishes_while_the_sweep_stops_is_finished(begun, monkeypatch):
    """Noted as stopped, it would be trained again."""
    args, run, note = begun
    whole = sweep.Sweep(args, [run])
    whole.refs = {"ref": run}
    whole.note(run, "running")
    monkeypatch.setattr(sweep, "has_died", lambda ray: False)
    errors = SimpleNamespace(LocalRayletDiedError=OSError, RayTaskError=OSError, RayError=OSError)
    ray = SimpleNamespace(
        wait=lambda refs, timeout: (refs, []), get=lambda ref: 0, exceptions=errors
    )
    whole.stop_all(ray)
    whole.note_running("stopped")
    assert whole.states[run] == "finished"
    assert sweep.read_index(whole.index)[run.folder]["state"] == "finished"


def test_a_mended_script_tries_a_failed_run_again_unless_it_left_a_checkpoint(begun):
    args, run, note = begun
    note("running", "failed")
    with open(run.script, "a") as file:
        file.write("# mended\n")
    again = sweep.Sweep(replace(args, retry_failed=True), [run])
    assert again.states[run] == "waiting"
    checkpoints = args.output_path / run.folder / "runs" / "E__1" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "4").write_text("")
    with pytest.raises(SystemExit, match=REFUSED):
        sweep.Sweep(replace(args, retry_failed=True), [run])


def test_an_index_without_versions_is_accepted_and_a_moved_repository_too(begun):
    args, run, note = begun
    note("running", "finished")
    index = args.output_path / "index.jsonl"
    (entry,) = sweep.read_index(index).values()
    for name in ("path", "sha256"):
        del entry[name]
    index.write_text(json.dumps(entry) + "\n")
    with open(run.script, "a") as file:
        file.write("# edited\n")
    assert sweep.Sweep(args, [run]).states[run] == "finished"
    neg = sweep.Run(str(ROOT / "gempo_neg.py"), "E", 1, ())
    assert neg.path == "gempo_neg.py"


def test_the_device_is_what_the_script_names_else_the_machine(tmp_path):
    log = tmp_path / "log.txt"
    assert sweep.describe_device(log) == "unknown"
    machine = sweep.describe_machine()
    begin = f"# {machine}\n$ python a.py\nHopper-v5 on cpu: tensorboard --logdir runs/a\n"
    log.write_text(begin)
    assert sweep.describe_device(log) == machine
    log.write_text(begin.replace("on cpu", "on NVIDIA H100 80GB HBM3"))
    assert sweep.describe_device(log) == "NVIDIA H100 80GB HBM3"


def test_an_index_cut_off_by_a_crash_is_read(tmp_path):
    index = tmp_path / "index.jsonl"
    index.write_text('{"folder": "a", "state": "running"}\n{"folder": "a", "sta')
    assert sweep.read_index(index) == {"a": {"folder": "a", "state": "running"}}
    sweep.open_output(tmp_path).close()
    with open(index, "a") as file:
        file.write('{"folder": "a", "state": "done"}\n')  # which the cut one does not swallow
    assert sweep.read_index(index) == {"a": {"folder": "a", "state": "done"}}


# ---------------------------------------------- plots ---------------------------------------------
def evaluations(script="gempo_neg", env_id="Hopper-v5", flags="", **seeds):
    """Rows of the series s1=[...], s2=[...], evaluated every 10 steps."""
    rows = []
    for name, series in seeds.items():
        seed = int(name.removeprefix("s"))
        for i, value in enumerate(series):
            what = (script, env_id, seed, 10 * (i + 1), float(value))
            rows.append(plot.Evaluation(*what, "CPU, 2 cores", "abc", flags))
    return rows


def test_interquartile_mean_by_hand():
    # Of five values the middle three.
    assert plot.interquartile_mean(np.array([100.0, 1, 2, 3, -50])) == 2
    assert plot.interquartile_mean(np.array([1.0, 2, 30, 5])) == 3.5
    rows = np.array([[1.0, 2], [3, 5]])
    np.testing.assert_array_equal(plot.interquartile_mean(rows), [1.5, 4])
    # Of 0 0 [0 1 1 1] 1 9.
    strata = np.array([0.0, 0, 0, 9]), np.array([1.0, 1, 1, 1])
    assert plot.stratified_iqm(*strata) == 0.75


def test_bootstrap_resamples_within_strata_only():
    """Two tasks with equal seeds leave nothing to chance; from one pot their shares would vary."""
    low, high = plot.bootstrap_interval([np.zeros(4), np.full(4, 10.0)], 0.95, 200)
    assert low == high == 5


def test_bootstrap_interval_agrees_with_plain_resampling():
    rng = np.random.default_rng(1)
    strata = [rng.normal(size=5), 3 + rng.normal(size=7)]
    draws = []
    for _ in range(20_000):
        draw = np.concatenate([rng.choice(x, len(x)) for x in strata])
        draws.append(np.sort(draw)[3:9].mean())
    expected = np.quantile(draws, [0.05, 0.95])
    interval = plot.bootstrap_interval(strata, 0.9, 20_000)
    np.testing.assert_allclose(interval, expected, atol=0.03)
    # One interval a row.
    low, _ = plot.bootstrap_interval([np.stack([strata[0], strata[0] + 1])], 0.9, 20_000)
    np.testing.assert_allclose(low[1] - low[0], 1, atol=0.03)


def test_one_seed_has_no_interval():
    assert np.isnan(plot.bootstrap_interval([np.ones((3, 1))], 0.95, 100)).all()


def cells(table):
    """The head and {first cell: other cells} of a table in Markdown."""
    lines = table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_the_table_is_the_mean_of_the_last_ten_and_its_standard_error():
    first = [9999, *range(100, 110), 9999]  # the ten up to step 110 have a mean of 104.5
    second = [-9999, *range(200, 210)]  # 204.5
    rows = evaluations(s1=first, s2=second)
    rows += evaluations("gempo_exp", s1=[200, 400])
    head, body = cells(plot.paper_table(plot.group(rows), 10))
    assert head == ["", "Hopper-v5 (20 to 120 steps, last 2)", "% of the paper's SAC (1 task)"]
    # The error is 70.71 / sqrt(2).
    assert body["gempo_neg"] == ["154 ± 50 (2)", f"{100 * 154.5 / 2509:.1f}"]
    assert body["gempo_exp"] == ["300 (1)", f"{100 * 300 / 2509:.1f}"]


def test_the_last_evaluations_are_at_steps_that_all_runs_share():
    """Beside runs evaluated half as often, every second evaluation counts; a short run has its own."""
    rows = evaluations(s1=range(1, 13))
    rows += [row for row in evaluations(s2=range(101, 113)) if row.step % 20 == 0]
    rows += evaluations("gempo_exp", s1=range(201, 213))
    rows += evaluations("td3", s1=range(301, 306))
    rows += [row for row in evaluations("sac", s1=range(401, 413)) if row.step == 20]
    curves = plot.group(rows)
    expected = {"gempo_neg": [100, 120], "gempo_exp": [100, 120], "td3": [20, 40], "sac": [20]}
    for name, steps in expected.items():
        assert plot.final_steps(curves["Hopper-v5"], name, 2) == steps
    head, body = cells(plot.paper_table(curves, 2))
    assert head[1] == "Hopper-v5 (20 to 120 steps, last 1)"
    assert body["gempo_neg"][0] == "61.0 ± 50.0 (2)"  # of 11 and 111
    assert body["gempo_exp"][0] == "211 (1)"  # of 210 and 212
    assert body["td3"][0] == "303 (1)"  # of 302 and 304


def test_runs_without_a_common_step_have_their_own_last_ones_and_the_head_says_so():
    odd = [row._replace(step=row.step + 5) for row in evaluations(s2=[4, 5, 6])]
    curves = plot.group(evaluations(s1=[1, 2, 3]) + odd)
    head, body = cells(plot.paper_table(curves, 2))
    assert head[1] == "Hopper-v5 (30 to 35 steps, evaluated at different ones)"
    assert body["gempo_neg"][0] == "4.0 ± 1.5 (2)"  # of 2.5 and 5.5


def test_tasks_of_unequal_seeds_count_once_each():
    """Of percentages 100 (3 seeds), 0, 50 and 60 of SAC; a mean over seeds would be of 100 twice."""
    sac = plot.SAC
    tasks = ("Hopper-v5", "Ant-v5", "Walker2d-v5", "Swimmer-v5")
    rows = []
    for env_id, share in zip(tasks, (1.0, 0.0, 0.5, 0.6), strict=True):
        seeds = {"s1": [share * sac[env_id]]}
        if env_id == "Hopper-v5":
            seeds |= {"s2": seeds["s1"], "s3": seeds["s1"]}
        rows += evaluations(env_id=env_id, **seeds)
    _, body = cells(plot.interval_table(plot.group(rows), plot.Args(paths=())))
    assert body["gempo_neg"][-1] == "55.0"  # of 0 [50 60] 100
    rows = [row for row in rows if row.seed == 1]
    rows += [row._replace(seed=2) for row in rows]
    _, body = cells(plot.interval_table(plot.group(rows), plot.Args(paths=())))
    assert body["gempo_neg"][-1] == "55.0 [55.0, 55.0]"  # equal seeds: all together, resampled


def test_normalization_gives_the_papers_averages():
    """The last column of Table 2, from its other columns."""
    rows = []
    for name in ("GeMPO-Exp", "GeMPO-Square", "GeMPO-Linear"):
        for env_id, (mean, _) in zip(plot.TASKS, plot.PAPER[name], strict=True):
            rows += evaluations(name, env_id, s1=[mean], s2=[mean])
    head, body = cells(plot.paper_table(plot.group(rows), 10, with_paper=True))
    assert [re.match(r"\S+", cell)[0] for cell in head[1:-1]] == list(plot.TASKS)
    printed = {"GeMPO-Exp": "116.7", "GeMPO-Square": "117.0", "GeMPO-Linear": "113.2"}
    for name, average in printed.items():
        assert body[name][-1] == average
    printed |= {"SAC": "100.0", "TD3": "107.4"}
    for name, average in printed.items():
        assert body[f"paper, 1M steps: {name}"][-1] == average
    assert body["paper, 1M steps: GeMPO-Square"][4] == "3325 ± 113 (5)"


def test_a_variant_without_all_tasks_has_no_average():
    rows = evaluations(s1=[1]) + evaluations(env_id="Ant-v5", s1=[1])
    rows += evaluations("gempo_exp", s1=[1])
    _, body = cells(plot.paper_table(plot.group(rows), 10))
    assert body["gempo_exp"][0] == body["gempo_exp"][-1] == ""
    assert body["gempo_neg"][-1] != ""


def test_variants_are_named_after_the_flags_that_differ_in_an_environment():
    rows = evaluations(flags="--ell -0.1 --hidden-dim 16", s1=[1])
    rows += evaluations(flags="--ell 0 --hidden-dim 16", s1=[2])
    rows += evaluations(env_id="Ant-v5", flags="--ell -0.1 --hidden-dim 32", s1=[3])
    names = {env_id: list(variants) for env_id, variants in plot.group(rows).items()}
    assert names["Ant-v5"] == ["gempo_neg --ell -0.1"]  # the floor is always named
    assert names["Hopper-v5"] == ["gempo_neg --ell -0.1", "gempo_neg --ell 0.0"]


def test_scripts_that_run_with_one_set_of_flags_each_go_by_their_names():
    rows = evaluations(flags="--hidden-dim 16", s1=[1], s2=[2])
    rows += evaluations("sac", flags="--buffer-size 5", s1=[3])
    rows += evaluations("td3", flags="--tau 0.1", s1=[4]) + evaluations("td3", flags="", s1=[5])
    names = list(plot.group(rows)["Hopper-v5"])
    assert names == ["gempo_neg", "sac", "td3 --tau 0.005", "td3 --tau 0.1"]


def test_a_variant_is_named_by_its_defaults_too_and_not_by_flags_that_change_no_learning():
    rows = evaluations(flags="--eval-frequency 5", s1=[1])
    rows += evaluations(flags="--total-timesteps 9 --checkpoint-frequency 2", s2=[2])
    rows += evaluations("sac", flags="--track", s1=[3]) + evaluations("sac", flags="", s2=[4])
    rows += evaluations("gempo_exp", flags="--diffusion-steps 5", s1=[5])
    rows += evaluations("gempo_exp", flags="--no-save-model", s1=[6])
    rows += evaluations("other", flags="--depth 2", s1=[7]) + evaluations("other", flags="", s1=[8])
    variants = plot.group(rows)["Hopper-v5"]
    expected = ["gempo_exp --diffusion-steps 20", "gempo_exp --diffusion-steps 5", "gempo_neg"]
    assert list(variants) == [*expected, "other", "other --depth 2", "sac"]
    assert list(variants["gempo_neg"]) == [1, 2]
    assert list(variants["sac"]) == [1, 2]


def test_one_setting_is_one_variant_however_its_flags_are_spelled():
    """The budget of 8 particles is 1 on HalfCheetah-v5, by default; 0.75 is another one."""
    sweep_flags = "--num-particles 8 --policy-lr 1e-3 --tau 0.005 --no-track"
    rows = evaluations(env_id="HalfCheetah-v5", flags=sweep_flags, s1=[1])
    table_flags = "--policy-lr 0.001 --num-particles 8 --target-kl 1.0"
    rows += evaluations(env_id="HalfCheetah-v5", flags=table_flags, s2=[2])
    assert list(plot.group(rows)["HalfCheetah-v5"]) == ["gempo_neg"]
    rows += evaluations(env_id="HalfCheetah-v5", flags=f"{sweep_flags} --target-kl .75", s1=[3])
    variants = plot.group(rows)["HalfCheetah-v5"]
    names = ["gempo_neg --target-kl 0.75", "gempo_neg --target-kl 1.0"]
    assert list(variants) == names
    assert list(variants[names[1]]) == [1, 2]
    # What is derived from the particles does not name variants that differ in these.
    derived = 2.5 * math.log(4) / math.log(64)
    rows = evaluations(flags=f"--num-particles 4 --target-kl {derived}", s1=[1])
    rows += evaluations(flags="--num-particles 8 --target-kl 1.25", s1=[1])
    names = ["gempo_neg --num-particles 4", "gempo_neg --num-particles 8"]
    assert list(plot.group(rows)["Hopper-v5"]) == names


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("gempo_exp", {"target-kl": 2.0}),
        ("gempo_linear", {"target-kl": 2.0}),
        ("gempo_square", {"target-kl": 2.0}),
        ("gempo_neg", {"target-kl": 2.0, "ell": -0.1}),
        ("dacer", {"exploration-noise": 0.15}),
        ("dipo", {"improvement-steps": 40, "gradient-ratio": 0.08, "max-grad-norm": 2.0}),
        ("qvpo", {"td-best-of": 4}),
        ("qsm", {"gradient-scale": None}),
        ("missing", {}),
    ],
)  # fmt: skip
def test_defaults_of_a_script_are_those_its_runs_have(script, expected):
    defaults = plot.find_defaults(script, "HalfCheetah-v5", {"q-lr": "1e-3"})
    assert {flag: defaults.get(flag) for flag in expected} == expected
    assert bool(defaults) == bool(expected)


def test_of_runs_of_a_variant_with_one_seed_the_one_that_got_further_counts(capsys):
    """And it alone: no step of the other is part of its curve."""
    rows = evaluations(flags="--total-timesteps 40", s1=[1, 2, 3, 4])
    short = evaluations(flags="--total-timesteps 50 --eval-frequency 5", s1=[7, 8])
    short += [row._replace(step=row.step + 5) for row in short]
    expected = {10: 1, 20: 2, 30: 3, 40: 4}
    assert plot.group(rows + short)["Hopper-v5"]["gempo_neg"] == {1: expected}
    assert plot.group(short + rows)["Hopper-v5"]["gempo_neg"] == {1: expected}
    line = "left out: gempo_neg Hopper-v5 seed 1, commit abc, --total-timesteps 50 --eval-frequency"
    told = capsys.readouterr().err
    assert told.count(line) == 2 and told.count("\n") == 2
    assert told.count("it ends at step 25, another run of it at 40") == 2
    later = [row._replace(value=9.0, commit="def") for row in rows]
    values = plot.group(rows + later)["Hopper-v5"]["gempo_neg"][1].values()
    assert set(values) == {9}
    assert "left out: gempo_neg Hopper-v5 seed 1, commit abc, " in capsys.readouterr().err


def test_a_curve_is_the_interquartile_mean_as_far_as_all_seeds_go():
    rows = evaluations(s1=[1, 5, 9], s2=[3, 7], s3=[100, 8, 7], s4=[-9, 6, 1])
    variants = plot.group(rows)["Hopper-v5"]
    (axes,) = plot.draw("Hopper-v5", variants, ["gempo_neg"], plot.Args(paths=())).axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[10, 2], [20, 6.5]])
    assert line.get_label() == "gempo_neg (4 seeds, 20 steps)"
    (band,) = axes.collections
    values = np.array([[1, 3, 100, -9.0], [5, 7, 8, 6]])
    low, high = plot.bootstrap_interval([values], 0.95, 2000)
    limits = band.get_datalim(axes.transData)
    assert limits.y0 == low.min() and limits.y1 == high.max()
    assert axes.get_title() == "Hopper-v5: interquartile mean and 95% interval"


def test_the_title_of_single_seeds_promises_no_interval():
    variants = plot.group(evaluations(s1=[1, 5]))["Hopper-v5"]
    (axes,) = plot.draw("Hopper-v5", variants, ["gempo_neg"], plot.Args(paths=())).axes
    assert axes.get_title() == "Hopper-v5: one seed each"


def write_run(folder, values, first=0, **hyperparameters):
    """Log evaluations every 10 steps, as the scripts do; after `first`, as a resumed run does."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder), filename_suffix=f".{first}")
    if first:
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=first + 1, session_log=start))
    else:
        rows = [f"|{flag}|{value}|" for flag, value in hyperparameters.items()]
        table = "\n".join(["|flag|value|", "|-|-|", *rows])
        writer.add_event(Event(summary=text_pb("hyperparameters", table)))
    for i, value in enumerate(values):
        scalars = {"eval/episodic_return": value, "charts/speed": -value}
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
        writer.add_event(Event(step=first + 10 * (i + 1), summary=Summary(value=values)))
    writer.close()


def test_folders_become_a_csv_and_the_csv_the_same_rows(tmp_path, capsys):
    runs = tmp_path / "runs"
    flags = dict(exp_name="gempo_neg", seed=3, env_id="Hopper-v5", gamma=0.99, batch_size=256)
    flags |= dict(ell=-0.2, save_model=True)
    write_run(runs / "Hopper-v5__gempo_neg__3__100", [7.0], **flags)  # replaced by the newer one
    write_run(runs / "Hopper-v5__gempo_neg__3__200", [1.0, 2.123456], **flags)
    write_run(runs / "Hopper-v5__td3__3__200", [4.0], exp_name="td3", batch_size=256, tau=0.1)
    write_run(tmp_path / "sweep" / "a" / "runs" / "Hopper-v5__gempo_exp__4__100", [5.0])
    entry = dict(folder="a", script="gempo_exp", env_id="Hopper-v5", seed=4, flags="--gamma 0.9")
    entry |= dict(device="GPU, 1", commit="abc", state="running")
    (tmp_path / "sweep" / "index.jsonl").write_text(json.dumps(entry) + "\n")
    table = tmp_path / "new" / "results.csv"
    figures = tmp_path / "figures"
    origin = dict(device="CPU", commit="def")
    plot.main(plot.Args(paths=(tmp_path,), to_csv=table, figures=figures, **origin))
    neg = "--ell -0.2 --save-model"
    assert list(csv.reader(table.open())) == [
        ["script", "env_id", "seed", "step", "return", "device", "commit", "flags"],
        ["gempo_exp", "Hopper-v5", "4", "10", "5.0", "GPU, 1", "abc", "--gamma 0.9"],
        ["gempo_neg", "Hopper-v5", "3", "10", "1.0", "CPU", "def", neg],
        ["gempo_neg", "Hopper-v5", "3", "20", "2.12", "CPU", "def", neg],
        ["td3", "Hopper-v5", "3", "10", "4.0", "CPU", "def", "--tau 0.1"],
    ]
    first = capsys.readouterr()
    what = "left out: gempo_neg Hopper-v5 seed 3, commit def, --ell -0.2 --save-model"
    assert f"{what}: it ends at step 10, another run of it at 20\n" in first.err
    what = "Hopper-v5__gempo_exp__4__100: running in the index of its sweep"
    assert f"{what}, last evaluated at step 10\n" in first.err
    assert (figures / "Hopper-v5.png").stat().st_size > 5_000
    plot.main(plot.Args(paths=(table,)))
    assert capsys.readouterr().out == first.out
    before = table.read_text()
    plot.main(plot.Args(paths=(table, runs), to_csv=table, **origin))  # no row is there twice
    assert table.read_text() == before
    plot.main(plot.Args(paths=(runs,), tag="charts/speed", last=1))
    assert "| -2.1 (1) |" in capsys.readouterr().out


def test_runs_of_several_scripts_with_one_exp_name_stay_apart(tmp_path, capsys):
    """--exp-name names an experiment; which script it is stands beside it in the run's flags."""
    table = dict(env_id="Hopper-v5", seed=1)
    for value, script in enumerate(("gempo_exp", "gempo_linear")):
        flags = table | dict(script=script, exp_name="mine")
        write_run(tmp_path / f"Hopper-v5__mine__1__{value}", [float(value)], **flags)
    write_run(tmp_path / "a", [5.0], script="gempo_exp", exp_name="gempo_exp", **table)
    write_run(tmp_path / "b", [6.0], exp_name="gempo_square", **table)  # as older runs tell it
    rows = plot.read_folder(tmp_path, plot.Args(paths=()))
    (curves,) = plot.group(rows).values()
    found = {name: seeds[1][10] for name, seeds in curves.items()}
    assert found == {
        "gempo_exp --exp-name gempo_exp": 5.0,
        "gempo_exp --exp-name mine": 0.0,
        "gempo_linear": 1.0,
        "gempo_square": 6.0,
    }
    assert capsys.readouterr().err == ""


def test_flags_that_differ_between_environments_are_told(capsys):
    """They share a row, since each task may have its own, but nobody should have to guess it."""
    runs = {"Hopper-v5": "--num-particles 8 --ell 0.0", "Ant-v5": "--ell 0.0 --eval-frequency 10"}
    origin = ("CPU", "abc")
    rows = [
        plot.Evaluation("gempo_linear", env_id, 1, 10, 1.0, *origin, flags)
        for env_id, flags in runs.items()
    ]
    plot.tell_settings(rows)
    expected = "gempo_linear: the environments' runs differ in --num-particles\n"
    assert capsys.readouterr().err == expected
    plot.tell_settings(rows[1:])
    assert capsys.readouterr().err == ""


def test_numbers_below_one_keep_their_digits_and_other_tags_are_not_compared_with_sac(
    tmp_path, capsys
):
    assert plot.mean_and_error(np.array([0.004, 0.006])) == "0.0050 ± 0.0010 (2)"
    assert plot.mean_and_error(np.array([0.0, 0.0])) == "0.0 ± 0.0 (2)"
    table = dict(exp_name="gempo_neg", env_id="Hopper-v5", seed=3)
    write_run(tmp_path / "run", [0.0, 0.01234567], **table)
    args = plot.Args(paths=(tmp_path,), to_csv=tmp_path / "a.csv", last=1)
    plot.main(args)
    assert "of the paper's SAC" in capsys.readouterr().out
    assert [row.value for row in plot.read_csv(args.to_csv)] == [0.0, 0.0123457]
    plot.main(replace(args, tag="charts/speed"))
    assert "SAC" not in capsys.readouterr().out


def test_eleven_scripts_have_eleven_lines():
    names = [f"script {i}" for i in range(11)]
    variants = {name: {1: {10: 1.0, 20: 2.0}} for name in names}
    (axes,) = plot.draw("Hopper-v5", variants, names, plot.Args(paths=())).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 11


def test_a_sweeps_run_is_of_the_same_variant_as_a_single_one(tmp_path, capsys):
    """Its index has what was typed, a single run's table what that means."""
    table = dict(exp_name="gempo_neg", env_id="HalfCheetah-v5", policy_lr=0.001, num_particles=8)
    table |= dict(target_kl=1.0)
    name = "HalfCheetah-v5__gempo_neg__1__100"
    write_run(tmp_path / "sweep" / "a" / "runs" / name, [5.0], seed=1, **table)
    entry = dict(folder="a", script="gempo_neg", env_id="HalfCheetah-v5", seed=1, state="finished")
    entry |= dict(flags="--num-particles 8 --policy-lr 1e-3", device="GPU, 1", commit="abc")
    (tmp_path / "sweep" / "index.jsonl").write_text(json.dumps(entry) + "\n")
    write_run(tmp_path / "runs" / "HalfCheetah-v5__gempo_neg__2__100", [6.0], seed=2, **table)
    rows = plot.read_folder(tmp_path, plot.Args(paths=()))
    flags = "--policy-lr 0.001 --num-particles 8 --target-kl 1.0"
    assert {(row.seed, row.flags) for row in rows} == {(1, entry["flags"]), (2, flags)}
    assert list(plot.group(rows)["HalfCheetah-v5"]) == ["gempo_neg"]
    assert capsys.readouterr().err == ""


def test_flags_of_a_csv_may_be_spelled_in_all_ways_that_the_scripts_take():
    flags = "--ell=-0.2 --hidden_dim 32 --no-save-model --track"
    expected = {"ell": "-0.2", "hidden-dim": "32", "save-model": "False", "track": "True"}
    assert plot.split_flags(flags) == expected


def test_means_over_other_steps_than_a_runs_last_and_empty_runs_are_told(tmp_path, capsys):
    table = dict(exp_name="gempo_neg", env_id="Hopper-v5")
    write_run(tmp_path / "a", [1.0, 2.0, 3.0], seed=1, **table)
    write_run(tmp_path / "b", [5.0], seed=2, **table)
    write_run(tmp_path / "c", [], seed=3, **table)
    plot.main(plot.Args(paths=(tmp_path,)))
    lines = capsys.readouterr().err.splitlines()
    assert "Hopper-v5 gempo_neg: mean over 1 shared evaluations, steps 10 to 10" in lines
    assert [
        line for line in lines if line.startswith("left out: ") and "/c: it has no eval" in line
    ]


def test_an_aborted_repetition_does_not_replace_a_finished_run(tmp_path, capsys):
    table = dict(exp_name="gempo_neg", env_id="Hopper-v5", seed=3)
    write_run(tmp_path / "Hopper-v5__gempo_neg__3__100", [1.0, 2.0], **table)
    write_run(tmp_path / "Hopper-v5__gempo_neg__3__200", [7.0], **table)
    rows = plot.read_folder(tmp_path, plot.Args(paths=()))
    assert [row.value for row in rows] == [1, 2]
    assert "it ends at step 10, another run of it at 20" in capsys.readouterr().err


def test_a_renamed_run_is_what_its_hyperparameters_say(tmp_path, capsys):
    table = dict(exp_name="gempo_neg", env_id="Hopper-v5", seed=3, ell=-0.2)
    write_run(tmp_path / "the best one", [1.0], **table)
    write_run(tmp_path / "Ant-v5__gempo_exp__9__100", [2.0], **table)
    write_run(tmp_path / "Ant-v5__gempo_exp__9__200", [3.0])
    write_run(tmp_path / "no one knows", [4.0])
    rows = plot.read_folder(tmp_path, plot.Args(paths=()))
    assert {row[:3] for row in rows} == {("gempo_neg", "Hopper-v5", 3), ("gempo_exp", "Ant-v5", 9)}
    told = [line for line in capsys.readouterr().err.splitlines() if "no one knows" in line]
    assert len(told) == 1 and told[0].startswith("left out: ")


def test_what_a_resumed_run_tells_again_counts(tmp_path):
    """A run that was killed after step 40 and resumed at 20 is read as TensorBoard shows it."""
    write_run(tmp_path, [1.0, 2.0, 3.0, 4.0], exp_name="gempo_neg", tau=0.5)
    write_run(tmp_path, [30.0], first=20)
    series, hyperparameters = plot.read_events(tmp_path, "eval/episodic_return")
    assert series == {10: 1.0, 20: 2.0, 30: 30.0}
    assert hyperparameters == {"exp_name": "gempo_neg", "tau": "0.5"}


def test_committed_results_have_the_columns_no_row_twice_and_are_plotted(capsys):
    paths = sorted((ROOT / "benchmark" / "results").glob("*.csv"))
    assert paths
    for path in paths:
        places = [row._replace(value=0.0) for row in plot.read_csv(path)]
        assert len(set(places)) == len(places), path
        plot.main(plot.Args(paths=(path,), resamples=20))
    assert "InvertedPendulum-v5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(last=0), "--last must be a whole number, at least 1, got 0"),
        (dict(confidence=95.0), "--confidence must be a number between 0 and 1, got 95.0"),
        (dict(resamples=0), "--resamples must be a whole number, at least 1, got 0"),
        (dict(paths=("missing",)), "paths must be folders or .csv files, got .*missing"),
        (dict(paths=("other.csv",)), ".*other.csv cannot be read as a CSV .* columns are not scr"),
        (dict(paths=("cut.csv",)), ".*cut.csv cannot be read as a CSV of evaluations"),
        (dict(paths=("empty.csv",)), ".*empty.csv cannot be read as a CSV of evaluations"),
        (dict(paths=(".",)), "paths must hold evaluations"),
    ],
)  # fmt: skip
def test_bad_input_of_a_plot_ends_in_one_line(tmp_path, flags, message):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cut.csv").write_text(",".join(plot.COLUMNS) + "\ngempo_neg,Hopper-v5,1\n")
    (tmp_path / "empty.csv").write_text("")
    paths = tuple(tmp_path / path for path in flags.pop("paths", (".",)))
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args(paths=paths, **flags))
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code


# ------------------------------------------- throughput -------------------------------------------
def count_dot_flops(jaxpr):
    """FLOPs of all matrix products of a jaxpr, two for a multiply-add, loops counted as run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            inputs = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(inputs[axis] for axis in summed)
        for inner in jaxprs_in_params(equation.params):
            total += equation.params.get("length", 1) * count_dot_flops(inner)
    return total


@pytest.mark.parametrize("td_best_of", [1, 3])
def test_counted_flops_are_those_of_the_updates_matrix_products(td_best_of):
    sizes = dict(batch_size=8, hidden_dim=16, num_particles=3, diffusion_steps=2)
    args = gempo_linear.Args(**sizes, td_best_of=td_best_of)
    dims = 5, 4
    create = partial(gempo_linear.create_agent, args, *dims)
    agent = jax.eval_shape(create, jax.random.key(0))
    rows = [(8, *shape) for shape in ((5,), (4,), (), (5,), ())]
    batch = gempo_linear.Transition(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in rows))
    jaxpr = jax.make_jaxpr(gempo_linear.update)(agent, batch, jax.random.key(0))
    counted = throughput.count_update_flops(*dims, args)
    assert sum(counted.values()) == count_dot_flops(jaxpr.jaxpr)


@pytest.mark.parametrize("name", ["gempo_neg", "baselines/td3"])
def test_throughput_measures_any_script_and_knows_the_floor_of_gempo(name, capsys):
    words = ["--env-id=InvertedPendulum-v5", "--hidden-dim=16", "--batch-size=8", "--num-envs=2"]
    words += ["--buffer-size=1000", "--updates-per-step=1"]
    if name == "gempo_neg":
        words += ["--num-particles=2", "--diffusion-steps=2"]
    args = throughput.Args(script=name, seconds=0.1, repeats=1, json=True)
    throughput.main(args, words)
    figures = json.loads(capsys.readouterr().out)
    for part in ("compile_s", "update_ms", "act_ms", "env_ms", "sps", "peak_memory_mb"):
        assert 0 < figures[part] < math.inf
    assert ("floor_ms" in figures) == (name == "gempo_neg")


@pytest.mark.parametrize("num_envs", [1, 7, 64, 300])
def test_a_short_run_is_as_long_as_asked_for_and_as_its_log_of_the_speed_needs(num_envs):
    args = gempo_linear.Args(num_envs=num_envs)
    run_args = throughput.short_run(gempo_linear, args, 5_000)
    assert run_args.total_timesteps - run_args.learning_starts == 5_000
    run_args = throughput.short_run(gempo_linear, args, 1)
    starts, total = run_args.learning_starts, run_args.total_timesteps
    assert total - starts == 4 * num_envs + 100
    # As in `train`: the first rounds are not timed, and a round's log has those before it.
    logged = []
    timed = 0
    for before in range(0, total, num_envs):
        step = before + num_envs
        if before >= starts and gempo_linear.is_due(gempo_linear.LOG_FREQUENCY, before, step):
            logged.append(timed)
        if step > starts + 2 * num_envs:
            timed += 1
    assert logged[-1] > 0


@pytest.mark.parametrize(
    ("flags", "words", "message"),
    [
        (dict(script="gempo_nag"), [], "--script must be .*gempo_neg, .*got gempo_nag"),
        (dict(script="bandit"), [], "--script must be .*gempo_neg, baselines/td3 .*got bandit"),
        (dict(script="dna_finetune"), [], "--script must be .*got dna_finetune"),
        (dict(repeats=0), [], "--repeats must be a whole number, at least 1, got 0"),
        (dict(seconds=0.0), [], "--seconds must be a finite number above 0, got 0"),
        ({}, ["--resume", "runs/a"], "--resume must be left out: it is not measured"),
        ({}, ["--capture-video"], "--capture-video must be left out: it is not measured"),
        ({}, ["--gamma", "2"], "--gamma must be a number from 0 to 1, got 2"),
    ],
)
def test_bad_input_of_throughput_ends_in_one_line(flags, words, message):
    with pytest.raises(SystemExit) as stop:
        throughput.main(throughput.Args(**flags), words)
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code


# -------------------------------------------- watching --------------------------------------------
EPISODES = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 120 steps, with checkpoints and a saved model, and its last scores."""
    folder = tmp_path_factory.mktemp("trained")
    args = gempo_linear.Args(
        **TINY,
        total_timesteps=120,
        eval_frequency=40,
        eval_episodes=EPISODES,
        checkpoint_frequency=80,
        save_model=True,
    )
    with contextlib.chdir(folder):
        gempo_linear.main(args)
    (run,) = folder.glob("runs/*")
    scores = {}
    for tag in ("eval/episodic_return", "eval/episodic_return_std"):
        scores[tag], _ = plot.read_events(run, tag)
    return run, scores


@pytest.fixture
def offscreen(monkeypatch):
    """No display: frames are drawn by EGL."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")


def watched_returns(printed):
    """The returns, and the mean and standard deviation, that watch.py printed."""
    returns = [float(x) for x in re.findall(r"^episode \d+: return (\S+) in", printed, re.M)]
    (summary,) = re.findall(r"^mean return (\S+), standard deviation (\S+)$", printed, re.M)
    return returns, [float(x) for x in summary]


@pytest.mark.parametrize("file", ["checkpoints/80", "checkpoints/120", "gempo_linear.model", ""])
def test_a_watched_agent_plays_the_episodes_of_its_evaluation(trained, offscreen, capsys, file):
    run, scores = trained
    watch.main(watch.Args(paths=(run / file,)))
    printed = capsys.readouterr().out
    assert printed.startswith("no display: --output")
    step = 80 if file == "checkpoints/80" else 120
    what = "saved model" if file.endswith(".model") else f"step {step}"
    assert f"InvertedPendulum-v5, gempo_linear, {what}\n" in printed
    returns, summary = watched_returns(printed)
    assert len(returns) == EPISODES
    logged = [scores[tag][step] for tag in scores]
    np.testing.assert_allclose(summary, logged, atol=0.051)  # printed with one decimal


def test_of_several_runs_the_newest_is_watched(trained, offscreen, capsys, tmp_path):
    """Which is what a shell makes of runs/HalfCheetah-v5__gempo_linear__1__*."""
    run, _ = trained
    (tmp_path / "checkpoints").mkdir()
    old = tmp_path / "checkpoints" / "40"
    old.write_bytes(b"of no use")
    os.utime(old, (0, 0))
    watch.main(watch.Args(paths=(run, tmp_path), episodes=1))
    newest = run / "checkpoints" / "120"
    assert f"of 2 the newest: {newest}\n" in capsys.readouterr().out


def test_watching_plays_by_the_script_that_lies_here(trained, tmp_path, monkeypatch):
    """Not by the repository's one of the same name, which watch.py itself imports."""
    run, _ = trained
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "gempo_linear", gempo_linear)  # it comes back afterwards
    assert watch.load(run).script is gempo_linear
    text = pathlib.Path(gempo_linear.__file__).read_text()
    (tmp_path / "gempo_linear.py").write_text(text + "\nMINE = True\n")
    monkeypatch.chdir(tmp_path)
    script = watch.load(run).script
    assert script.MINE and script.__file__ == str(tmp_path / "gempo_linear.py")


def test_a_watched_episode_becomes_a_gif_of_the_frames_asked_for(
    trained, offscreen, capsys, tmp_path
):
    run, _ = trained
    file = tmp_path / "pole.gif"
    kwargs = gym.spec("InvertedPendulum-v5").kwargs.copy()
    # 25 steps a second: every second one, of the 0.16 s that an episode has at least.
    size = dict(width=96, height=64, skip=2, seconds=0.16)
    watch.main(watch.Args(paths=(run,), output=file, episodes=2, seed=5, **size))
    printed = capsys.readouterr().out
    returns, _ = watched_returns(printed)
    assert len(returns) == 2
    assert re.search(r"pole.gif: 2 frames, 12.5 a second, 0.0\d MB", printed)
    with Image.open(file) as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"]) == ((96, 64), 2, 80)
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB"), int))
    assert frames[0].std() > 10  # something is drawn
    assert 0 < np.abs(frames[1] - frames[0]).mean() < 50  # and moves
    assert gym.spec("InvertedPendulum-v5").kwargs == kwargs


def test_the_length_of_a_gif_ends_with_its_episode(trained, offscreen, capsys, tmp_path):
    run, _ = trained
    file = tmp_path / "pole.gif"
    watch.main(watch.Args(paths=(run,), output=file, episodes=1, width=32, height=32, colors=8))
    steps = int(re.search(r"return \S+ in (\d+) steps", capsys.readouterr().out)[1])
    with Image.open(file) as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert len(gif.convert("RGB").getcolors()) <= 8
    assert sum(durations) == 40 * (steps + 1)  # equal frames are merged


@pytest.mark.parametrize("rate", [30, 22.3, 50])
def test_a_gif_lasts_as_long_as_its_episode(tmp_path, rate):
    """A GIF has durations of whole centiseconds."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(255, size=(8, 8, 3), dtype=np.uint8)) for _ in range(30)]
    watch.write_gif(tmp_path / "a.gif", images, rate, 16)
    durations = []
    with Image.open(tmp_path / "a.gif") as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == pytest.approx(1000 * 30 / rate, abs=10) and min(durations) >= 20


@pytest.mark.parametrize(("output", "skip", "expected"), [("a.gif", 1, 3), ("a.mp4", 1, 1)])
def test_seed_of_a_saved_model_and_frames_of_a_gif(monkeypatch, output, skip, expected):
    """Three environments make 20,001 steps of 20,000. Hopper has 125 steps a second."""
    seeds = []
    script = SimpleNamespace(
        EVAL_SEED_STRIDE=gempo_linear.EVAL_SEED_STRIDE,
        choose_renderer=lambda args: None,
        make_env=gempo_linear.make_env,
        evaluate=lambda agent, envs, seed: seeds.append(seed),
    )
    monkeypatch.setattr(watch, "make_rendered", lambda script, env_id, args: gym.make(env_id))
    flags = dict(env_id="Hopper-v5", num_envs=3, total_timesteps=20_000, seed=1)
    saved = watch.Saved(script, gempo_linear.Args(**flags), None, None)
    args = watch.Args(
        paths=(pathlib.Path("a"),), output=pathlib.Path(output), episodes=1, skip=skip
    )
    _, rate = watch.play(saved, args)
    assert seeds == [1 + gempo_linear.EVAL_SEED_STRIDE * 20_001]
    assert rate == 125 / expected


def test_of_several_paths_those_without_an_agent_are_left_out(tmp_path, capsys):
    """runs/* has runs/cache, and runs that ended before their first checkpoint."""
    (tmp_path / "cache").mkdir()
    files = [tmp_path / "old.model", tmp_path / "new.model"]
    for i, file in enumerate(files):
        file.write_text("")
        os.utime(file, (i, i))
    assert watch.find_newest((tmp_path / "cache", *files)) == files[1]
    assert watch.find_newest((tmp_path / "cache", files[0])) == files[0]
    with pytest.raises(SystemExit, match="none of 2 paths holds a checkpoint or a saved model"):
        watch.find_newest((tmp_path / "cache", tmp_path / "cache"))
    with pytest.raises(SystemExit, match="cache holds no checkpoint and no saved model"):
        watch.find_newest((tmp_path / "cache",))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_films_of_dm_control_run_at_its_own_speed():
    """Of shimmy's environments the metadata have milliseconds a step; others have steps a second."""
    pytest.importorskip("shimmy")
    plain = gempo_linear.make_env("shimmy:dm_control/walker-walk-v0")  # a step takes 25 ms
    assert watch.steps_per_second(plain) == pytest.approx(40)
    assert watch.steps_per_second(gym.make("Hopper-v5")) == 125
    landscape = gempo_linear.make_env("benchmark.reward_landscapes:cheetah-run-linear-v0")
    assert watch.steps_per_second(landscape) == landscape.metadata["render_fps"] < 100


class FixedConstructor(gym.Wrapper):
    """A MuJoCo environment of one's own that takes a render_mode and no size."""

    def __init__(self, render_mode=None):
        super().__init__(gym.make("InvertedPendulum-v5", render_mode=render_mode))


gym.register("FixedConstructor-v0", FixedConstructor)


def test_an_environment_that_takes_no_size_is_drawn(offscreen):
    args = watch.Args(paths=(pathlib.Path("a"),), output=pathlib.Path("a.gif"), width=64, height=48)
    env = watch.make_rendered(gempo_linear, "FixedConstructor-v0", args)
    assert env.render().ndim == 3
    env.close()


def test_a_watched_episode_becomes_an_mp4(trained, offscreen, tmp_path):
    pytest.importorskip("moviepy")
    run, _ = trained
    file = tmp_path / "pole.mp4"
    watch.main(watch.Args(paths=(run,), output=file, episodes=1, width=96, height=64))
    assert b"ftyp" in file.read_bytes()[:16]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(paths=("none",)), ".*none cannot be used: .*No such file"),
        (dict(paths=(".",)), ".* holds no checkpoint and no saved model"),
        (dict(paths=("text",)), ".*text cannot be used: "),
        (dict(paths=("other",)), ".*other was written by nobody.py, which is neither here nor in "),
        (dict(output="a.png"), "--output must be a file that ends in .gif or .mp4, got .*a.png"),
        (dict(output="no/a.gif"), "--output must be in a folder that exists, got .*no/a.gif"),
        (dict(output="a.mp4"), "an .mp4 needs moviepy: pip install -e '.\\[video\\]'"),
        (dict(width=0), "--width must be a whole number, at least 1, got 0"),
        (dict(skip=0), "--skip must be a whole number, at least 1, got 0"),
        (dict(episodes=0), "--episodes must be a whole number, at least 1, got 0"),
        (dict(seed=-1), "--seed must be from 0 to 2\\*\\*32 - 1, got -1"),
        (dict(seed=2**32), "--seed must be from 0 to 2\\*\\*32 - 1, got 4294967296"),
        (dict(paths=()), "paths must name a run's folder, a checkpoint or a saved model"),
        (dict(seconds=0.0), "--seconds must be a finite number above 0, got 0"),
        (dict(colors=257), "--colors must be a whole number from 2 to 256, got 257"),
    ],
)
def test_bad_input_of_watching_ends_in_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.setitem(sys.modules, "moviepy", None)  # as if it were not installed
    (tmp_path / "text").write_text("text")
    with gzip.open(tmp_path / "other", "wb") as file:
        pickle.dump({"script": "nobody"}, file)
    if "output" in flags:
        flags = flags | {"output": tmp_path / flags["output"]}
    paths = tuple(tmp_path / path for path in flags.get("paths", ("other",)))
    flags = flags | {"paths": paths}
    with pytest.raises(SystemExit) as stop:
        watch.main(watch.Args(**flags))
    assert re.match(message, stop.value.code) and "\n" not in stop.value.code


# ------------------------------------------ the DNA table -----------------------------------------
def write_dna_run(folder, value, seed=1, weighting="neg", metrics=True, **more):
    folder.mkdir()
    flags = dict(script="dna_finetune", weighting=weighting, ell=-0.3, seed=seed, num_updates=100)
    (folder / "args.json").write_text(json.dumps(flags | more))
    if metrics:
        samples = {
            "pretrained": dict.fromkeys(dna_table.COLUMNS, 0.0),
            "finetuned": dict.fromkeys(dna_table.COLUMNS, value),
        }
        (folder / "metrics.json").write_text(json.dumps(samples))
    return folder


def test_the_dna_table_has_mean_and_standard_error_and_its_csv_gives_the_same(tmp_path, capsys):
    runs = []
    for seed, value in ((1, 1.0), (2, 2.0), (3, 6.0)):
        runs.append(write_dna_run(tmp_path / str(seed), value, seed))
    tds = dict(weighting="exp", method="tds", alpha=0.2)
    runs.append(write_dna_run(tmp_path / "tds", 4.0, **tds))
    simplex = dict(weighting="linear", normalizer="simplex", target_kl=2.5)
    runs.append(write_dna_run(tmp_path / "simplex", 5.0, **simplex))
    runs.append(write_dna_run(tmp_path / "unfinished", 0.0, metrics=False))
    dna_table.main(dna_table.Args(tuple(runs), to_csv=tmp_path / "dna.csv"))
    note, *table = capsys.readouterr().out.splitlines()
    assert note == f"left out, unfinished: {tmp_path}/unfinished"
    assert table[2].startswith("| pretrained | 3 | 0.00 ± 0.00 |") and table[2].endswith("| 0.17 |")
    assert table[3].startswith("| tds | 1 | 4.00 | ") and table[3].endswith("| 4.64 |")
    assert table[4].startswith("| neg(-0.3) | 3 | 3.00 ± 1.53 |")  # sqrt(7 / 3)
    assert table[5].startswith("| linear, simplex(2.5) | 1 | 5.00 | ")
    assert len(table) == 6
    dna_table.main(dna_table.Args((tmp_path / "dna.csv",)))
    assert capsys.readouterr().out.splitlines() == table


def test_the_dna_table_has_the_means_of_the_last_20_updates_of_runs_that_learned(tmp_path, capsys):
    runs = [write_dna_run(tmp_path / str(seed), 1.0, seed) for seed in (1, 2)]
    runs.append(write_dna_run(tmp_path / "smc", 4.0, weighting="exp", method="smc"))
    for folder in runs:
        metrics = json.loads((folder / "metrics.json").read_text())
        for values in metrics.values():
            for column in dna_table.LAST_TAGS:
                del values[column]
        (folder / "metrics.json").write_text(json.dumps(metrics))
    for seed, folder in enumerate(runs[:2]):
        writer = EventFileWriter(str(folder))
        for update in range(1, 12_001):  # more than TensorBoard keeps by itself
            is_last = update > 12_000 - dna_table.LAST_UPDATES
            value = 7.0 + seed + update % 2 if is_last else 100.0
            summary = Summary(
                value=[Summary.Value(tag="charts/predicted_activity", simple_value=value)]
            )
            writer.add_event(Event(step=update, summary=summary))
        writer.close()
    dna_table.main(dna_table.Args(tuple(runs), to_csv=tmp_path / "dna.csv"))
    table = capsys.readouterr().out
    header, _, pretrained, neg, smc = table.splitlines()
    assert header.endswith("| gc | predicted_last_20 | paper's Table 3 |")  # no truth in the log
    assert pretrained.endswith("| 0.00 ± 0.00 |  | 0.17 |")
    assert neg.endswith("| 1.00 ± 0.00 | 8.00 ± 0.50 | 7.45 |")  # of 7.5 and 8.5
    assert smc.endswith("| 4.00 |  |  |")
    dna_table.main(dna_table.Args((tmp_path / "dna.csv",)))
    assert capsys.readouterr().out == table


def test_an_old_csv_goes_with_the_folders_of_its_runs_and_gets_their_new_columns(tmp_path, capsys):
    run = write_dna_run(tmp_path / "run", 1.0)
    dna_table.main(dna_table.Args((run,)))
    table = capsys.readouterr().out
    whole = dna_table.read_rows((run,))
    old = tmp_path / "old.csv"
    dna_table.write_csv(old, [{k: v for k, v in row.items() if "last" not in k} for row in whole])
    for paths in ((old, run), (run, old)):
        dna_table.main(dna_table.Args(paths))
        assert capsys.readouterr().out == table


def test_presets_are_no_flags_of_their_own_and_a_cut_csv_ends_in_one_line(tmp_path, capsys):
    hour = write_dna_run(tmp_path / "hour", 1.0, preset="hour", sample_steps=128)
    small = write_dna_run(tmp_path / "small", 3.0, seed=2, preset="small", sample_steps=128)
    dna_table.main(dna_table.Args((hour, small), to_csv=tmp_path / "dna.csv"))
    assert "| neg(-0.3) | 2 | 2.00 ± 1.00 |" in capsys.readouterr().out
    text = (tmp_path / "dna.csv").read_text()
    (tmp_path / "dna.csv").write_text(text[: text.rindex("3.0")])
    with pytest.raises(SystemExit) as stop:
        dna_table.main(dna_table.Args((tmp_path / "dna.csv",)))
    assert stop.value.code.startswith(f"{tmp_path}/dna.csv: ") and "\n" not in stop.value.code


def test_the_csv_of_the_dna_table_gets_a_folder_or_ends_in_one_line(tmp_path, capsys):
    run = write_dna_run(tmp_path / "run", 1.0, pretrain_steps=6_000)
    file = tmp_path / "new" / "folder" / "dna.csv"
    dna_table.main(dna_table.Args((run,), to_csv=file))
    table = capsys.readouterr().out
    dna_table.main(dna_table.Args((file, run)))  # the same runs twice
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit, match="^--to-csv must be a file that can be written") as stop:
        dna_table.main(dna_table.Args((run,), to_csv=file / "dna.csv"))
    assert "\n" not in stop.value.code


def test_a_csv_of_before_goes_with_runs_that_tell_their_pretraining(tmp_path, capsys):
    old = write_dna_run(tmp_path / "old", 1.0)
    file = tmp_path / "old.csv"
    dna_table.main(dna_table.Args((old,), to_csv=file))
    assert ",\n" in file.read_text()  # the row of the pretrained model has no flags
    new = write_dna_run(tmp_path / "new", 2.0, weighting="exp", pretrain_steps=6_000)
    capsys.readouterr()
    dna_table.main(dna_table.Args((file, new)))
    assert "| pretrained | 1 |" in capsys.readouterr().out


def test_the_dna_table_of_data_without_a_truth_comes_from_its_csv_too(tmp_path, capsys):
    run = write_dna_run(tmp_path / "real", 1.0)
    metrics = json.loads((run / "metrics.json").read_text())
    for values in metrics.values():
        del values["true_activity"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    dna_table.main(dna_table.Args((run,), to_csv=tmp_path / "real.csv"))
    table = capsys.readouterr().out
    dna_table.main(dna_table.Args((tmp_path / "real.csv",)))
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    "name", ["metrics", "metrics_second", "metrics_pretrain_2000", "metrics_9cab2ff"]
)
def test_the_committed_dna_results_make_the_tables_of_the_document(name, capsys):
    dna_table.main(dna_table.Args((ROOT / f"benchmark/results/dna/{name}.csv",)))
    assert capsys.readouterr().out in (ROOT / "benchmark/DNA.md").read_text()


def test_what_is_no_dna_result_ends_in_one_line(tmp_path):
    good = write_dna_run(tmp_path / "a", 1.0)
    other = write_dna_run(tmp_path / "b", 1.0, num_updates=50)
    other_seed = write_dna_run(tmp_path / "d", 1.0, seed=2, num_updates=50)
    repeated = write_dna_run(tmp_path / "e", 2.0)
    long = write_dna_run(tmp_path / "f", 1.0, weighting="exp", pretrain_steps=6_000)
    short = write_dna_run(tmp_path / "g", 1.0, seed=2, pretrain_steps=2_000)
    (tmp_path / "c.csv").write_text("name\nx\n")
    differences = "other flags than seed 1: num_updates=50 instead of num_updates=100"
    cases = (
        ((good, other), "neg(-0.3), seed 1, has other flags"),
        ((good, other_seed), f"neg(-0.3), seed 2, has {differences}"),
        ((good, repeated), "another run of neg(-0.3), seed 1, has other metrics"),
        ((long, short), "pretrain_steps=2000 instead of pretrain_steps=6000"),
        ((tmp_path / "none",), "No such"),
        ((), "no finished run"),
        ((tmp_path / "c.csv",), "seed"),
    )
    for paths, message in cases:
        with pytest.raises(SystemExit) as stop:
            dna_table.main(dna_table.Args(paths))
        assert message in stop.value.code and "\n" not in stop.value.code
