"""Four rewards, from flat to steep, for running on the DeepMind Control Suite (section 5.2, Q3).

    python gempo_square.py --env-id benchmark.reward_landscapes:cheetah-run-sqrt-v0
    python benchmark/reward_landscapes.py        # draws the four rewards

Ids: {cheetah-run, walker-run}-{sqrt, linear, square, exp}-v0. With x the speed in m/s and k = 5,
a simulator step pays

    sqrt      sqrt((x + k/4) / k) - 1/2                     x from 1e-6 up
    linear    x / k
    square    ((x + .78125 k) / (1.25 k))^2 - .625^2
    exp       e^(x / (1.1 k) + W) - e^W                     W e^W = 1/k (Lambert's W, .1689)

for the cheetah, and stand (5 f(x) + 1) / 6 for the walker, which has to stay upright, with the
Control Suite's `stand`. All f are 0 at rest, with a slope of about .2; the slope at 9.5 m/s is
.40, 1, 3.0 and 5.1 times that at .5 m/s. The cheetah's linear reward stays in [0, 2]; its others
grow without limit, and square and exp are negative for moderate speeds backwards. The walker's
speed counts up to 10 m/s, which is not the Control Suite's target of 8.

A step of a training script is a decision: one action, held for two simulator steps (frames), whose
rewards are summed. An episode is 1,000 frames, or 500 decisions.

What is known. The paper's appendix H.2 has the names abs_sqrt, linear, abs_sq and abs_exp, this
order from flat to steep, a target of 10 m/s for the cheetah, and "proper transformation to align
the scale"; two of the forms as printed fall while the speed rises. The forms above stand under
these names in an earlier library of the authors, mahaitongdae/diffusion_policy_online_rl at
33fd974, relax/env/dmc/custom_dmc_tasks, with k = 5 for both run tasks, the walker's limit of 10 m/s
and the cheetah's linear reward, which is twice the Control Suite's.

What is inferred. That Figure 3 used them: that library is older than the paper. That sqrt's lower
limit of 1e-6, which commit 2ab0ef6 has for the cheetah, holds for the walker too; without it sqrt
is NaN below -1.25 m/s. That an action is held for two frames: that library holds it for one, but
flow-rl, where the paper's code is, has two in its settings for the Control Suite.
"""

import math
import pathlib
import warnings
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import tyro
from scipy.special import lambertw

K = 5.0  # m/s, the scale of the speed in all four forms
W = lambertw(1 / K).real  # W e^W = 1/K
TARGET_SPEED = 10.0  # m/s
DOMAINS = ("cheetah", "walker")
LANDSCAPES = ("sqrt", "linear", "square", "exp")
ACTION_REPEAT = 2  # simulator steps (frames) of an action


def speed_reward(landscape: str, speed):
    """The form above at a speed in m/s, of any shape."""
    match landscape:
        case "sqrt":
            return np.sqrt((np.maximum(speed, 1e-6) + K / 4) / K) - 0.5
        case "linear":
            return speed / K
        case "square":
            return ((speed + 0.78125 * K) / (1.25 * K)) ** 2 - 0.625**2
        case "exp":
            return np.exp(speed / (1.1 * K) + W) - np.exp(W)


def landscape_reward(domain: str, landscape: str, speed, stand=1.0):
    """The reward of a simulator step at `speed` (m/s, any shape); the walker's needs `stand`."""
    if domain == "walker":
        moving = speed_reward(landscape, np.minimum(speed, TARGET_SPEED))
        return stand * (5 * moving + 1) / 6
    if landscape == "linear":
        speed = np.clip(speed, 0.0, TARGET_SPEED)
    return speed_reward(landscape, speed)


class RewardLandscape(gym.Wrapper):
    """Replaces the reward of a run task; an action is held for ACTION_REPEAT simulator steps.

    An episode of 1,000 simulator steps ends by truncation after 500 actions. `info["speed"]` is the
    mean speed in m/s over the action's steps; the last info of an episode also has
    `charts: {"speed": mean over the episode}`, which the training scripts log.
    """

    def __init__(self, env: gym.Env, domain: str, landscape: str):
        super().__init__(env)
        self.domain = domain
        self.landscape = landscape
        self.speeds = []  # of the episode's simulator steps
        # dm_control's, but in float32: gymnasium's rescaling of float64 boxes warns of an overflow.
        self.action_space = gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
        # Decisions a second, for films: shimmy puts a duration there, milliseconds of a simulator step.
        decision_seconds = env.unwrapped.dt * ACTION_REPEAT
        self.metadata = env.metadata | {"render_fps": round(1 / decision_seconds)}

    def reset(self, *, seed=None, options=None):
        self.speeds = []
        return self.env.reset(seed=seed, options=options)

    def measure(self) -> tuple[float, float]:
        """Speed in m/s and, for the walker, its standing term."""
        physics = self.env.unwrapped.physics
        if self.domain == "cheetah":
            return float(physics.speed()), 1.0
        # 1 from a height of 1.2 m up, 0.1 at 0.6 m, and a Gaussian of the height below.
        missing = max(1.2 - float(physics.torso_height()), 0.0)
        standing = math.exp(math.log(0.1) * (missing / 0.6) ** 2)
        upright = (1 + float(physics.torso_upright())) / 2
        return float(physics.horizontal_velocity()), (3 * standing + upright) / 4

    def step(self, action):
        total = 0.0
        speeds = []
        for _ in range(ACTION_REPEAT):
            obs, _, terminated, truncated, info = self.env.step(action)
            speed, stand = self.measure()
            speeds.append(speed)
            total += float(landscape_reward(self.domain, self.landscape, speed, stand))
            if terminated or truncated:
                break
        self.speeds += speeds
        info["speed"] = float(np.mean(speeds))
        if terminated or truncated:
            info["charts"] = {"speed": float(np.mean(self.speeds))}
        return obs, total, terminated, truncated, info


def make_env(domain: str, landscape: str, render_mode: str | None = None) -> gym.Env:
    """A run task with flat observations and the reward `landscape`.

    Raises ImportError, with the way out, if the extra `dmc` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing display
            from dm_control import suite
            from shimmy.dm_control_compatibility import DmControlCompatibilityV0
    except ImportError as error:
        cure = "it needs dm_control and shimmy, pip install -e '.[dmc]' (up to Python 3.12)"
        raise ImportError(f"{cure} ({error})") from error
    env = DmControlCompatibilityV0(suite.load(domain, "run"), render_mode=render_mode)
    return RewardLandscape(gym.wrappers.FlattenObservation(env), domain, landscape)


for _domain in DOMAINS:
    for _landscape in LANDSCAPES:
        _make = partial(make_env, domain=_domain, landscape=_landscape)
        gym.register(f"{_domain}-run-{_landscape}-v0", _make)


FIGURE = pathlib.Path(__file__).parent / "results" / "reward_landscapes.png"


@dataclass
class Args:
    figure: pathlib.Path = FIGURE  # where to draw the four rewards


def main(args: Args) -> None:
    """Draw the four rewards over speed, one panel a task, for a walker that stands upright."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    speeds = np.linspace(-2.0, 11.0, 500)
    for axes, domain in zip(figure.subplots(1, 2), DOMAINS, strict=True):
        for landscape in LANDSCAPES:
            axes.plot(speeds, landscape_reward(domain, landscape, speeds), label=landscape)
        axes.set(title=f"{domain}-run", xlabel="speed (m/s)", ylabel="reward of a simulator step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    try:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.figure, dpi=120)
    except (OSError, ValueError) as error:
        what = "must be a picture's file that can be written"
        raise SystemExit(f"--figure {what}, got {args.figure}: {error}") from None
    print(args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
