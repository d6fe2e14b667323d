"""Interrupted runs: killed at any moment, stopped by signals, by NaN, by a full disk; and resumed exactly."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from helpers import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = dict(env_id="InvertedPendulum-v5", total_timesteps=2400, learning_starts=60, hidden_dim=16, num_particles=2)
TINY |= dict(diffusion_steps=2, batch_size=8, buffer_size=1000, eval_frequency=300, eval_episodes=1, eval_best_of=2)
TINY |= dict(checkpoint_frequency=100)
SCRIPT = SCRIPTS["neg"]


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(folder, *arguments, script="neg"):
    command = [sys.executable, str(ROOT / f"gempo_{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder, *arguments, script="neg"):
    process = start(folder, *arguments, script=script)
    return process.communicate()[0], process.returncode


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def steps_of(run):
    return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit())


def read_state(run):
    array = ocp.StandardCheckpointer().restore((run / "checkpoints" / str(steps_of(run)[-1]) / "default").absolute())[0]
    return SCRIPT.cloudpickle.loads(SCRIPT.zlib.decompress(array))


def read_scalars(run):
    """{tag: [(step, value)]} as TensorBoard reads them, without the speed."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function of the number of environments: the folder of the run that nothing interrupted."""
    done = {}

    def run(num_envs):
        if num_envs not in done:
            folder = tmp_path_factory.mktemp(f"uninterrupted{num_envs}")
            output, code = finish(folder, *words(TINY | {"num_envs": num_envs}))
            assert code == 0, output
            done[num_envs] = only_run(folder)
        return done[num_envs]

    return run


def kill_and_resume(folder, num_envs, kills, seed):
    """Start a run, kill -9 it `kills` times at random moments after its first checkpoint, and let it end."""
    rng, process = random.Random(seed), start(folder, *words(TINY | {"num_envs": num_envs}))
    killed = 0
    while killed < kills:
        while process.poll() is None and not (folder / "runs").exists():
            time.sleep(0.01)
        before = steps_of(only_run(folder))
        while process.poll() is None and steps_of(only_run(folder))[-1:] == before[-1:]:
            time.sleep(0.01)  # until it has gone on from where it was
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        process = start(folder, "--resume", only_run(folder).relative_to(folder))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return only_run(folder), killed


def assert_same_end(run, reference):
    ours, theirs = read_state(run), read_state(reference)
    assert ours["step"] == theirs["step"]
    for a, b in zip(ours["leaves"], theirs["leaves"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert read_scalars(run) == read_scalars(reference)


@pytest.mark.parametrize(("num_envs", "kills"), [(1, 3), (4, 1)])
def test_a_killed_run_resumes_exactly(tmp_path, uninterrupted, num_envs, kills):
    run, killed = kill_and_resume(tmp_path, num_envs, kills, seed=num_envs)
    assert killed >= 1
    assert_same_end(run, uninterrupted(num_envs))


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", (1, 4))
def test_twenty_kills_and_twenty_exact_resumes(tmp_path, uninterrupted, num_envs):
    killed = 0
    for repeat in range(20):
        folder = tmp_path / str(repeat)
        folder.mkdir()
        run, kills = kill_and_resume(folder, num_envs, 5, seed=repeat)
        assert_same_end(run, uninterrupted(num_envs))
        killed += kills
        if killed >= 20:
            break
    print(f"{num_envs} environments: {killed} kills in {repeat + 1} runs")
    assert killed >= 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_resumes_exactly(tmp_path, uninterrupted, number, code):
    process = start(tmp_path, *words(TINY | {"num_envs": 1, "checkpoint_frequency": 2300}))
    while "evaluation" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    (step,) = steps_of(run := only_run(tmp_path))
    assert 300 <= step < 2300
    output, code = finish(tmp_path, "--resume", run)
    assert code == 0, output
    ours, theirs = read_scalars(run), read_scalars(uninterrupted(1))
    assert ours == theirs


def test_a_second_signal_ends_the_run_at_once_without_a_checkpoint(tmp_path):
    process = start(tmp_path, *words(TINY | {"learning_starts": 1}))
    assert "tensorboard" in process.stdout.readline()
    time.sleep(0.3)  # it compiles now, for seconds
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # another number, since two equal ones may reach Python as one
    process.communicate()
    assert process.returncode in (130, 143) and steps_of(only_run(tmp_path)) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match="^runs/.* cannot be written, or another process is writing it: .*$"):
        SCRIPT.main(SCRIPT.Args(**TINY))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of 200 steps with checkpoints at 100 and 200."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=200)))
    return only_run(folder)


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refusal(run, script=SCRIPT, **flags):
    before = contents(run) if run.exists() else None
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(resume=str(run), **flags))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert (contents(run) if run.exists() else None) == before
    return stop.value.code


@pytest.mark.parametrize("damage", ("truncated", "flipped", "missing"))
def test_a_damaged_checkpoint_is_refused_and_an_older_one_offered(tmp_path, short, damage):
    run = shutil.copytree(short, tmp_path / "run")
    assert steps_of(run) == [100, 200]
    file = max((run / "checkpoints" / "200").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if damage == "missing" else file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    message = refusal(run)
    assert "checkpoints/200" in message and message.endswith("older ones (remove this one to use them): [100]")
    shutil.rmtree(run / "checkpoints" / "200")
    agent = SCRIPT.main(SCRIPT.Args(resume=str(run)))  # goes on, and writes 200 anew
    assert steps_of(run) == [100, 200] and agent.num_updates == 200 - 60
    assert read_scalars(run) == read_scalars(short)


def test_other_scripts_sizes_flags_and_missing_folders_are_refused(tmp_path, short, monkeypatch):
    assert "gempo_neg.py" in refusal(short, SCRIPTS["linear"])
    assert "flags" in refusal(short, hidden_dim=32)
    assert "not found" in refusal(tmp_path / "nothing") and not (tmp_path / "nothing").exists()
    monkeypatch.setattr(SCRIPT, "STATE_DIM", 64)
    assert "sizes" in refusal(short)


def test_a_folder_that_another_process_writes_is_refused(tmp_path, short):
    run = shutil.copytree(short, tmp_path / "run")
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(run / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another process" in refusal(run)
        other.communicate(b"\n")


def test_without_the_buffer_a_checkpoint_is_small_and_the_buffer_refills_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=200, checkpoint_buffer=False)))
    run = only_run(tmp_path)
    state = read_state(run)
    assert not any(np.shape(leaf)[:1] == (1000,) for leaf in state["leaves"])
    shutil.rmtree(run / "checkpoints" / "200")
    agent = SCRIPT.main(SCRIPT.Args(resume=str(run)))
    assert agent.num_updates == (100 - 60) + (200 - 100 - 60)


class Faulty(gym.Env):
    """Goes on for ever; at step `at` it returns what is not finite."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    render_mode = None

    def __init__(self, what=None, at=150, pickles=True, render_mode=None):
        self.what, self.at = what, at
        self.handle = None if pickles else (number for number in range(3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.float32([0, 0]), {}

    def step(self, action):
        self.steps += 1
        bad = np.inf if self.steps == self.at else 0
        obs = np.float32([self.np_random.normal(), bad if self.what == "observation" else 0])
        return obs, float(bad if self.what == "reward" else action[0]), False, self.steps == 1000, {}


for kind in ("observation", "reward", "nothing"):
    gym.register(f"Faulty-{kind}-v0", Faulty, kwargs=dict(what=kind), disable_env_checker=True)
gym.register("Unpicklable-v0", Faulty, kwargs=dict(pickles=False), disable_env_checker=True)


def assert_stops(folder, monkeypatch, word, at=None, **flags):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=400, eval_frequency=0) | flags))
    line = stop.value.code
    assert isinstance(line, str) and "\n" not in line and "non-finite" in line and word in line
    if at:
        assert f"step {at}:" in line
    run = only_run(folder)
    scalars = read_scalars(run)
    assert all(np.isfinite([value for _, value in series]).all() for series in scalars.values())
    assert line.endswith(f"saved: step {(steps_of(run) or [None])[-1]}")
    if steps_of(run):
        assert all(np.isfinite(leaf).all() for leaf in read_state(run)["leaves"])
    return run


@pytest.mark.parametrize("what", ("observation", "reward"))
def test_an_environment_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, what):
    run = assert_stops(tmp_path, monkeypatch, what, at=150, env_id=f"Faulty-{what}-v0")
    assert steps_of(run) == [100]


def test_actions_losses_and_parameters_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    nan, act, update = np.float32(np.nan), SCRIPT.act, SCRIPT.update
    temperature_loss = SCRIPT.temperature_loss
    folders = {name: tmp_path / name for name in ("actions", "losses", "parameters", "rate")}
    for folder in folders.values():
        folder.mkdir()
    flags = dict(env_id="Faulty-nothing-v0")
    with monkeypatch.context() as patch:
        patch.setattr(SCRIPT, "act", lambda *a: act(*a) * (nan if a[3] >= 140 else 1))
        assert steps_of(assert_stops(folders["actions"], patch, "actions", at=141, **flags)) == [100]
    with monkeypatch.context() as patch:

        def bad_update(agent, batch, key, args):
            new, metrics = update(agent, batch, key, args)
            scale = SCRIPT.jnp.where(agent.num_updates >= 80, nan, 1.0)
            return new, metrics | {"losses/critic_loss": scale * metrics["losses/critic_loss"]}

        patch.setattr(SCRIPT, "update", bad_update)
        SCRIPT.train_step.clear_cache()
        assert_stops(folders["losses"], patch, "losses/critic_loss", at=200, **flags)
    with monkeypatch.context() as patch:

        def bad_gradient(log_lambda, *arguments):
            loss, kl = temperature_loss(log_lambda, *arguments)
            return loss + SCRIPT.jnp.sqrt(0 * log_lambda), kl  # finite, but its gradient is not

        patch.setattr(SCRIPT, "temperature_loss", bad_gradient)
        SCRIPT.train_step.clear_cache()
        assert_stops(folders["parameters"], patch, "charts/params_norm", at=200, learning_starts=199, **flags)
    SCRIPT.train_step.clear_cache()
    assert_stops(folders["rate"], monkeypatch, "actions", q_lr=1e30, policy_lr=1e30, **flags)


def test_an_environment_that_cannot_be_pickled_starts_a_new_episode_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = dict(env_id="Unpicklable-v0", total_timesteps=200, eval_frequency=0)
    SCRIPT.main(SCRIPT.Args(**TINY | flags))
    shutil.rmtree((run := only_run(tmp_path)) / "checkpoints" / "200")
    capsys.readouterr()
    SCRIPT.main(SCRIPT.Args(resume=str(run)))
    assert "Unpicklable-v0 cannot be restored exactly" in capsys.readouterr().out
    assert steps_of(run) == [100, 200]


def test_a_buffer_beyond_the_memory_is_refused_with_the_size_that_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^--buffer-size must be at most (\d+) to fit") as stop:
        SCRIPT.main(SCRIPT.Args(**TINY | dict(buffer_size=10**12)))
    assert 10**6 < int(re.search(r"\d+", stop.value.code)[0]) < 10**12 and not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint_resumes(small_disk, monkeypatch, capsys):
    monkeypatch.chdir(small_disk)
    evaluate, full = SCRIPT.evaluate, []

    def fill_then_evaluate(*arguments):
        full.append(len(full))
        if len(full) == 2:  # at step 600
            with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(512))
        return evaluate(*arguments)

    monkeypatch.setattr(SCRIPT, "evaluate", fill_then_evaluate)
    try:
        SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=900)))
    except SystemExit as stop:  # not by pytest.raises, which would hold the frame, and with it the lock
        line = stop.code
    assert re.match(r"stopped at step [6-9]00: .*(No space left|RESOURCE_EXHAUSTED)", line) and "\n" not in line
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    (small_disk / "other").unlink()
    output, code = finish(small_disk, "--resume", run := only_run(small_disk))
    assert code == 0, output
    assert steps_of(run) == [800, 900]
    assert [step for step, _ in read_scalars(run)["losses/critic_loss"]] == list(range(100, 901, 100))


@pytest.mark.slow
def test_a_floor_far_below_stops_with_one_line_or_trains(tmp_path):
    flags = dict(env_id="Hopper-v5", ell=-5, total_timesteps=12_000, learning_starts=1_000, eval_frequency=2_000)
    flags |= dict(hidden_dim=64, num_particles=16, diffusion_steps=5, batch_size=64, eval_episodes=1)
    output, code = finish(tmp_path, *words(flags))
    assert "Traceback" not in output
    assert code == 0 or "non-finite" in output.splitlines()[-1]
    scalars = read_scalars(only_run(tmp_path))
    assert all(np.isfinite([value for _, value in series]).all() for series in scalars.values())


@pytest.mark.slow
def test_a_soak_of_200_000_steps_leaks_nothing_and_keeps_its_speed(tmp_path):
    flags = TINY | dict(num_envs=8, total_timesteps=200_000, eval_frequency=20_000, checkpoint_frequency=10_000)
    process = start(tmp_path, *words(flags))
    rows = []
    while process.poll() is None:
        line = process.stdout.readline()
        if "evaluation" in line:
            status = (f"/proc/{process.pid}/status", f"/proc/{process.pid}/fd")
            memory = int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(status[0]).read_text())[1]) / 1024
            rows.append((memory, len(os.listdir(status[1])), time.monotonic()))
    assert process.returncode == 0
    memory, handles, times = (np.array(column) for column in zip(*rows, strict=True))
    speed = 20_000 / np.diff(times)
    print(f"MB {memory.round()}, handles {handles}, steps per second {speed.round()}")
    assert (
        memory[-1] < 1.05 * memory[2] and handles[-1] <= handles[2] + 2 and speed[-3:].mean() > 0.7 * speed[1:4].mean()
    )
