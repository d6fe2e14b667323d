"""Interrupted runs: killed at any moment, stopped by signals, NaN or a full disk; resumed exactly."""

import gzip
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import probe_envs
import pytest
from conftest import ROOT
from helpers import SCRIPTS, command_line, only_run, read_scalars
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmark import plot

TINY = dict(env_id="InvertedPendulum-v5", total_timesteps=2400, learning_starts=60, hidden_dim=16)
TINY |= dict(num_particles=2, diffusion_steps=2, batch_size=8, buffer_size=1000)
TINY |= dict(eval_frequency=300, eval_episodes=1, eval_best_of=2, checkpoint_frequency=100)
SCRIPT = SCRIPTS["neg"]


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "gempo_neg.py"), *map(str, arguments)]
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=merged, text=True)


def finish(folder, *arguments):
    process = start(folder, *arguments)
    return process.communicate()[0], process.returncode


def steps_of(run):
    return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit())


def read_checkpoint(run, step=None):
    """As plain Python reads it; by default the newest."""
    path = run / "checkpoints" / str(step or steps_of(run)[-1])
    return pickle.loads(gzip.decompress(path.read_bytes()))


def values_of(run):
    """Scalars without the speed."""
    scalars = read_scalars(run)
    scalars.pop("charts/SPS", None)
    return scalars


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function of the number of environments: the folder of the run that nothing interrupted."""
    done = {}

    def run(num_envs):
        if num_envs not in done:
            folder = tmp_path_factory.mktemp(f"uninterrupted{num_envs}")
            output, code = finish(folder, *command_line(TINY | {"num_envs": num_envs}))
            assert code == 0, output
            done[num_envs] = only_run(folder)
        return done[num_envs]

    return run


# ----------------------------------------------- kills -----------------------------------------------
def wait_for_progress(process, folder):
    """Until the run has gone on from where it was: until it has a new checkpoint, or has ended."""
    while process.poll() is None and not (folder / "runs").exists():
        time.sleep(0.01)
    before = steps_of(only_run(folder))
    while process.poll() is None and steps_of(only_run(folder))[-1:] == before[-1:]:
        time.sleep(0.01)


def kill_and_resume(folder, num_envs, kills, seed):
    """Start a run, kill -9 it `kills` times at random moments, and let it end."""
    rng, killed = random.Random(seed), 0
    process = start(folder, *command_line(TINY | {"num_envs": num_envs}))
    while killed < kills:
        wait_for_progress(process, folder)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        process = start(folder, "--resume", only_run(folder).relative_to(folder))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "cannot be restored" not in output
    return only_run(folder), killed


def assert_same_arrays(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_same_end(run, reference):
    ours, theirs = read_checkpoint(run), read_checkpoint(reference)
    for key in ("step", "leaves", "buffer", "buffer_count", "obs", "transitions"):
        assert_same_arrays(ours[key], theirs[key])
    assert values_of(run) == values_of(reference)


@pytest.mark.parametrize(("num_envs", "kills"), [(1, 2), (4, 1)])
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


def event_steps(path, tag):
    """The steps at which an events file tells a tag, and where it says that a session starts."""
    told, starts = [], []
    for event in EventFileLoader(str(path)).Load():
        if event.session_log.status == event.session_log.START:
            starts.append(event.step)
        told += [event.step for value in event.summary.value if value.tag == tag]
    return told, starts


# ------------------------------------------ short runs, in process ------------------------------------------
@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of 300 steps in the folder of its checkpoints at 200 and 300."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=300, num_envs=2)))
    return only_run(folder)


def test_only_the_last_two_checkpoints_are_kept(short):
    assert sorted(path.name for path in (short / "checkpoints").iterdir()) == ["200", "300"]


def test_a_checkpoint_is_plain_data_with_flags_and_only_the_filled_rows(short):
    content = read_checkpoint(short)
    agent = {"script", "args", "obs_dim", "action_dim", "leaves"}
    rest = {"step", "buffer", "buffer_count", "envs", "obs", "transitions"}
    assert content.keys() == agent | rest
    assert content["script"] == "gempo_neg" and content["step"] == 300
    assert SCRIPT.Args(**content["args"]) == SCRIPT.Args(
        **TINY | dict(total_timesteps=300, num_envs=2)
    )
    assert (content["obs_dim"], content["action_dim"]) == (4, 1)
    assert content["buffer_count"] == 298  # the last step's two rows enter with the next update
    assert [rows.shape for rows in content["buffer"]] == [
        (298, 4),
        (298, 1),
        (298,),
        (298, 4),
        (298,),
    ]
    assert {type(part) for part in (content["leaves"], content["buffer"])} == {list}
    for array in [*content["leaves"], *content["buffer"], *content["transitions"]]:
        assert isinstance(array, np.ndarray | np.generic)
    assert content["obs"].shape == (2, 4) and len(content["transitions"]) == 5


def test_a_full_buffer_is_saved_whole_and_restored_at_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SCRIPT.Args(env_id="ConstantReward-v0", hidden_dim=16, buffer_size=7)
    state = SCRIPT.create_state(args)
    buffer = state.buffer
    for number in range(1, 5):
        rows = jax.tree.map(lambda x, n=number: np.full((3, *x.shape[1:]), n), buffer.storage)
        buffer = SCRIPT.add_transitions(buffer, rows)  # 12 rows in all
    with SCRIPT.RunFolder(args, 0) as run:
        run.save(state._replace(buffer=buffer, step=9))
    restored_args, restored = SCRIPT.load_state(SCRIPT.Args(resume=str(run.path)))
    assert restored.step == 9 and restored_args.resume == str(run.path)
    assert_same_arrays(restored.buffer, buffer)
    assert restored.buffer.storage.rewards.tolist() == [3, 3, 4, 4, 4, 2, 3]
    np.testing.assert_array_equal(restored.obs, state.obs)
    assert restored.transitions is None


def test_a_resumed_run_starts_a_session_where_it_goes_on(tmp_path, short):
    """TensorBoard then drops what the file before says of later steps: each step is told once."""
    run = shutil.copytree(short, tmp_path / "run")
    (run / "checkpoints" / "300").unlink()
    SCRIPT.main(SCRIPT.Args(resume=str(run)))
    files = sorted(run.glob("events*"), key=lambda path: path.stat().st_mtime)
    tag = "losses/critic_loss"
    assert event_steps(files[0], tag) == ([100, 200, 300], [])
    assert event_steps(files[1], tag) == ([300], [201])
    assert values_of(run) == values_of(short)
    for series in values_of(run).values():
        steps = [step for step, _ in series]
        assert len(set(steps)) == len(steps)
    assert_same_end(run, short)


def test_a_finished_run_resumes_to_nothing_and_saves_its_model(tmp_path, short):
    """Also with the flags of the command line, which are the run's own."""
    run = shutil.copytree(short, tmp_path / "run")
    before = values_of(run)
    agent = SCRIPT.main(SCRIPT.Args(resume=str(run)))
    assert steps_of(run) == [200, 300] and values_of(run) == before
    assert_same_arrays(jax.tree.leaves(agent), read_checkpoint(short)["leaves"])


def test_an_extended_run_ends_like_one_that_was_longer_from_the_first(tmp_path, monkeypatch, short):
    monkeypatch.chdir(tmp_path)
    SCRIPT.main(SCRIPT.Args(**TINY | dict(total_timesteps=200, num_envs=2)))
    run = only_run(tmp_path)
    assert steps_of(run)[-1] == 200
    expected = "--extend-to must be at least the run's --total-timesteps, 200, got 100"
    assert refusal(run, extend_to=100) == expected
    SCRIPT.main(SCRIPT.Args(resume=str(run), extend_to=300))
    assert values_of(run) == values_of(short)
    assert_same_end(run, short)
    args, _ = SCRIPT.load_agent(run)
    assert args.total_timesteps == 300 and args.extend_to is None
    series, hyperparameters = plot.read_events(run, "eval/episodic_return")
    assert hyperparameters["total_timesteps"] == "300"
    SCRIPT.main(SCRIPT.Args(resume=str(run)))  # finished: nothing is left to do
    assert values_of(run) == values_of(short)


def test_an_extension_outlives_a_kill_before_the_next_checkpoint(tmp_path, monkeypatch, short):
    run = shutil.copytree(short, tmp_path / "run")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SCRIPT, "train", kill)
        SCRIPT.main(SCRIPT.Args(resume=str(run), extend_to=340))
    assert steps_of(run) == [200, 300]
    SCRIPT.main(SCRIPT.Args(resume=str(run)))
    assert steps_of(run)[-1] == 340
    before = values_of(run)
    SCRIPT.main(SCRIPT.Args(resume=str(run), extend_to=340))  # as a scheduler would say it again
    assert values_of(run) == before


@pytest.mark.parametrize("words", [["--total-timesteps", "1000000"], ["--seed=1"], ["--no-track"]])
def test_beside_resume_a_flag_with_its_default_is_refused_too(monkeypatch, words):
    """It would be ignored without a word; flags of a run are its own."""
    monkeypatch.setattr(sys, "argv", ["gempo_neg.py", "--resume", "runs/x", *words])
    with pytest.raises(SystemExit, match="^--resume must be the only flag but for --extend-to"):
        SCRIPT.parse_args()
    monkeypatch.setattr(sys, "argv", ["gempo_neg.py", "--resume", "runs/x", "--extend-to", "9"])
    assert SCRIPT.parse_args() == SCRIPT.Args(resume="runs/x", extend_to=9)
    monkeypatch.setattr(sys, "argv", ["gempo_neg.py", *words])
    SCRIPT.parse_args()


def test_extend_to_is_for_resumed_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^--extend-to must be left out without --resume, got 9$"):
        SCRIPT.main(SCRIPT.Args(**TINY | dict(extend_to=9)))
    assert not list(tmp_path.iterdir())


def test_the_environments_go_on_where_they_were(tmp_path, monkeypatch):
    """Simulator, random generator, episode statistics and wrappers: the same steps follow."""
    monkeypatch.chdir(tmp_path)
    args = SCRIPT.Args(**TINY | dict(num_envs=2))
    state = SCRIPT.create_state(args)
    actions = [state.envs.action_space.sample() for _ in range(100)]
    for action in actions[:30]:
        obs = state.envs.step(action)[0]
    with SCRIPT.RunFolder(args, 0) as run:
        run.save(state._replace(step=60, obs=np.float32(obs)))
    _, restored = SCRIPT.load_state(SCRIPT.Args(resume=str(run.path)))
    np.testing.assert_array_equal(restored.obs, np.float32(obs))
    num_ended = 0
    for action in actions[30:]:  # over ends of episodes, after which the generator draws
        *ours, our_info = restored.envs.step(action)
        *theirs, their_info = state.envs.step(action)
        assert_same_arrays(ours, theirs)
        if "final_info" in our_info:
            lengths = [info["final_info"]["whole_episode"]["l"] for info in (our_info, their_info)]
            np.testing.assert_array_equal(*lengths)
            num_ended += 1
    assert num_ended > 2
    ours, theirs = (envs.action_space.sample() for envs in (restored.envs, state.envs))
    np.testing.assert_array_equal(ours, theirs)


def test_an_environment_that_pickles_itself_begins_a_new_episode(tmp_path, monkeypatch, capsys):
    """Its attributes alone would hold a connection that is closed by then."""
    monkeypatch.chdir(tmp_path)
    args = SCRIPT.Args(**TINY | dict(env_id="OwnPickling-v0"))
    state = SCRIPT.create_state(args)
    state.envs.step(state.envs.action_space.sample())
    assert SCRIPT.pickle_environments(state.envs) is None
    with SCRIPT.RunFolder(args, 0) as run:
        run.save(state)
    _, restored = SCRIPT.load_state(SCRIPT.Args(resume=str(run.path)))
    (env,), (old_env,) = restored.envs.envs, state.envs.envs
    assert env.unwrapped.steps == 0
    assert env.unwrapped.connection > old_env.unwrapped.connection
    assert "OwnPickling-v0 cannot be restored exactly" in capsys.readouterr().out


def test_an_environment_whose_simulator_is_gone_begins_a_new_episode(tmp_path, monkeypatch, capsys):
    """It is restored without an error, which comes at the first step."""
    monkeypatch.chdir(tmp_path)
    args = SCRIPT.Args(**TINY | dict(env_id="Handle-v0"))
    state = SCRIPT.create_state(args)
    with SCRIPT.RunFolder(args, 0) as run:
        run.save(state)
    resumed = SCRIPT.Args(resume=str(run.path))
    _, restored = SCRIPT.load_state(resumed)  # the same process: as it was
    assert restored.envs.envs[0].unwrapped.number == state.envs.envs[0].unwrapped.number
    probe_envs.Handle.simulators.clear()
    _, restored = SCRIPT.load_state(resumed)
    assert "Handle-v0 cannot be restored exactly" in capsys.readouterr().out
    restored.envs.step(restored.envs.action_space.sample())


def test_an_environment_with_a_reduction_of_its_own_counts_as_one_that_cannot_be_pickled():
    assert SCRIPT.pickle_environments(SCRIPT.make_envs("OwnReduction-v0", 1)) is None
    assert SCRIPT.pickle_environments(SCRIPT.make_envs("Counting-v0", 1)) is not None


# -------------------------------------------------- signals --------------------------------------------------
def test_a_signal_that_is_sent_twice_counts_once_and_a_later_one_ends_the_process(
    tmp_path, monkeypatch
):
    """timeout(1) sends SIGTERM to the process and then to its group."""
    monkeypatch.chdir(tmp_path)
    exits, now = [], [50.0]
    monkeypatch.setattr(SCRIPT.os, "_exit", exits.append)
    with SCRIPT.RunFolder(SCRIPT.Args(), 0) as run:
        monkeypatch.setattr(SCRIPT.time, "monotonic", lambda: now[0])
        for seconds in (50.0, 50.01, 50.9):
            now[0] = seconds
            run.receive_signal(signal.SIGTERM, None)
        assert run.stop_signal == signal.SIGTERM and exits == []
        now[0] = 51.1
        run.receive_signal(signal.SIGTERM, None)
    assert exits == [128 + signal.SIGTERM]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_resumes_exactly(tmp_path, uninterrupted, number, code):
    flags = TINY | dict(num_envs=1, checkpoint_frequency=2300, save_model=True)
    process = start(tmp_path, *command_line(flags))
    while "evaluation" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == code and "Traceback" not in output
    run = only_run(tmp_path)
    (step,) = steps_of(run)
    assert 300 <= step < 2300
    (model,) = run.glob("*.model")
    _, agent = SCRIPT.load_agent(model)
    assert_same_arrays(jax.tree.leaves(agent), read_checkpoint(run)["leaves"])
    output, code = finish(tmp_path, "--resume", run)
    assert code == 0, output
    assert values_of(run) == values_of(uninterrupted(1))


ENDLESS = """
import time
import gymnasium as gym
import numpy as np


class Endless(gym.Env):
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 150:  # more than training makes: this is the evaluation
            print("an evaluation without end", flush=True)
        if self.steps > 150:
            time.sleep(0.1)
        return np.zeros(1, np.float32), 1.0, False, False, {}


gym.register("Endless-v0", Endless, disable_env_checker=True)
"""


def test_a_later_signal_ends_at_once_a_run_that_hangs_without_a_checkpoint(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS.replace("time.sleep(0.1)", "time.sleep(300)"))
    flags = TINY | dict(env_id="endless:Endless-v0", total_timesteps=140, eval_frequency=120)
    flags["checkpoint_frequency"] = 1000
    process = start(tmp_path, *command_line(flags))
    while "without end" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)  # it hangs in the environment now
    for number in (signal.SIGTERM, signal.SIGINT):
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(1.5)
    assert process.wait(timeout=30) == 130 and steps_of(only_run(tmp_path)) == []
    process.stdout.close()


def test_a_signal_ends_an_evaluation_that_does_not_and_the_run_resumes(tmp_path):
    """The environment's module lies in the working directory, and the script elsewhere."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    flags = TINY | dict(env_id="endless:Endless-v0", total_timesteps=140, eval_frequency=120)
    process = start(tmp_path, *command_line(flags))
    while "without end" not in process.stdout.readline():
        assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143 and "Traceback" not in output
    assert time.monotonic() - sent < 10  # 10,000 steps of 0.1 s would take a quarter of an hour
    run = only_run(tmp_path)
    assert steps_of(run) == [100, 120]
    assert not [tag for tag in read_scalars(run) if tag.startswith("eval")]
    output, code = finish(tmp_path, "--resume", run.relative_to(tmp_path))
    assert code == 0 and "cannot be restored" not in output, output
    assert steps_of(run) == [120, 140]


def test_handlers_of_signals_are_given_back_after_a_run(short):
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        assert "RunFolder" not in getattr(handler, "__qualname__", "")


# -------------------------------------------------- refusals -------------------------------------------------
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "^runs cannot be written, or another process is writing it: .*$"
    (tmp_path / "runs").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(SystemExit, match=line):
        SCRIPT.main(SCRIPT.Args(**TINY))
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match=line):
        SCRIPT.main(SCRIPT.Args(**TINY))


def contents(run):
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }


def refusal(run, script=SCRIPT, **flags):
    """The one line with which a run's folder is refused; nothing in it may change."""
    before = contents(run)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(resume=str(run), **flags))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert contents(run) == before
    return stop.value.code


@pytest.mark.parametrize("damage", ("truncated", "flipped", "emptied", "replaced"))
def test_a_damaged_checkpoint_is_refused_and_the_one_before_can_be_used(tmp_path, short, damage):
    run = shutil.copytree(short, tmp_path / "run")
    file = run / "checkpoints" / "300"
    data = bytearray(file.read_bytes())
    flipped = data.copy()
    flipped[len(data) // 2] ^= 1
    other = gzip.compress(pickle.dumps(["something", "else"]))
    damaged = dict(truncated=data[: len(data) // 2], flipped=flipped, emptied=b"", replaced=other)
    file.write_bytes(damaged[damage])
    message = refusal(run)
    assert "checkpoints/300 cannot be used: " in message
    file.unlink()
    agent = SCRIPT.main(SCRIPT.Args(resume=str(run)))  # goes on, and writes 300 anew
    assert steps_of(run) == [200, 300] and agent.num_updates == 300 - 60
    assert values_of(run) == values_of(short)


def test_a_flipped_bit_is_noticed_in_any_place(tmp_path, short):
    data = (short / "checkpoints" / "300").read_bytes()
    file = tmp_path / "300"
    file.write_bytes(data)
    SCRIPT.load_agent(file)
    rng = np.random.default_rng(0)
    for place in rng.integers(100, len(data), size=40):  # behind the header with the file's name
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        with pytest.raises(SystemExit, match=r"^\S+300 cannot be used: "):
            SCRIPT.load_agent(file)


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path):
    file = tmp_path / "100"
    SCRIPT.write_file(file, {"number": 1})
    before = file.read_bytes()
    with pytest.raises(TypeError):
        SCRIPT.write_file(file, {"number": 2, "generator": (n for n in range(3))})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["100"]  # what was half written is gone
    SCRIPT.write_file(file, {"number": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["100"]
    assert pickle.loads(gzip.decompress(file.read_bytes())) == {"number": 3}


def test_a_file_may_be_called_tmp_and_what_a_kill_left_is_removed(tmp_path, short):
    file = tmp_path / "agent.tmp"
    SCRIPT.write_file(file, {"number": 1})
    assert pickle.loads(gzip.decompress(file.read_bytes())) == {"number": 1}
    run = shutil.copytree(short, tmp_path / "run")
    (run / "checkpoints" / "300").unlink()
    (run / "checkpoints" / "250.tmp").write_bytes(b"half")
    SCRIPT.main(SCRIPT.Args(resume=str(run)))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["200", "300"]


def test_other_scripts_sizes_flags_and_missing_folders_are_refused(tmp_path, short, monkeypatch):
    assert "it was written by gempo_neg.py" in refusal(short, SCRIPTS["linear"])
    assert "--resume must be the only flag" in refusal(short, hidden_dim=32)
    nothing = tmp_path / "nothing"
    assert str(nothing) in refusal(nothing) and not nothing.exists()
    nothing.mkdir()
    assert "holds no checkpoint" in refusal(nothing)
    monkeypatch.setattr(SCRIPT, "STATE_DIM", 64)
    assert "sizes" in refusal(short)


def test_a_run_of_a_flag_that_is_gone_is_refused(tmp_path, short):
    run = shutil.copytree(short, tmp_path / "run")
    content = read_checkpoint(run)
    content["args"]["flag_of_another_version"] = 3
    SCRIPT.write_file(run / "checkpoints" / "300", content)
    assert "flag_of_another_version" in refusal(run)


def test_a_folder_that_another_process_writes_is_refused(tmp_path, short):
    run = shutil.copytree(short, tmp_path / "run")
    code = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX)"
    code += "; print(flush=True); input()"
    command = [sys.executable, "-c", code, str(run / "lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        assert "another process is writing it" in refusal(run)
        other.communicate(b"\n")


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    import fcntl

    def no_locks(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    SCRIPT.lock_folder(tmp_path).close()


# --------------------------------------------- environments at fault -----------------------------------------
class Faulty(gym.Env):
    """Goes on for 1000 steps; at step 150 it returns what is not finite."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, what=None, pickles=True):
        self.what = what
        self.handle = None if pickles else (number for number in range(3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.float32([0, 0]), {}

    def step(self, action):
        self.steps += 1
        bad = np.inf if self.steps == 150 else 0
        obs = np.float32([self.np_random.normal(), bad if self.what == "observation" else 0])
        reward = float(bad if self.what == "reward" else action[0])
        return obs, reward, False, self.steps == 1000, {}


for kind in ("observation", "reward", "nothing"):
    gym.register(f"Faulty-{kind}-v0", Faulty, kwargs={"what": kind}, disable_env_checker=True)
gym.register("Unpicklable-v0", Faulty, kwargs={"pickles": False}, disable_env_checker=True)


def assert_stops(folder, monkeypatch, word, at, saved, **flags):
    """A run ends in one line with `word` at step `at`; nothing that it wrote is not finite."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    short_run = TINY | dict(env_id="Faulty-nothing-v0", total_timesteps=400, eval_frequency=0)
    with pytest.raises(SystemExit) as stop:
        SCRIPT.main(SCRIPT.Args(**short_run | flags))
    line = stop.value.code
    assert isinstance(line, str) and "\n" not in line
    pattern = rf"stopped at step {at}: non-finite {word}; last checkpoint: {saved}"
    assert re.fullmatch(pattern, line)
    run = only_run(folder)
    for series in read_scalars(run).values():
        assert np.isfinite([value for _, value in series]).all()
    if steps_of(run):
        assert line.endswith(f"step {steps_of(run)[-1]}")
        assert all(np.isfinite(leaf).all() for leaf in read_checkpoint(run)["leaves"])


@pytest.mark.parametrize("what", ("observation", "reward"))
def test_an_environment_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, what):
    flags = dict(env_id=f"Faulty-{what}-v0")
    assert_stops(tmp_path, monkeypatch, f"{what}s", 150, "step 100", **flags)


def test_actions_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    act = SCRIPT.act

    def bad_act(agent, obs, key, step, training):
        return act(agent, obs, key, step, training) * (np.nan if step >= 140 else 1)

    monkeypatch.setattr(SCRIPT, "act", bad_act)
    assert_stops(tmp_path, monkeypatch, "actions", 141, "step 100")


def test_losses_that_are_not_finite_end_the_run_before_they_are_logged(tmp_path, monkeypatch):
    train_step = SCRIPT.train_step

    def bad_train_step(*inputs):
        agent, buffer, metrics = train_step(*inputs)
        scale = np.where(agent.num_updates >= 80, np.nan, 1.0)
        return (
            agent,
            buffer,
            metrics | {"losses/critic_loss": metrics["losses/critic_loss"] * scale},
        )

    monkeypatch.setattr(SCRIPT, "train_step", bad_train_step)
    assert_stops(tmp_path, monkeypatch, "losses/critic_loss", 200, "step 100")


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """One of them, of which no loss and no action tells; the checkpoint before stays."""
    train_step = SCRIPT.train_step

    def bad_train_step(agent, *inputs):
        agent, buffer, metrics = train_step(agent, *inputs)
        if agent.num_updates == 200 - 60:
            bad_params = agent.params | {"log_lambda": jnp.array(jnp.nan)}
            agent = agent.replace(params=bad_params)
        return agent, buffer, metrics

    monkeypatch.setattr(SCRIPT, "train_step", bad_train_step)
    assert_stops(tmp_path, monkeypatch, "parameters", 200, "step 100", total_timesteps=220)


def test_rates_far_too_high_end_the_run(tmp_path, monkeypatch):
    flags = dict(q_lr=1e30, policy_lr=1e30)
    assert_stops(tmp_path, monkeypatch, "[a-z/_]+", r"\d+", "(none|step 100)", **flags)


def test_what_cannot_be_pickled_starts_a_new_episode_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = dict(env_id="Unpicklable-v0", total_timesteps=200, eval_frequency=0)
    SCRIPT.main(SCRIPT.Args(**TINY | flags))
    run = only_run(tmp_path)
    (run / "checkpoints" / "200").unlink()
    capsys.readouterr()
    SCRIPT.main(SCRIPT.Args(resume=str(run)))
    line = "Unpicklable-v0 cannot be restored exactly: new episodes start"
    assert line in capsys.readouterr().out.splitlines()
    assert steps_of(run) == [100, 200]


# ------------------------------------------------ disk and memory --------------------------------------------
def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint_resumes(
    small_disk, monkeypatch, capsys
):
    monkeypatch.chdir(small_disk)
    evaluate, calls = SCRIPT.evaluate, []

    def fill_then_evaluate(*arguments):
        calls.append(len(calls))
        if len(calls) == 2:  # at step 600
            with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(512))
        return evaluate(*arguments)

    monkeypatch.setattr(SCRIPT, "evaluate", fill_then_evaluate)
    sizes = dict(total_timesteps=900, buffer_size=100)
    try:
        SCRIPT.main(SCRIPT.Args(**TINY | sizes))
    except SystemExit as stop:  # not by pytest.raises, which would hold the frame, and so the lock
        line = stop.code
    assert re.fullmatch(r"stopped at step [6-9]00: .*No space left.*checkpoint: step \d00", line)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    (small_disk / "other").unlink()
    run = only_run(small_disk)
    output, code = finish(small_disk, "--resume", run)
    assert code == 0, output
    assert steps_of(run) == [800, 900]
    told = [step for step, _ in read_scalars(run)["losses/critic_loss"]]
    assert told == list(range(100, 901, 100))


# ------------------------------------------------- longer proofs ---------------------------------------------
@pytest.mark.slow
def test_a_floor_far_below_stops_with_one_line_or_trains(tmp_path):
    flags = dict(env_id="Hopper-v5", ell=-5, total_timesteps=12_000, learning_starts=1_000)
    flags |= dict(hidden_dim=64, num_particles=16, diffusion_steps=5, batch_size=64)
    flags |= dict(eval_frequency=2_000, eval_episodes=1)
    output, code = finish(tmp_path, *command_line(flags))
    assert "Traceback" not in output
    assert code == 0 or "non-finite" in output.splitlines()[-1]
    for series in read_scalars(only_run(tmp_path)).values():
        assert np.isfinite([value for _, value in series]).all()


@pytest.mark.slow
def test_a_soak_of_200_000_steps_leaks_nothing_and_keeps_its_speed(tmp_path):
    flags = TINY | dict(num_envs=8, total_timesteps=200_000, eval_frequency=20_000)
    process = start(tmp_path, *command_line(flags | {"checkpoint_frequency": 10_000}))
    of_process = pathlib.Path(f"/proc/{process.pid}")
    memory, handles, times, steps = [], [], [], []
    while line := process.stdout.readline():
        evaluated = re.match(r"step ([\d,]+) .* evaluation ", line)
        if evaluated and int(evaluated[1].replace(",", "")) % 20_000 == 0:
            status = (of_process / "status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
            handles.append(len(os.listdir(of_process / "fd")))
            times.append(time.monotonic())
            steps.append(int(evaluated[1].replace(",", "")))
    assert process.wait() == 0 and len(set(steps)) >= 9
    speed = np.diff(steps) / np.diff(times)
    print(f"MB {np.round(memory)}, handles {handles}, steps per second {np.round(speed)}")
    assert memory[-1] < 1.05 * memory[2] and handles[-1] <= handles[2] + 2
    assert np.mean(speed[-3:]) > 0.7 * np.mean(speed[1:4])
