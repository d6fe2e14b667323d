"""The scripts as files, programs and modules: equal outside their own parts, repeatable, clear."""

import ast
import difflib
import importlib.machinery
import importlib.util
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
import tokenize
import tomllib
import types
from dataclasses import asdict, fields, replace

import gymnasium as gym
import helpers
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import probe_envs
import pytest
import tyro
from conftest import ROOT
from helpers import SCRIPTS, command_line, only_run, read_scalars
from tensorboard.summary.writer import event_file_writer

GEMPO = SCRIPTS["neg"]  # where one script stands for all
BANNER = re.compile(r"^# =+ ([A-Z ]+) =+$", re.MULTILINE)
SECTIONS = ["ARGUMENTS", "ENVIRONMENT", "NETWORKS", "DIFFUSION", "REWEIGHTING", "REPLAY BUFFER"]
SECTIONS += ["LEARNING", "EVALUATION", "TRAINING", "RUN FOLDER"]
# What differs between a script and gempo_linear.py, beside docstring and exp_name: sections, and
# the lines of ARGUMENTS that speak of flags of its own. A new sibling is one more row.
OWN_SECTIONS = {
    "gempo_exp.py": {"REWEIGHTING"},
    "gempo_square.py": {"REWEIGHTING"},
    "gempo_neg.py": {"REWEIGHTING"},
}
OWN_FLAGS = {"gempo_neg.py": {"ell"}}

every_script = pytest.mark.parametrize("name", SCRIPTS)
every_file = pytest.mark.parametrize("path", ["gempo_linear.py", *OWN_SECTIONS])


def read(path):
    return (ROOT / path).read_text()


def sections(path):
    """Text by section: "" is what comes before the first banner."""
    parts = BANNER.split(read(path))
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def without_docstring(text):
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    return text.replace(f'"""{docstring}"""', "")


def without_flags(text, flags):
    """ARGUMENTS without the default of exp_name and the lines of some flags."""
    text = re.sub(r'(    exp_name: str = )"\w+"', r"\1", text)
    for flag in flags:
        text = re.sub(rf'^    ({flag}: |require\(args, "{flag}").*\n', "", text, flags=re.MULTILINE)
    return text


# ------------------------------------------------- the files -------------------------------------------------
@every_file
def test_sections_are_in_the_order_of_the_method(path):
    assert BANNER.findall(read(path)) == SECTIONS


@pytest.mark.parametrize("path", OWN_SECTIONS)
def test_siblings_are_equal_outside_their_own_parts(path):
    ours, linear = sections(path), sections("gempo_linear.py")
    flags = OWN_FLAGS.get(path, set())
    assert without_docstring(ours.pop("")) == without_docstring(linear.pop(""))
    expected = without_flags(linear.pop("ARGUMENTS"), set())
    assert without_flags(ours.pop("ARGUMENTS"), flags) == expected
    assert {section for section in ours if ours[section] != linear[section]} == OWN_SECTIONS[path]


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"linear"}))
def test_flags_and_defaults_of_siblings_are_equal_outside_their_own(name):
    ours, linear = (asdict(SCRIPTS[key].Args()) for key in (name, "linear"))
    assert ours.pop("exp_name") == f"gempo_{name}"
    assert linear.pop("exp_name") == "gempo_linear"
    own = {flag: ours.pop(flag) for flag in OWN_FLAGS.get(f"gempo_{name}.py", ())}
    assert own == ({"ell": -0.1} if name == "neg" else {})
    assert ours == linear


@pytest.mark.parametrize("path", OWN_SECTIONS)
def test_the_difference_to_linear_fits_on_two_screens(path):
    lines = [read(file).splitlines() for file in ("gempo_linear.py", path)]
    diff = list(difflib.unified_diff(*lines, n=0, lineterm=""))[2:]
    assert sum(line[0] in "+-" for line in diff) <= 100


def code_lengths(source):
    """Characters of each line of code, with its indentation; no docstring, comment or blank."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    in_docstring = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            docstring = node.body[0]
            in_docstring |= set(range(docstring.lineno, docstring.end_lineno + 1))
    comment_at = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment_at[token.start[0]] = token.start[1]
    lengths = []
    for number, line in enumerate(source.splitlines(), start=1):
        code = line[: comment_at.get(number)].rstrip()
        if code and number not in in_docstring:
            lengths.append(len(code))
    return lengths


def test_lengths_of_code_lines_are_counted_as_they_should_be():
    source = 'x = "#"  # y\n\n\ndef f():\n    """Long,\n\n    long."""\n    # z\n    return 1\n'
    assert code_lengths(source) == [len('x = "#"'), len("def f():"), len("    return 1")]


@every_file
def test_a_line_of_code_has_52_characters_at_most_on_average(path):
    assert np.mean(code_lengths(read(path))) <= 52


@every_file
def test_a_walrus_stands_in_a_condition_only(path):
    tree = ast.parse(read(path))
    conditions = [n.test for n in ast.walk(tree) if isinstance(n, (ast.If, ast.While))]
    allowed = {id(part) for condition in conditions for part in ast.walk(condition)}
    walruses = [n for n in ast.walk(tree) if isinstance(n, ast.NamedExpr)]
    assert not [walrus.lineno for walrus in walruses if id(walrus) not in allowed]


@every_file
def test_functions_are_short(path):
    functions = [n for n in ast.walk(ast.parse(read(path))) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        limit = 60 if function.name == "train" else 40
        assert function.end_lineno - function.lineno + 1 < limit, function.name


def imported(source):
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@every_file
def test_a_script_imports_nothing_of_this_repository(path):
    local = {file.stem for file in ROOT.iterdir() if file.suffix == ".py" or file.is_dir()}
    assert not imported(read(path)) & local


def package_names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


@every_file
def test_inline_metadata_names_what_the_script_imports_as_pyproject_does(path):
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", read(path), re.MULTILINE)[1]
    metadata = tomllib.loads(re.sub(r"^# ", "", block, flags=re.MULTILINE))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert metadata["requires-python"] == project["requires-python"]
    ours = package_names(metadata["dependencies"])
    assert ours <= package_names(project["dependencies"])
    optional = {"wandb"}  # imported where --track asks for it
    come_along = {"cloudpickle", "numpy"}  # with gymnasium and with JAX
    third_party = imported(read(path)) - set(sys.stdlib_module_names) - optional
    assert third_party <= ours | come_along


def run_python(code, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_importing_a_script_writes_nothing_prints_nothing_and_computes_nothing(tmp_path):
    code = "import gempo_exp, gempo_linear, gempo_neg, gempo_square\n"
    code += "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


PASTED = """
import pathlib, sys
import jax  # whose own lock would warn
sys.modules["fcntl"] = None  # as on Windows: importing it fails
cell = {"__name__": "notebook"}
exec(pathlib.Path("SCRIPT").read_text(), cell)
sizes = dict(hidden_dim=16, num_particles=4, diffusion_steps=2, batch_size=8)
agent = cell["create_agent"](cell["Args"](**sizes), 3, 2, jax.random.key(0))
print(cell["act"](agent, jax.numpy.ones((1, 3)), jax.random.key(0), 0, training=True).shape)
cell["lock_folder"](pathlib.Path(".")).close()
"""


def test_a_script_can_be_pasted_into_a_notebook_also_without_fcntl(tmp_path):
    done = run_python(PASTED.replace("SCRIPT", str(ROOT / "gempo_neg.py")), tmp_path)
    assert (done.stdout, done.stderr) == ("(1, 2)\n", "")


# ------------------------------------------------- the runs --------------------------------------------------
TINY = dict(env_id="InvertedPendulum-v5", total_timesteps=220, learning_starts=60, hidden_dim=16)
TINY |= dict(num_particles=2, diffusion_steps=2, batch_size=8, buffer_size=1000, save_model=True)
TINY |= dict(eval_frequency=40, eval_episodes=2, eval_best_of=2)


class Program(threading.Thread):
    """A script copied into an empty folder and run there, piped or on a terminal."""

    def __init__(self, name, folder, on_terminal):
        super().__init__()
        self.folder, self.on_terminal, self.output = folder, on_terminal, b""
        shutil.copy(ROOT / f"gempo_{name}.py", folder)
        self.command = [sys.executable, f"gempo_{name}.py", *command_line(TINY)]
        self.start()

    def run(self):
        environment = dict(os.environ)
        environment.pop("PYTHONPATH", None)
        ours, theirs = pty.openpty() if self.on_terminal else os.pipe()
        if self.on_terminal:
            termios.tcsetwinsize(theirs, (24, 120))
        process = subprocess.Popen(
            self.command, cwd=self.folder, env=environment, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        try:
            while part := os.read(ours, 4096):
                self.output += part
        except OSError:  # a terminal's end
            pass
        os.close(ours)
        self.returncode = process.wait()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Each script run alone with seed 1: {name: (folder, exit code, output)}; exp on a terminal."""
    programs = {}
    for name in SCRIPTS:  # side by side: most of the time is compiling, on one core
        programs[name] = Program(name, tmp_path_factory.mktemp(name), name == "exp")
    done = {}
    for name, program in programs.items():
        program.join()
        done[name] = program.folder, program.returncode, program.output.decode()
    return done


@pytest.fixture(scope="session")
def in_process(tmp_path_factory):
    """The same runs by `main` here: a function of the script and the seed to (folder, agent)."""
    done = {}

    def run(name, seed):
        if (name, seed) not in done:
            folder = tmp_path_factory.mktemp(f"{name}{seed}")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                agent = SCRIPTS[name].main(SCRIPTS[name].Args(seed=seed, **TINY))
            done[name, seed] = folder, agent
        return done[name, seed]

    return run


@every_script
def test_a_script_runs_alone_and_logs_finite_scalars(alone, name):
    folder, code, output = alone[name]
    assert code == 0, output
    run = only_run(folder)
    assert re.fullmatch(rf"InvertedPendulum-v5__gempo_{name}__1__\d+", run.name)
    scalars = read_scalars(run)
    losses = ["critic_loss", "actor_loss", "temperature_loss", "q_values"]
    charts = ["temperature", "kl", "weights_min", "weights_negative_share", "particles_std"]
    tags = [f"losses/{loss}" for loss in losses] + [f"charts/{chart}" for chart in charts]
    for tag in [*tags, "charts/params_norm", "charts/SPS"]:
        assert [step for step, _ in scalars[tag]] == [100, 200], tag
    for tag in ("episodic_return", "episodic_return_std", "episodic_length"):
        assert [step for step, _ in scalars[f"eval/{tag}"]] == [80, 120, 160, 200], tag
    episodes = scalars["charts/episodic_return"]
    assert len(episodes) == len(scalars["charts/episodic_length"]) > 2
    assert all(np.isfinite([value for _, value in series]).all() for series in scalars.values())


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"exp"}))
def test_a_piped_run_prints_lines_of_its_own_and_no_other(alone, name):
    folder, _, output = alone[name]
    first, *others = output.splitlines()
    path = only_run(folder).relative_to(folder)
    assert re.fullmatch(rf"InvertedPendulum-v5 on .+: tensorboard --logdir {path}", first)
    scores = r"(, return [\d.]+)?(, evaluation [\d.]+)?"  # not yet, where a busy machine takes 30 s
    progress = rf"step (\d+) of 220{scores}(, \S+ steps/s, [\d:]+ left)?"
    shown = [re.fullmatch(progress, line) for line in others]
    assert all(shown), output
    assert {80, 120, 160, 200} <= {int(line[1]) for line in shown if line[2] and line[3]}


def test_a_run_on_a_terminal_shows_a_bar_with_the_same(alone):
    _, _, output = alone["exp"]
    last = output.strip().splitlines()[-1].split("\r")[-1]
    assert "220/220" in last and "step/s" in last
    assert re.search(r"evaluation=[\d.]+", last) and re.search(r"return=[\d.]+", last)
    assert "steps/s" not in output  # the lines of a run without a terminal


def timeless(scalars):
    return {tag: series for tag, series in scalars.items() if tag != "charts/SPS"}


def test_a_seed_repeats_a_run_exactly_and_another_seed_does_not(alone, in_process):
    """A program and a call of `main` in another process log the same values, bit for bit."""
    folders = alone["neg"][0], in_process("neg", 1)[0], in_process("neg", 2)[0]
    first, same, other = (timeless(read_scalars(only_run(folder))) for folder in folders)
    assert first == same
    for tag in ("losses/critic_loss", "losses/actor_loss", "charts/episodic_length"):
        assert first[tag] != other[tag]


def test_the_flags_are_logged_with_the_values_that_learning_uses(in_process):
    events = helpers.read_events(only_run(in_process("neg", 1)[0]))
    (event,) = events.Tensors("hyperparameters")
    table = event.tensor_proto.string_val[0].decode()
    assert "|env_id|InvertedPendulum-v5|" in table and "|ell|-0.1|" in table
    assert "|script|gempo_neg|" in table
    kappa = float(re.search(r"\|target_kl\|(.*)\|", table)[1])
    assert kappa == pytest.approx(2 * np.log(2) / np.log(64))


def learn_a_little(agent):
    """Three updates on fixed transitions."""
    buffer = GEMPO.create_buffer(30, 4, 1)
    buffer = GEMPO.add_transitions(buffer, helpers.make_batch(30, 4, 1))
    return GEMPO.learn(jax.tree.map(jnp.copy, agent), buffer, jax.random.key(3), 3)


def test_a_saved_model_of_another_process_acts_and_learns_on_exactly(alone, in_process):
    _, trained = in_process("neg", 1)
    (model,) = alone["neg"][0].glob("runs/*/gempo_neg.model")
    args, restored = GEMPO.load_agent(model)
    assert args == GEMPO.Args(**TINY) and restored.args == trained.args
    assert restored.args.diffusion_steps == 2 and restored.num_updates == 160
    untrained = GEMPO.create_agent(args, 4, 1, jax.random.key(99))
    obs = jax.random.normal(jax.random.key(0), (20, 4))
    for training in (True, False):
        agents = untrained, restored, trained
        actions = [GEMPO.act(agent, obs, jax.random.key(1), 0, training) for agent in agents]
        np.testing.assert_array_equal(actions[1], actions[2])
        assert (actions[0] != actions[2]).any()
    ours, theirs = learn_a_little(restored), learn_a_little(trained)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_runs_folder_gives_its_newest_checkpoint_or_else_its_model(in_process, tmp_path):
    folder, trained = in_process("neg", 1)
    run = shutil.copytree(only_run(folder), tmp_path / "run")
    _, from_checkpoint = GEMPO.load_agent(run)
    shutil.rmtree(run / "checkpoints")
    _, from_model = GEMPO.load_agent(run)
    for agent in (from_checkpoint, from_model):
        jax.tree.map(np.testing.assert_array_equal, agent, trained)
    with pytest.raises(SystemExit, match="--resume .* must hold a checkpoint"):
        GEMPO.main(GEMPO.Args(resume=str(run)))
    (run / "gempo_neg.model").unlink()
    with pytest.raises(SystemExit, match="holds no checkpoint and no saved model"):
        GEMPO.load_agent(run)


# --------------------------------------------- episodes and charts -------------------------------------------
@pytest.fixture
def three_probes(tmp_path, monkeypatch):
    """A function of an environment's id: scalars, and each episode's last step and its number."""

    def run(env_id):
        monkeypatch.chdir(tmp_path)
        first = next(probe_envs.Probe.counter) + 1
        flags = dict(env_id=env_id, num_envs=3, total_timesteps=48, learning_starts=47)
        SCRIPTS["exp"].main(SCRIPTS["exp"].Args(**TINY | flags | {"eval_frequency": 0}))
        # Environment i pays its number at each of 4 steps, and steps 3 k + i + 1; there are 16
        # steps of 3 environments.
        ends = [(3 * (4 * n + 3) + i + 1, first + i) for n in range(4) for i in range(3)]
        return read_scalars(only_run(tmp_path)), ends

    return run


def test_every_episode_of_every_environment_is_logged_at_its_step(three_probes):
    scalars, ends = three_probes("Counting-v0")
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]
    assert scalars["charts/episodic_length"] == [(step, 4) for step, _ in ends]


def test_scalars_of_the_environments_own_are_logged_beside_return_and_length(three_probes):
    scalars, ends = three_probes("OwnCharts-v0")
    assert scalars["charts/number"] == [(step, number) for step, number in ends if number % 2]
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]
    assert not [tag for tag in scalars if tag.startswith("charts/_")]


def test_infos_of_unequal_shapes_and_types_do_no_harm(three_probes):
    """gymnasium would put them into arrays of the first one's shape and type."""
    scalars, ends = three_probes("UnevenInfo-v0")
    assert scalars["charts/half"] == [(step, number / 2) for step, number in ends]
    assert scalars["charts/next_half"] == [(step, (number + 1) / 2) for step, number in ends]
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]


def test_seeds_of_episodes_repeat_and_runs_of_neighbouring_seeds_share_none():
    """In two runs with equal seeds of episodes the errors over seeds would be too small."""
    script = SCRIPTS["exp"]
    seeds = [script.episode_seeds(seed, 10) for seed in (*range(100), 2**32 - 1, 10**12)]
    assert seeds == [script.episode_seeds(seed, 10) for seed in (*range(100), 2**32 - 1, 10**12)]
    every = [seed for episodes in seeds for seed in episodes]
    assert len(set(every)) == len(every) == 1020
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in every)


def test_an_environment_with_statistics_of_its_own_is_counted_by_ours(three_probes):
    scalars, ends = three_probes("OwnStatistics-v0")
    assert scalars["charts/episodic_return"] == [(step, 4 * number) for step, number in ends]


# ------------------------------------------------- evaluation ------------------------------------------------
class Scripted:
    """An episode of given rewards, which records how it is reset."""

    def __init__(self, rewards, truncates=False):
        self.rewards, self.truncates, self.seeds = rewards, truncates, []

    def reset(self, *, seed=None):
        self.seeds.append(seed)
        self.step_number = 0
        return np.zeros(3), {}

    def step(self, action):
        assert action.shape == (2,)
        reward = self.rewards[self.step_number]
        self.step_number += 1
        ends = self.step_number == len(self.rewards)
        return np.zeros(3), reward, ends and not self.truncates, ends and self.truncates, {}


def test_evaluation_plays_whole_episodes_from_seeds_of_their_own():
    envs = [Scripted([1.0, 2.0]), Scripted([5.0, 0.0, 4.0], truncates=True)]
    agent = helpers.create_agent("neg", **{k: TINY[k] for k in ("diffusion_steps", "eval_best_of")})
    scores = GEMPO.evaluate(agent, envs, 5)
    assert [env.seeds for env in envs] == [[seed] for seed in GEMPO.episode_seeds(5, 2)]
    assert scores["eval/episodic_return"] == 6  # (3 + 9) / 2
    assert scores["eval/episodic_return_std"] == 3
    assert scores["eval/episodic_length"] == 2.5


def test_seeds_of_a_late_evaluation_stay_below_those_that_dm_control_refuses(monkeypatch):
    """Such environments give theirs to numpy's RandomState, which takes 32 bits."""
    monkeypatch.setattr(GEMPO, "act", lambda *inputs, training: np.zeros((2, 2)))
    envs = [Scripted([1.0]), Scripted([1.0])]
    seeds = [GEMPO.EVAL_SEED_STRIDE * 1_000_000, 2**32 - 1]
    for seed in seeds:
        GEMPO.evaluate(None, envs, seed)
    expected = [GEMPO.episode_seeds(seed, 2) for seed in seeds]
    assert [list(pair) for pair in zip(*(env.seeds for env in envs), strict=True)] == expected
    assert max(map(max, expected)) < 2**32


def test_evaluation_acts_outside_of_training_with_new_noise_at_each_step(monkeypatch):
    calls = []

    def record(agent, obs, key, step, training):
        calls.append((tuple(jax.random.key_data(key).tolist()), step, training))
        return np.zeros((1, 2))

    monkeypatch.setattr(GEMPO, "act", record)
    for seed in (5, 6):
        GEMPO.evaluate(None, [Scripted([0.0] * 3)], seed)
    assert [call[1:] for call in calls] == 2 * [(0, False), (1, False), (2, False)]
    keys = [call[0] for call in calls]
    assert len(set(keys[:3])) == len(set(keys[3:])) == 1 and keys[0] != keys[3]


def test_evaluation_depends_on_agent_and_seed_alone(in_process):
    agent = in_process("neg", 1)[1]
    envs = [GEMPO.make_env("InvertedPendulum-v5") for _ in range(3)]
    scores = [GEMPO.evaluate(agent, envs, seed) for seed in (5, 5, 6)]
    assert scores[0] == scores[1] != scores[2]
    # The reward is 1 a step, and 0 for the fall.
    length = scores[0]["eval/episodic_length"]
    assert length > 2
    assert scores[0]["eval/episodic_return"] == pytest.approx(length - 1)


def test_every_evaluation_of_a_run_and_every_run_has_seeds_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = []

    def record(agent, envs, seed, run):
        assert len(envs) == TINY["eval_episodes"]
        seeds.append(seed)
        return {}

    monkeypatch.setattr(GEMPO, "evaluate", record)
    flags = TINY | dict(env_id="ConstantReward-v0", save_model=False)
    for run_seed in (1, 2):
        GEMPO.main(GEMPO.Args(seed=run_seed, **flags))
    assert len(seeds) == len(set(seeds)) == 8


def test_an_endless_episode_is_cut_and_counts_as_far_as_it_went(monkeypatch):
    assert GEMPO.MAX_EVAL_STEPS == 10_000  # ten times gymnasium's usual limit
    monkeypatch.setattr(GEMPO, "MAX_EVAL_STEPS", 7)
    monkeypatch.setattr(GEMPO, "act", lambda *_, **__: np.zeros((2, 2)))
    envs = [Scripted([1.0] * 99), Scripted([1.0] * 3)]
    scores = GEMPO.evaluate(None, envs, 0)
    assert scores["eval/episodic_length"] == scores["eval/episodic_return"] == (7 + 3) / 2


def test_a_signal_ends_an_evaluation_without_scores(monkeypatch):
    monkeypatch.setattr(GEMPO, "act", lambda *_, **__: np.zeros((1, 2)))
    env = Scripted([1.0] * 3)
    assert GEMPO.evaluate(None, [env], 0, types.SimpleNamespace(stop_signal=15)) == {}
    assert env.step_number == 0
    assert GEMPO.evaluate(None, [env], 0, types.SimpleNamespace(stop_signal=0)) != {}


# ------------------------------------------------ environments -----------------------------------------------
def test_actions_are_scaled_to_one():
    env = GEMPO.make_env("InvertedPendulum-v5")  # its own actions are in [-3, 3]
    np.testing.assert_array_equal([env.action_space.low, env.action_space.high], [[-1], [1]])
    played = gym.make("InvertedPendulum-v5")
    env.reset(seed=0)
    played.reset(seed=0)
    ours, expected = env.step(np.float32([0.5]))[0], played.step(np.float32([1.5]))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_scaled_actions_stay_within_the_bounds():
    env = GEMPO.make_env("RefusesOtherActions-v0")
    for action in (-1.0, 0.3, 1.0):
        env.reset(seed=0)
        env.step(np.float32([action]))


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("MatrixObservations", [0, 1, 2, 3, 4, 5]),
        ("DictObservations", [1, 2, 0.5]),
        ("TupleObservations", [1, 2, 0.5]),
    ],
)
def test_observations_of_any_shape_are_flattened(probe, expected):
    env = GEMPO.make_env(f"{probe}-v0")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, expected)
    assert env.observation_space.shape == obs.shape == (len(expected),)
    envs = GEMPO.make_envs(f"{probe}-v0", 2)
    assert envs.reset(seed=0)[0].shape == (2, len(expected))


def test_an_environment_whose_constructor_knows_no_render_mode_is_made():
    assert GEMPO.make_env("ConstantReward-v0").render_mode is None


def test_video_of_what_cannot_be_drawn_is_refused_in_one_line_that_names_the_flag(tmp_path):
    with pytest.raises(SystemExit) as stop:
        GEMPO.make_env("ConstantReward-v0", tmp_path)
    message = stop.value.code
    assert message.startswith("--capture-video with --env-id ConstantReward-v0 fails: ")
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_a_video_without_evaluations_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict(capture_video=True, eval_frequency=0)
    with pytest.raises(SystemExit, match="^--capture-video must be off: no evaluations"):
        GEMPO.main(GEMPO.Args(**TINY | flags))
    assert not list(tmp_path.iterdir())


def test_a_video_without_moviepy_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^--capture-video must be off: moviepy is not installed"):
        GEMPO.main(GEMPO.Args(**TINY | dict(capture_video=True)))
    assert not list(tmp_path.iterdir())


class Recorder(gym.Wrapper):
    """Stands for gymnasium's RecordVideo, which keeps an episode's frames until it is stopped."""

    films = []  # of a test: the lengths
    error = None
    is_broken = False  # as RecordVideo is where a frame is no array

    def reset(self, **options):
        self.length = 0
        self.recording = not self.is_broken
        return self.env.reset(**options)

    def step(self, action):
        self.length += 1
        return self.env.step(action)

    def stop_recording(self):
        if self.error:
            raise self.error
        assert self.recording
        self.recording = False
        self.films.append(self.length)


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moviepy = types.ModuleType("moviepy")  # as if it were installed
    moviepy.__spec__ = importlib.machinery.ModuleSpec("moviepy", None)
    monkeypatch.setitem(sys.modules, "moviepy", moviepy)
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, *_, **__: Recorder(env))
    monkeypatch.setattr(gym, "make", lambda env_id, **_: probe_envs.Counting())
    monkeypatch.setattr(probe_envs.Counting, "render", lambda self: None)
    monkeypatch.setattr(Recorder, "films", [])
    return Recorder


def test_a_film_is_written_at_the_end_of_its_evaluation(recorder):
    GEMPO.main(GEMPO.Args(**TINY | dict(capture_video=True)))
    assert recorder.films == 4 * [4]  # an episode of 4 steps of each of the 4 evaluations


def test_a_recorder_that_has_given_up_does_not_end_the_run(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "is_broken", True)
    GEMPO.main(GEMPO.Args(**TINY | dict(capture_video=True)))
    assert recorder.films == []


def test_a_film_that_fills_the_disk_ends_the_run_in_one_line(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "error", OSError("No space\nleft"))
    with pytest.raises(SystemExit, match="^stopped at step .*: No space left; last checkpoint:"):
        GEMPO.main(GEMPO.Args(**TINY | dict(capture_video=True)))


def test_a_first_observation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^stopped at step 0: non-finite observations"):
        GEMPO.main(GEMPO.Args(**TINY | dict(env_id="StartsWithNaN-v0")))


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GEMPO.time, "time", lambda: 1000.5)
    paths = [GEMPO.create_folder("neg__1") for _ in range(3)]
    assert [str(path) for path in paths] == [
        f"runs/neg__1__{second}" for second in (1000, 1001, 1002)
    ]


def test_mujoco_draws_offscreen_for_a_video_where_there_is_no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    GEMPO.choose_renderer(GEMPO.Args())
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("DISPLAY", ":0")
    GEMPO.choose_renderer(GEMPO.Args(capture_video=True))
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    GEMPO.choose_renderer(GEMPO.Args(capture_video=True))
    assert os.environ["MUJOCO_GL"] == "osmesa"  # the user's choice
    monkeypatch.delenv("MUJOCO_GL")
    GEMPO.choose_renderer(GEMPO.Args(capture_video=True))
    assert os.environ["MUJOCO_GL"] == "egl"


OWN_MODULE = """
import gymnasium, probe_envs
gymnasium.register("Own-v0", probe_envs.ConstantReward, disable_env_checker=True)
"""


def test_an_environments_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "module_of_the_user.py").write_text(OWN_MODULE)
    env = GEMPO.make_env("module_of_the_user:Own-v0")
    assert env.reset(seed=0)[0].shape == (1,)


# ------------------------------------------------ command line -----------------------------------------------
def words_of(text):
    return re.sub(r"[^\w.-]+", " ", text)  # without a frame and its line breaks


@every_script
def test_help_names_and_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    text = words_of(capsys.readouterr().out)
    assert stop.value.code == 0
    arguments = sections(f"gempo_{name}.py")["ARGUMENTS"]
    for field in fields(SCRIPTS[name].Args):
        comment = re.search(rf"^    {field.name}: [^#]*# (.*)$", arguments, re.MULTILINE)[1]
        first_words = words_of(comment).split()[:4]
        assert f"--{field.name.replace('_', '-')} " in text
        assert " ".join(first_words) in text, field.name


@every_script
def test_defaults_are_those_of_the_paper(name):
    script = SCRIPTS[name]
    args = script.Args()
    rates = args.policy_lr, args.q_lr, args.temperature_lr
    assert (args.gamma, args.tau, *rates) == (0.99, 0.005, 1e-4, 3e-4, 3e-4)
    sizes = args.batch_size, args.num_particles, args.diffusion_steps, args.hidden_dim
    assert sizes == (256, 64, 20, 256)
    steps = args.learning_starts, args.buffer_size, args.total_timesteps
    assert steps == (5_000, 1_000_000, 1_000_000)
    assert (args.old_policy_interval, args.updates_per_step, args.num_envs) == (1000, 1, 1)
    assert (args.additive_noise, args.loss_clip, args.reward_scale) == (0.2, 5, 1)
    assert (args.eval_frequency, args.eval_episodes, args.eval_best_of) == (10_000, 10, 10)
    assert (args.act_best_of, args.td_best_of) == (1, 1)
    budgets = {"HalfCheetah-v5": 2.0, "Hopper-v5": 2.5, "Ant-v5": 1.5, "Walker2d-v5": 2.0}
    for env_id, budget in budgets.items():
        learning = script.learning_part(script.Args(env_id=env_id))
        assert learning.target_kl == pytest.approx(budget)
    assert script.learning_part(script.Args(target_kl=0.3)).target_kl == 0.3


NAN, INF = float("nan"), float("inf")
COUNTS = ["num_envs", "total_timesteps", "buffer_size", "batch_size", "updates_per_step"]
COUNTS += ["hidden_dim", "num_particles", "diffusion_steps", "old_policy_interval"]
COUNTS += ["act_best_of", "td_best_of", "eval_best_of", "eval_episodes"]
NATURALS = ["seed", "learning_starts", "eval_frequency", "checkpoint_frequency"]
POSITIVES = ["policy_lr", "q_lr", "temperature_lr", "target_kl", "loss_clip", "reward_scale"]
BAD = [(flag, value) for flag in COUNTS for value in (0, -1)]
BAD += [(flag, -1) for flag in NATURALS] + [("seed", 2**32)]
BAD += [(flag, value) for flag in POSITIVES for value in (0.0, -1.0, NAN, INF)]
BAD += [(flag, value) for flag in ("gamma", "tau") for value in (-0.1, 1.1, NAN)]
BAD += [("additive_noise", value) for value in (-0.1, NAN, INF)]
BAD += [("ell", value) for value in (0.1, NAN, -INF)]
BAD += [("learning_starts", TINY["total_timesteps"]), ("num_envs", TINY["buffer_size"] + 1)]
BAD += [("target_kl", 0.7), ("buffer_size", 10**12)]
BAD_IDS = ["NoSuchThing-v0", "no_such_module:Thing-v0", "", "CartPole-v1", "FrozenLake-v1"]
BAD_IDS += ["SequenceObservations-v0", "UnboundedActions-v0", "MatrixActions-v0"]
BAD_IDS += ["DictActions-v0", "FailsAtOnce-v0", "IntegerActions-v0", "OneAction-v0"]
BAD += [("env_id", env_id) for env_id in BAD_IDS]
BAD += [("exp_name", name) for name in ("ablation/neg", "a:b", "a\\b")]


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_bad_input_ends_in_one_line_that_names_the_flag_and_writes_nothing(
    tmp_path, monkeypatch, capsys, flag, value
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        GEMPO.main(GEMPO.Args(**TINY | {flag: value}))
    message = stop.value.code  # a string: Python prints it on stderr and exits with 1
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith(f"--{flag.replace('_', '-')} ") and str(value) in message
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "runs/no-such-run", __file__])
def test_what_is_no_runs_folder_is_not_resumed(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^--resume must be the folder of a run, got") as stop:
        GEMPO.main(GEMPO.Args(resume=path))
    assert stop.value.code.endswith(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env_id", "what"),
    [
        ("SequenceObservations-v0", r"observations Sequence\(.*FlattenObservation"),
        ("UnboundedActions-v0", r"actions Box\(-inf, inf, \(1,\), float32\).*ActionWrapper"),
        ("MatrixActions-v0", r"actions Box\(-1.0, 1.0, \(2, 3\), float32\).*ActionWrapper"),
        ("DictActions-v0", r"actions Dict\('torque'.*ActionWrapper"),
        ("IntegerActions-v0", r"actions Box\(-5, 5, \(2,\), int32\).*Box of floats"),
        ("OneAction-v0", r"actions Box\(\[0. 1.\], 1.0, \(2,\), float32\).*low < high"),
        ("CartPole-v1", r"actions Discrete\(2\).*ActionWrapper"),
        ("FailsAtOnce-v0", "fails: no licence for this simulator"),
    ],
)
def test_the_space_that_fails_is_named_with_a_cure(env_id, what):
    with pytest.raises(SystemExit, match=rf"^--env-id {env_id} .*{what}"):
        GEMPO.make_env(env_id)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_tracking_without_wandb_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^--track must be off: wandb is not installed"):
        GEMPO.main(GEMPO.Args(track=True))
    assert not list(tmp_path.iterdir())


def test_wandb_follows_the_tensorboard_writer_and_goes_on_with_a_resumed_run(tmp_path, monkeypatch):
    """wandb.init replaces the class of the writers that are made later: only those it follows."""
    monkeypatch.chdir(tmp_path)
    calls, followed, wandb = [], [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)

    class FollowedWriter(event_file_writer.EventFileWriter):
        def __init__(self, folder, **options):
            followed.append(folder)
            super().__init__(folder, **options)

    def init(**arguments):
        calls.append(arguments)
        monkeypatch.setattr(event_file_writer, "EventFileWriter", FollowedWriter)

    wandb.init = init
    wandb.finish = lambda exit_code: calls.append(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = GEMPO.Args(track=True, wandb_entity="team")
    GEMPO.check_args(args)
    with GEMPO.RunFolder(args, 0) as run:
        assert calls[1:] == []
    call, exit_code = calls
    assert exit_code == 0 and followed == [str(run.path)]
    assert call["sync_tensorboard"] and call["resume"] == "allow" and call["entity"] == "team"
    assert call["name"] == run.path.name == only_run(tmp_path).name
    assert call["config"] == asdict(args)
    with GEMPO.RunFolder(replace(args, resume=str(run.path)), 5):
        assert calls[-1]["id"] == call["id"]  # the same run, of which more is told
    # A sweep's runs have folders of their own, in which two of one second have one name.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("time.time", lambda: int(run.path.name.rpartition("__")[2]))
    with GEMPO.RunFolder(args, 0):
        assert calls[-1]["name"] == call["name"] and calls[-1]["id"] != call["id"]
    other = replace(args, exp_name="other")
    with pytest.raises(SystemExit), GEMPO.RunFolder(other, 0) as run:
        run.require_finite(1, rewards=NAN)
    assert calls[-1] == 1  # to wandb, this run has failed
    with GEMPO.RunFolder(other, 0) as run:
        run.receive_signal(15, None)
    assert calls[-1] == 128 + 15  # and this one was stopped


def test_a_refused_wandb_run_ends_in_one_line(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no such\nentity")

    monkeypatch.chdir(tmp_path)
    wandb = types.ModuleType("wandb")
    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(SystemExit, match=r"^--track fails: no such entity$"):
        GEMPO.RunFolder(GEMPO.Args(track=True), 0)


@pytest.mark.parametrize(
    "words",
    [["--gamma", "1.5"], ["--env-id", "NoSuchThing-v0"], ["--batch-size", "many"]],
    ids=" ".join,
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
    flags = dict(env_id="Counting-v0", num_particles=1, num_envs=2, updates_per_step=3)
    flags |= dict(total_timesteps=20, learning_starts=10, eval_frequency=0)
    agent = GEMPO.main(GEMPO.Args(**TINY | flags))
    assert agent.num_updates == 5 * 2 * 3
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(agent.params))


def test_the_list_of_mutants_fits_the_scripts():
    """Each text is found once, and what replaces it is Python; mutants.py runs them."""
    mutants.check_list()
    assert len(mutants.MUTANTS) >= 70


# -------------------------------------------------- progress -------------------------------------------------
@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with GEMPO.RunFolder(GEMPO.Args(total_timesteps=10_000_000, num_envs=2), 0) as run:
        yield run


def test_speed_is_the_median_of_the_last_steps_without_the_slow_ones(run_folder):
    assert run_folder.speed() == {}
    run_folder.durations.extend([0.1, 9.0, 0.1])
    assert run_folder.speed() == {"charts/SPS": pytest.approx(20)}  # 2 environments


def test_a_line_is_printed_every_half_minute(run_folder, capsys):
    run_folder.is_long_run_announced = True
    capsys.readouterr()
    run_folder.show_progress(20_000)
    assert capsys.readouterr().out == ""
    run_folder.line_time -= 31
    run_folder.show_progress(20_002)
    run_folder.show_progress(20_004)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step 20,002 of 10,000,000, ")]
    assert not [line for line in lines if "20,004" in line]


def test_a_long_run_without_an_accelerator_is_announced_once(run_folder, capsys):
    run_folder.durations.append(0.9)
    capsys.readouterr()
    run_folder.announce_long_run(0)
    run_folder.announce_long_run(2)
    (line,) = capsys.readouterr().out.splitlines()
    assert "about 1250 hours" in line and "README" in line  # 5,000,000 steps of 0.9 s


def test_the_speed_of_a_resumed_run_leaves_out_its_first_rounds_which_compile(run_folder):
    run_folder.first_step = 1_000_000  # long after learning began
    for step in (1_000_002, 1_000_004):
        run_folder.show_progress(step)
        assert run_folder.speed() == {}
    run_folder.show_progress(1_000_006)
    assert len(run_folder.durations) == 1


def test_a_resumed_run_is_not_judged_by_its_first_step_which_compiles(run_folder, capsys):
    capsys.readouterr()
    run_folder.step_time -= 100.0  # the first step since a resume, long after learning began
    for step in range(1_000_000, 1_000_098, 2):
        run_folder.show_progress(step)
    assert len(run_folder.durations) == 49 and not run_folder.is_long_run_announced
    run_folder.show_progress(1_000_098)
    assert run_folder.is_long_run_announced
    assert capsys.readouterr().out == ""  # the median of 50 steps is of those that took no time
