"""The four rewards by hand, against the Control Suite's own where they coincide, and as environments of the scripts."""

import os
import subprocess
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from helpers import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.reward_landscapes import (
    ACTION_REPEAT,
    LANDSCAPES,
    Args as FigureArgs,
    landscape_reward,
    main as draw_figure,
)

DOMAINS = ("cheetah", "walker")


# ---------------------------------------------------- the rewards ----------------------------------------------------
@pytest.mark.parametrize(
    ("landscape", "at_rest", "quarter", "half", "at_target"),
    [
        ("sqrt", 0, 0.5, 0.70710678, 1),
        ("linear", 0, 0.25, 0.5, 1),
        ("square", 0, 0.0625, 0.25, 1),
        ("exp", 0, 0.01689363, 0.07585818, 1),  # (e^-3.75 - e^-5) / (1 - e^-5), (e^-2.5 - e^-5) / (1 - e^-5)
    ],
)
def test_rewards_by_hand(landscape, at_rest, quarter, half, at_target):
    speeds = np.array([-3, 0, 2.5, 5, 10, 12])
    expected = [at_rest, at_rest, quarter, half, at_target, at_target]
    np.testing.assert_allclose(landscape_reward("cheetah", landscape, speeds), expected, atol=1e-8)
    standing = [(5 * f + 1) / 6 for f in expected]
    np.testing.assert_allclose(landscape_reward("walker", landscape, 0.8 * speeds), standing, atol=1e-8)
    np.testing.assert_allclose(landscape_reward("walker", landscape, 0.8 * speeds, 0.3), np.multiply(0.3, standing))


@pytest.mark.parametrize("domain", DOMAINS)
def test_rewards_rise_with_the_speed_and_are_ordered_from_flat_to_steep(domain):
    speeds = np.linspace(0.05, 0.99, 50) * (10 if domain == "cheetah" else 8)
    rewards = np.array([landscape_reward(domain, landscape, speeds) for landscape in LANDSCAPES])
    assert list(LANDSCAPES) == ["sqrt", "linear", "square", "exp"]
    assert (np.diff(rewards, axis=1) > 0).all() and (np.diff(rewards, axis=0) < 0).all()


def test_the_figure_is_drawn(tmp_path, capsys):
    draw_figure(FigureArgs(figure=tmp_path / "new" / "figure.png"))
    assert (tmp_path / "new" / "figure.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="^--figure must be a picture's file that can be written"):
        draw_figure(FigureArgs(figure=tmp_path / "figure.nothing"))


# -------------------------------------------------- the environments -------------------------------------------------
@pytest.fixture
def suite():
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    from dm_control import suite

    return suite


def make(domain, landscape):
    return SCRIPTS["square"].make_env(f"benchmark.reward_landscapes:{domain}-run-{landscape}-v0")


@pytest.mark.parametrize("domain", DOMAINS)
def test_linear_is_the_control_suites_own_reward_on_a_whole_episode(suite, domain):
    env, stock = make(domain, "linear"), suite.load(domain, "run", task_kwargs={"random": 3})
    actions = np.random.default_rng(0).uniform(-1, 1, (500, *env.action_space.shape)).astype(np.float32)
    obs, _ = env.reset(seed=3)
    timestep, speeds, rewards = stock.reset(), [], []
    for i, action in enumerate(actions):
        # Flat observations: the parts in alphabetical order.
        parts = [np.ravel(timestep.observation[name]) for name in sorted(timestep.observation)]
        np.testing.assert_allclose(obs, np.concatenate(parts))
        obs, reward, terminated, truncated, info = env.step(action)
        expected = 0.0
        for _ in range(ACTION_REPEAT):
            timestep = stock.step(action)
            expected += timestep.reward
            physics = stock.physics
            speeds.append(physics.speed() if domain == "cheetah" else physics.horizontal_velocity())
        rewards.append(reward)
        assert reward == pytest.approx(expected, abs=1e-9)
        assert info["speed"] == pytest.approx(np.mean(speeds[-2:]))
        assert (terminated, truncated) == (False, i == 499)
        assert ("charts" in info) == truncated
    assert timestep.last() and len(set(rewards)) > 100  # it moved
    assert info["charts"] == {"speed": pytest.approx(np.mean(speeds))}
    env.reset()
    for action in actions:  # the mean is that of the episode
        *_, info = env.step(0 * action)
    assert info["charts"]["speed"] != pytest.approx(np.mean(speeds), abs=1e-3)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_every_environment_pays_its_own_function_of_the_same_speeds(suite, domain, landscape):
    env, linear = make(domain, landscape), make(domain, "linear")
    env.reset(seed=1), linear.reset(seed=1)
    physics = linear.unwrapped.physics
    with physics.reset_context():  # fast, and for the walker upright
        physics.data.qvel[1 if domain == "walker" else 0] = 5
    with env.unwrapped.physics.reset_context():
        env.unwrapped.physics.data.qvel[:] = physics.data.qvel
        env.unwrapped.physics.data.qpos[:] = physics.data.qpos
    rewrapped = env.get_wrapper_attr("measure")
    _, reward, *_, info = env.step(np.zeros(env.action_space.shape, np.float32))
    _, linear_reward, *_, linear_info = linear.step(np.zeros(env.action_space.shape, np.float32))
    assert info["speed"] == linear_info["speed"] > 1
    last, stand = rewrapped()
    first = 2 * info["speed"] - last
    before = reward - landscape_reward(domain, landscape, last, stand)
    if domain == "cheetah":
        assert before == pytest.approx(landscape_reward(domain, landscape, first))
    if landscape == "linear":
        assert reward == linear_reward
    else:
        assert (reward > linear_reward) == (landscape == "sqrt")


def test_an_environment_without_its_libraries_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(SystemExit) as stop:
        make("cheetah", "sqrt")
    assert "pip install -e '.[dmc]'" in stop.value.code and "\n" not in stop.value.code


def test_ids_are_registered_once_for_every_task_and_landscape():
    names = {f"{domain}-run-{landscape}-v0" for domain in DOMAINS for landscape in LANDSCAPES}
    assert {name for name in gym.registry if "-run-" in name} >= names and len(names) == 8


FLAGS = ["--hidden-dim=16", "--num-particles=2", "--diffusion-steps=2", "--batch-size=8", "--buffer-size=2000"]
FLAGS += ["--eval-episodes=1", "--eval-best-of=1"]


def train(name, landscape, folder, *flags):
    """Train a script as a user would, from another folder, and return {tag: [(step, value)]}."""
    command = [
        sys.executable,
        str(ROOT / f"gempo_{name}.py"),
        "--env-id",
        f"benchmark.reward_landscapes:{landscape}-v0",
    ]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, *FLAGS, *flags], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_mean_speed_of_an_episode_arrives_where_the_scripts_log_it(suite):
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([partial(make, "cheetah", "sqrt")] * 2, autoreset_mode=same_step)
    envs.reset(seed=0), envs.action_space.seed(0)
    for _ in range(500):
        *_, truncations, infos = envs.step(envs.action_space.sample())
    assert truncations.all()
    charts = infos["final_info"]["charts"]
    assert charts["speed"].shape == (2,) and charts["speed"][0] != charts["speed"][1]
    assert set(charts) == {"speed", "_speed"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cheetah-run", "walker-run"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_for_2000_steps(suite, tmp_path, name, task):
    landscape = dict(exp="exp", linear="linear", square="square", neg="sqrt")[name]
    flags = ("--total-timesteps=2000", "--learning-starts=500", "--eval-frequency=1000")
    scalars = train(name, f"{task}-{landscape}", tmp_path, *flags)
    assert [step for step, _ in scalars["charts/speed"]] == [500, 1000, 1500, 2000]
    assert [step for step, _ in scalars["eval/episodic_return"]] == [1000, 2000]
    assert all(np.isfinite([value for _, value in series]).all() for series in scalars.values())
