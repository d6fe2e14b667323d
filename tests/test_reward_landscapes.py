"""The four rewards by hand, against the Control Suite's own, and as environments of the scripts."""

import subprocess
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from helpers import SCRIPTS, only_run, read_scalars

from benchmark.reward_landscapes import (
    ACTION_REPEAT,
    DOMAINS,
    LANDSCAPES,
    Args as FigureArgs,
    landscape_reward,
    main as draw_figure,
    speed_reward,
)

every_domain = pytest.mark.parametrize("domain", DOMAINS)
every_landscape = pytest.mark.parametrize("landscape", LANDSCAPES)


# ------------------------------------------ the rewards ------------------------------------------
# At 0, 2.5, 5 and 10 m/s, with k = 5:
BY_HAND = {
    "sqrt": [0.0, 0.3660254, 0.6180340, 1.0],  # sqrt(.25, .75, 1.25, 2.25) - .5
    "linear": [0.0, 0.5, 1.0, 2.0],
    "square": [0.0, 0.66, 1.64, 4.56],  # (.625, 1.025, 1.425, 2.225)^2 - .390625
    "exp": [0.0, 0.6813531, 1.7547957, 6.1103127],  # 1.1840206 (e^(x / 5.5) - 1)
}


@every_landscape
def test_rewards_by_hand(landscape):
    speeds = np.array([0, 2.5, 5, 10])
    expected = np.array(BY_HAND[landscape])
    np.testing.assert_allclose(speed_reward(landscape, speeds), expected, atol=1e-6)
    np.testing.assert_allclose(landscape_reward("cheetah", landscape, speeds), expected, atol=1e-6)
    standing = 0.3 * (5 * expected + 1) / 6
    ours = landscape_reward("walker", landscape, speeds, 0.3)
    np.testing.assert_allclose(ours, standing, atol=1e-6)


def test_lambert_w_is_the_solution_of_its_equation():
    """exp's slope at rest is e^W / (1.1 k), with W e^W = 1/k: 1 / (1.1 k^2 W)."""
    slope = speed_reward("exp", 1e-6) / 1e-6
    w = 1 / (1.1 * 25 * slope)
    assert w == pytest.approx(0.1689, abs=1e-4)
    assert w * np.exp(w) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize(
    ("landscape", "at_rest", "ratio"),
    [
        ("sqrt", 0.2, 0.40347),  # sqrt(1.75 / 10.75)
        ("linear", 0.2, 1.0),
        ("square", 0.2, 3.04255),  # 13.40625 / 4.40625
        ("exp", 0.21528, 5.13648),  # e^(9 / 5.5)
    ],
)
def test_slopes(landscape, at_rest, ratio):
    """The slope at rest, and that at 9.5 m/s over that at 0.5 m/s."""

    def slope(speed):
        low, high = speed_reward(landscape, np.array([speed - 1e-4, speed + 1e-4]))
        return (high - low) / 2e-4

    assert slope(1e-3) == pytest.approx(at_rest, rel=1e-3)
    assert slope(9.5) / slope(0.5) == pytest.approx(ratio, rel=1e-4)


@every_domain
def test_rewards_are_ordered_from_flat_to_steep(domain):
    speeds = np.linspace(0.5, 9.9, 50)
    rewards = [landscape_reward(domain, landscape, speeds) for landscape in LANDSCAPES]
    assert LANDSCAPES == ("sqrt", "linear", "square", "exp")
    assert (np.diff(rewards, axis=1) > 0).all()
    assert (np.diff(rewards, axis=0) > 0).all()


@every_landscape
def test_beyond_the_target_and_backwards(landscape):
    cheetah = partial(landscape_reward, "cheetah", landscape)
    walker = partial(landscape_reward, "walker", landscape)
    assert walker(12.0) == walker(10.0)
    assert (cheetah(12.0) > cheetah(10.0)) == (landscape != "linear")
    if landscape in ("sqrt", "linear"):
        assert cheetah(-3.0) == pytest.approx(0, abs=1e-6)
    else:
        assert cheetah(-3.0) < -0.3


def test_the_figure_is_drawn(tmp_path):
    draw_figure(FigureArgs(figure=tmp_path / "new" / "figure.png"))
    assert (tmp_path / "new" / "figure.png").stat().st_size > 5_000
    with pytest.raises(SystemExit, match="^--figure must be a picture's file that can be written"):
        draw_figure(FigureArgs(figure=tmp_path / "figure.nothing"))


# ---------------------------------------- the environments ---------------------------------------
@pytest.fixture
def suite():
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    from dm_control import suite

    return suite


def make(domain, landscape):
    return SCRIPTS["square"].make_env(f"benchmark.reward_landscapes:{domain}-run-{landscape}-v0")


@every_domain
def test_linear_agrees_with_the_control_suite_on_a_whole_episode(suite, domain):
    """The walker's `stand` comes from the stock reward, stand (5 clip(v / 8, 0, 1) + 1) / 6."""
    env = make(domain, "linear")
    stock = suite.load(domain, "run", task_kwargs={"random": 3})
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (500, *env.action_space.shape)).astype(np.float32)
    obs, _ = env.reset(seed=3)
    timestep = stock.reset()
    speeds, rewards = [], []
    for i, action in enumerate(actions):
        # Flat observations: the parts in alphabetical order.
        parts = [np.ravel(timestep.observation[name]) for name in sorted(timestep.observation)]
        np.testing.assert_allclose(obs, np.concatenate(parts))
        obs, reward, terminated, truncated, info = env.step(action)
        expected = 0.0
        for _ in range(ACTION_REPEAT):
            timestep = stock.step(action)
            physics = stock.physics
            if domain == "cheetah":
                speeds.append(physics.speed())
                expected += 2 * timestep.reward  # the stock reward is clip(v / 10, 0, 1)
            else:
                speeds.append(physics.horizontal_velocity())
                stand = timestep.reward * 6 / (5 * np.clip(speeds[-1] / 8, 0, 1) + 1)
                expected += stand * (5 * speeds[-1] / 5 + 1) / 6
        rewards.append(reward)
        assert reward == pytest.approx(expected, abs=1e-9)
        assert info["speed"] == pytest.approx(np.mean(speeds[-2:]))
        assert (terminated, truncated) == (False, i == 499)
        assert ("charts" in info) == truncated
    assert timestep.last()
    assert len(set(rewards)) > 100  # it moved
    assert info["charts"] == {"speed": pytest.approx(np.mean(speeds))}
    env.reset()
    for action in actions:  # the mean is that of the episode
        *_, info = env.step(0 * action)
    assert info["charts"]["speed"] != pytest.approx(np.mean(speeds), abs=1e-3)


@every_domain
@every_landscape
def test_every_environment_pays_its_own_function_of_the_speed(suite, domain, landscape):
    env = make(domain, landscape)
    env.reset(seed=1)
    physics = env.unwrapped.physics
    with physics.reset_context():  # fast, and for the walker upright
        physics.data.qvel[1 if domain == "walker" else 0] = 5
    _, reward, *_, info = env.step(np.zeros(env.action_space.shape, np.float32))
    last_speed, last_stand = env.get_wrapper_attr("measure")()
    first_speed = 2 * info["speed"] - last_speed
    assert first_speed > 1
    first_reward = reward - landscape_reward(domain, landscape, last_speed, last_stand)
    stand = first_reward / landscape_reward(domain, landscape, first_speed)
    if domain == "cheetah":
        assert stand == pytest.approx(1)
    else:  # it is still nearly as upright as after the second simulator step
        assert stand == pytest.approx(last_stand, abs=0.05)


@pytest.mark.parametrize(("domain", "rate"), [("cheetah", 50), ("walker", 20)])
def test_a_film_runs_at_the_speed_of_the_simulation(suite, domain, rate):
    """Two simulator steps of 10 ms a decision for the cheetah, of 25 ms for the walker."""
    assert make(domain, "sqrt").metadata["render_fps"] == rate


def test_an_environment_without_its_libraries_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(SystemExit) as stop:
        make("cheetah", "sqrt")
    assert "pip install -e '.[dmc]' (up to Python 3.12)" in stop.value.code
    assert "\n" not in stop.value.code


def test_ids_are_registered_for_every_task_and_landscape():
    names = {f"{domain}-run-{landscape}-v0" for domain in DOMAINS for landscape in LANDSCAPES}
    assert len(names) == 8
    assert names <= set(gym.registry)


def test_the_mean_speed_of_an_episode_arrives_where_the_scripts_log_it(suite):
    same_step = gym.vector.AutoresetMode.SAME_STEP
    constructors = [partial(make, "cheetah", "sqrt")] * 2
    envs = gym.vector.SyncVectorEnv(constructors, autoreset_mode=same_step)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(500):
        *_, truncations, infos = envs.step(envs.action_space.sample())
    assert truncations.all()
    charts = infos["final_info"]["charts"]
    assert charts["speed"].shape == (2,)
    assert charts["speed"][0] != charts["speed"][1]
    assert set(charts) == {"speed", "_speed"}


def test_they_can_be_evaluated_after_a_million_steps(suite, monkeypatch):
    """Their random generator takes no seed of 2**32 or more."""
    script = SCRIPTS["square"]
    monkeypatch.setattr(script, "act", lambda *inputs, training: np.zeros((1, 6)))
    seed = 1 + script.EVAL_SEED_STRIDE * 1_000_000
    scores = script.evaluate(None, [make("cheetah", "exp")], seed)
    assert scores["eval/episodic_length"] == 500
    assert np.isfinite(scores["eval/episodic_return"])


SMALL = ["--hidden-dim=16", "--num-particles=2", "--diffusion-steps=2", "--batch-size=8"]
SMALL += ["--buffer-size=2000", "--eval-episodes=1", "--eval-best-of=1"]
SMALL += ["--total-timesteps=2000", "--learning-starts=500", "--eval-frequency=1000"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cheetah-run", "walker-run"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_for_2000_steps(suite, tmp_path, monkeypatch, name, task):
    """As a user would, from another folder."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    landscape = {"exp": "exp", "linear": "linear", "square": "square", "neg": "sqrt"}[name]
    script = str(ROOT / f"gempo_{name}.py")
    env_id = f"benchmark.reward_landscapes:{task}-{landscape}-v0"
    command = [sys.executable, script, "--env-id", env_id, *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    scalars = read_scalars(only_run(tmp_path))
    assert [step for step, _ in scalars["charts/speed"]] == [500, 1000, 1500, 2000]
    assert [step for step, _ in scalars["eval/episodic_return"]] == [1000, 2000]
    for series in scalars.values():
        assert np.isfinite([value for _, value in series]).all()
