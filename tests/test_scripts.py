"""The scripts as files and as programs: equal outside their own parts, runnable alone, repeatable, clear on errors."""

import ast
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import probe_envs
import pytest
import tyro
from conftest import ROOT
from flax import serialization
from helpers import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MAX_LINES = 560
BANNER = re.compile(r"^# =+ ([A-Z ]+) =+$", re.MULTILINE)
SOURCES = {name: (ROOT / f"gempo_{name}.py").read_text() for name in SCRIPTS}
every_script = pytest.mark.parametrize("name", SCRIPTS)
OWN_FIELDS = {"exp": set(), "linear": set(), "square": set(), "neg": {"ell"}}


def sections(source):
    """Text by section: "" is what comes before the first banner."""
    parts = BANNER.split(source)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def without_docstring(text):
    return text.replace(f'"""{ast.get_docstring(ast.parse(text), clean=False)}"""', "")


def without_fields(text, names):
    return "".join(line for line in text.splitlines(True) if not re.match(rf"    ({'|'.join(names) or '-'}): ", line))


# --------------------------------------------------- the files ---------------------------------------------------
def test_sections_are_in_the_order_of_the_method():
    expected = "ARGUMENTS ENVIRONMENT NETWORKS DIFFUSION REWEIGHTING REPLAY BUFFER LEARNING EVALUATION CHECKPOINTS MAIN"
    for source in SOURCES.values():
        assert " ".join(BANNER.findall(source)) == expected


@every_script
def test_siblings_are_equal_outside_docstring_own_fields_and_reweighting(name):
    ours, linear = sections(SOURCES[name]), sections(SOURCES["linear"])
    assert without_docstring(ours.pop("")) == without_docstring(linear.pop(""))
    assert without_fields(ours.pop("ARGUMENTS"), OWN_FIELDS[name]) == linear.pop("ARGUMENTS")
    if name != "linear":
        assert ours["REWEIGHTING"] != linear["REWEIGHTING"]
    del ours["REWEIGHTING"], linear["REWEIGHTING"]
    assert ours == linear
    names = {field.name for field in fields(SCRIPTS[name].Args)}
    assert names - {field.name for field in fields(SCRIPTS["linear"].Args)} == OWN_FIELDS[name]


@every_script
def test_a_script_is_short_and_its_difference_to_linear_is_too(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= MAX_LINES
    diff = difflib.unified_diff(SOURCES["linear"].splitlines(), lines, n=0, lineterm="")
    assert sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in diff) <= 100


def imported(source):
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@every_script
def test_a_script_imports_nothing_of_this_repository(name):
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not imported(SOURCES[name]) & local


@every_script
def test_inline_metadata_names_what_the_script_imports_as_pyproject_does(name):
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", SOURCES[name], re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub(r"^# ", "", block, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    packages, ours = ({re.match(r"[\w-]+", d)[0] for d in m["dependencies"]} for m in (project, metadata))
    third_party = imported(SOURCES[name]) - set(sys.stdlib_module_names)
    assert ours <= packages
    assert third_party <= ours | {"cloudpickle", "numpy", "orbax"}  # these come with gymnasium, JAX and Flax


def test_importing_a_script_writes_nothing_prints_nothing_and_computes_nothing(tmp_path):
    code = "import gempo_exp, gempo_linear, gempo_neg, gempo_square\n"
    code += "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------- the runs ----------------------------------------------------
TINY = dict(env_id="InvertedPendulum-v5", total_timesteps=120, learning_starts=60, hidden_dim=16, num_particles=2)
TINY |= dict(diffusion_steps=2, batch_size=8, buffer_size=1000, eval_frequency=40, eval_episodes=2, eval_best_of=2)
TINY |= dict(save_model=True)


def command_line(flags):
    """Flags as a user would type them: --env-id InvertedPendulum-v5, --save-model."""
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def read_scalars(folder):
    """{tag: [(step, value)]} of the one run in `folder`."""
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Each script copied into an empty folder and run there with seed 1: {name: (folder, process, output)}."""
    folders, env = {name: tmp_path_factory.mktemp(name) for name in SCRIPTS}, dict(os.environ)
    env.pop("PYTHONPATH", None)
    processes = {}
    for name, folder in folders.items():  # side by side: most of the time is compiling, on one core
        shutil.copy(ROOT / f"gempo_{name}.py", folder)
        command = [sys.executable, f"gempo_{name}.py", *command_line(TINY)]
        processes[name] = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    return {name: (folders[name], processes[name], processes[name].communicate()[0].decode()) for name in SCRIPTS}


@pytest.fixture(scope="session")
def in_process(tmp_path_factory):
    """The same runs by `main` in this process: a function of the script's name and the seed, folder and agent."""
    done = {}

    def run(name, seed):
        if (name, seed) not in done:
            folder = tmp_path_factory.mktemp(f"{name}{seed}")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                done[name, seed] = folder, SCRIPTS[name].main(SCRIPTS[name].Args(seed=seed, **TINY))
        return done[name, seed]

    return run


@every_script
def test_a_script_runs_alone_and_logs_finite_scalars(alone, name):
    folder, process, output = alone[name]
    assert process.returncode == 0, output
    (run,) = (folder / "runs").iterdir()
    assert re.fullmatch(rf"InvertedPendulum-v5__gempo_{name}__1__\d+", run.name)
    scalars = read_scalars(folder)
    losses = ("critic_loss", "actor_loss", "temperature_loss", "q_values")
    charts = ("temperature", "kl", "weights_min", "weights_negative_share", "particles_std", "params_norm")
    for tag in [f"losses/{loss}" for loss in losses] + [f"charts/{chart}" for chart in charts]:
        assert [step for step, _ in scalars[tag]] == [80, 100, 120], tag
    assert [step for step, _ in scalars["charts/SPS"]] == [100, 120]
    for tag in ("eval/episodic_return", "eval/episodic_return_std", "eval/episodic_length"):
        assert [step for step, _ in scalars[tag]] == [80, 120], tag
    assert len(scalars["charts/episodic_return"]) == len(scalars["charts/episodic_length"]) > 2
    assert all(np.isfinite([value for _, value in series]).all() for series in scalars.values())


def timeless(scalars):
    return {tag: series for tag, series in scalars.items() if tag != "charts/SPS"}


def test_a_seed_repeats_a_run_exactly_and_another_seed_does_not(alone, in_process):
    """A program and a call of `main` in another process log the same values, bit for bit."""
    first, same, other = (
        timeless(read_scalars(f)) for f in (alone["neg"][0], in_process("neg", 1)[0], in_process("neg", 2)[0])
    )
    assert first == same
    for tag in ("losses/critic_loss", "losses/actor_loss", "charts/episodic_length", "eval/episodic_return"):
        assert first[tag] != other[tag]


def test_a_saved_model_restores_and_acts_the_same(alone, in_process):
    script, (folder, _), (_, trained) = SCRIPTS["neg"], alone["neg"][:2], in_process("neg", 1)
    (model,) = folder.glob("runs/*/gempo_neg.model")
    agent = script.create_agent(script.Args(**TINY), 4, 1, jax.random.key(99))
    restored = agent.replace(params=serialization.from_bytes(agent.params, model.read_bytes()))
    obs = jax.random.normal(jax.random.key(0), (20, 4))
    untrained, ours, theirs = (script.act(a, obs, jax.random.key(1), 0, 4, 2) for a in (agent, restored, trained))
    np.testing.assert_array_equal(ours, theirs)
    assert (untrained != theirs).any()


@pytest.fixture
def three_probes(tmp_path, monkeypatch):
    """A function of an environment's id: its scalars, and each episode's last step and its environment's number."""

    def run(env_id):
        monkeypatch.chdir(tmp_path)
        first = next(probe_envs.Probe.counter) + 1
        flags = dict(env_id=env_id, num_envs=3, total_timesteps=48, learning_starts=47, eval_frequency=0)
        SCRIPTS["exp"].main(SCRIPTS["exp"].Args(**TINY | flags))
        # Environment i pays its number at each of 4 steps, and steps 3 k + i + 1; there are 16 steps of 3 environments.
        return read_scalars(tmp_path), [(3 * (4 * n + 3) + i + 1, first + i) for n in range(4) for i in range(3)]

    return run


def test_every_episode_of_every_environment_is_logged_at_its_step(three_probes):
    scalars, ends = three_probes("Counting-v0")
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]
    assert scalars["charts/episodic_length"] == [(step, 4) for step, _ in ends]


def test_scalars_of_the_environments_own_are_logged_beside_return_and_length(three_probes):
    scalars, ends = three_probes("OwnCharts-v0")
    assert scalars["charts/number"] == ends
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]
    assert not [tag for tag in scalars if tag.startswith("charts/_")]


def test_evaluation_depends_on_agent_and_seed_alone_and_plays_whole_episodes(in_process):
    script, (_, agent) = SCRIPTS["neg"], in_process("neg", 1)
    args = script.Args(**TINY)
    envs = [script.make_env("InvertedPendulum-v5") for _ in range(3)]
    scores = [script.evaluate(agent, envs, seed, args) for seed in (5, 5, 6)]
    assert scores[0] == scores[1] != scores[2]
    assert scores[0]["eval/episodic_return"] == scores[0]["eval/episodic_length"] - 1 > 1  # 1 a step, 0 for the fall


def test_environments_are_flat_and_their_actions_scaled_to_one():
    env = SCRIPTS["neg"].make_env("InvertedPendulum-v5")  # its own actions are in [-3, 3]
    np.testing.assert_array_equal([env.action_space.low, env.action_space.high], [[-1], [1]])
    played = gym.make("InvertedPendulum-v5")
    env.reset(seed=0), played.reset(seed=0)
    np.testing.assert_allclose(env.step(np.float32([0.5]))[0], played.step(np.float32([1.5]))[0], rtol=1e-6)


# ------------------------------------------------ the command line ------------------------------------------------
@every_script
def test_help_names_and_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    text = re.sub(r"[^\w.-]+", " ", capsys.readouterr().out)  # without the frame and its line breaks
    assert stop.value.code == 0
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", sections(SOURCES[name])["ARGUMENTS"], re.MULTILINE))
    for field in fields(SCRIPTS[name].Args):
        assert f"--{field.name.replace('_', '-')} " in text
        assert comments[field.name].split()[0].strip("`") in text


@every_script
def test_defaults_are_those_of_the_paper(name):
    args = SCRIPTS[name].check_args(SCRIPTS[name].Args())
    assert (args.gamma, args.tau, args.policy_lr, args.q_lr, args.temperature_lr) == (0.99, 0.005, 1e-4, 3e-4, 3e-4)
    assert (args.batch_size, args.num_particles, args.diffusion_steps, args.hidden_dim) == (256, 64, 20, 256)
    assert (args.learning_starts, args.buffer_size, args.total_timesteps) == (5_000, 1_000_000, 1_000_000)
    assert (args.old_policy_interval, args.additive_noise, args.loss_clip, args.updates_per_step) == (1000, 0.2, 5, 1)
    assert (args.eval_frequency, args.eval_episodes, args.eval_best_of) == (10_000, 10, 10)
    assert (args.act_best_of, args.td_best_of, args.reward_scale, args.num_envs) == (1, 1, 1, 1)
    budgets = {"HalfCheetah-v5": 2.0, "Hopper-v5": 2.5, "Ant-v5": 1.5, "Walker2d-v5": 2.0}
    for env_id, budget in budgets.items():
        ours = SCRIPTS[name].check_args(SCRIPTS[name].Args(env_id=env_id)).target_kl
        assert ours == pytest.approx(budget)
    assert SCRIPTS[name].check_args(SCRIPTS[name].Args(target_kl=0.3)).target_kl == 0.3


NAN, INF = float("nan"), float("inf")
COUNTS = ("num_envs", "total_timesteps", "buffer_size", "batch_size", "updates_per_step", "hidden_dim", "num_particles")
COUNTS += ("diffusion_steps", "old_policy_interval", "act_best_of", "td_best_of", "eval_best_of", "eval_episodes")
NATURALS = ("seed", "learning_starts", "eval_frequency", "checkpoint_frequency")
POSITIVES = ("policy_lr", "q_lr", "temperature_lr", "target_kl", "loss_clip", "reward_scale")
BAD = [(flag, value) for flag in COUNTS for value in (0, -1)]
BAD += [(flag, -1) for flag in NATURALS]
BAD += [(flag, value) for flag in POSITIVES for value in (0.0, -1.0, NAN, INF)]
BAD += [(flag, value) for flag in ("gamma", "tau") for value in (-0.1, 1.1, NAN)]
BAD += [("additive_noise", value) for value in (-0.1, NAN, INF)]
BAD += [("ell", value) for value in (0.1, NAN, -INF)]
BAD += [("learning_starts", TINY["total_timesteps"]), ("num_envs", TINY["buffer_size"] + 1), ("target_kl", 0.7)]
BAD += [
    ("env_id", env_id) for env_id in ("NoSuchThing-v0", "no_such_module:Thing-v0", "", "CartPole-v1", "FrozenLake-v1")
]
BAD += [("env_id", "DictObservations-v0"), ("env_id", "UnboundedActions-v0")]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_bad_input_ends_in_one_line_that_names_the_flag_and_writes_nothing(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS["neg"]
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**TINY | {flag: value}))
    message = stop.value.code  # a string: Python prints it on stderr and exits with 1
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith(f"--{flag.replace('_', '-')} ") and str(value) in message
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_tracking_without_wandb_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^--track must be off: wandb is not installed"):
        SCRIPTS["neg"].main(SCRIPTS["neg"].Args(track=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["--gamma", "1.5"], ["--env-id", "NoSuchThing-v0"], ["--batch-size", "many"]], ids=" ".join
)
def test_a_program_with_bad_input_fails_without_a_traceback(tmp_path, words):
    command = [sys.executable, str(ROOT / "gempo_neg.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert words[0] in done.stderr and "Traceback" not in done.stderr
    if words[0] != "--batch-size":  # whose type tyro checks, and answers in a frame
        assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_one_particle_and_two_environments_and_many_updates_learn_finitely(tmp_path, monkeypatch):
    """With one particle all weights are one and the KL budget is zero."""
    monkeypatch.chdir(tmp_path)
    script, flags = SCRIPTS["neg"], dict(env_id="Counting-v0", num_particles=1, num_envs=2, updates_per_step=3)
    flags |= dict(total_timesteps=20, learning_starts=10, eval_frequency=0)
    agent = script.main(script.Args(**TINY | flags))
    assert agent.num_updates == 5 * 2 * 3
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(agent.params))
