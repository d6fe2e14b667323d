"""Four rewards, from flat to steep, for running on the DeepMind Control Suite (the paper's section 5.2 and Figure 5).

    python gempo_square.py --env-id benchmark.reward_landscapes:cheetah-run-sqrt-v0
    python benchmark/reward_landscapes.py        # draws the four rewards

Ids: {cheetah-run, walker-run}-{sqrt, linear, square, exp}-v0. With the speed v in units of the task's target,
u = clip(v / v*, 0, 1), v* = 10 m/s for the cheetah and 8 m/s for the walker, the reward of a simulator step is f(u),

    sqrt: sqrt(u)      linear: u      square: u^2      exp: (e^(k (u - 1)) - e^-k) / (1 - e^-k),  k = 5

for the cheetah and stand (5 f(u) + 1) / 6 for the walker, which has to stay upright, with the Control Suite's `stand`.
`linear` is the Control Suite's own reward in both tasks; every f goes from 0 at rest to 1 at the target. The paper's
appendix H.2 prints other forms, two of which fall as the speed rises; these keep its order from flat to steep.
"""

import math
import pathlib
import warnings
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import tyro

STEEPNESS = 5.0  # k of the exponential reward
LANDSCAPES = {
    "sqrt": np.sqrt,
    "linear": lambda u: u,
    "square": np.square,
    "exp": lambda u: np.expm1(STEEPNESS * u) / math.expm1(STEEPNESS),  # the form above, times e^k / e^k
}
TARGET_SPEEDS = {"cheetah": 10.0, "walker": 8.0}  # m/s (the Control Suite's)
ACTION_REPEAT = 2


def landscape_reward(domain: str, landscape: str, speed, stand=1.0):
    """The reward of one simulator step, in [0, 1], of the shape of `speed` (m/s); only the walker's needs `stand`."""
    moving = LANDSCAPES[landscape](np.clip(speed / TARGET_SPEEDS[domain], 0.0, 1.0))
    return moving if domain == "cheetah" else stand * (5 * moving + 1) / 6


class RewardLandscape(gym.Wrapper):
    """Replaces the reward of a Control Suite run task; an action is held for ACTION_REPEAT steps, rewards are summed.

    An episode of 1,000 simulator steps ends by truncation after 500 actions. `info["speed"]` is the mean speed in m/s
    over the action's steps; the last info of an episode also has `charts: {"speed": mean over the episode}`.
    """

    def __init__(self, env: gym.Env, domain: str, landscape: str):
        super().__init__(env)
        self.domain, self.landscape, self.speeds = domain, landscape, []
        # As dm_control has it, but in float32: gymnasium's rescaling of float64 boxes warns of an overflow.
        self.action_space = gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)

    def reset(self, *, seed=None, options=None):
        self.speeds = []
        return self.env.reset(seed=seed, options=options)

    def measure(self) -> tuple[float, float]:
        """Speed in m/s and, for the walker, its standing term."""
        physics = self.env.unwrapped.physics
        if self.domain == "cheetah":
            return float(physics.speed()), 1.0
        height = float(physics.torso_height())  # 1 from 1.2 m up, 0.1 at 0.6 m, a Gaussian of the height between
        standing = 1.0 if height >= 1.2 else math.exp(math.log(0.1) * ((1.2 - height) / 0.6) ** 2)
        return float(physics.horizontal_velocity()), (3 * standing + (1 + float(physics.torso_upright())) / 2) / 4

    def step(self, action):
        total, steps_before = 0.0, len(self.speeds)
        for _ in range(ACTION_REPEAT):
            obs, _, terminated, truncated, info = self.env.step(action)
            speed, stand = self.measure()
            self.speeds.append(speed)
            total += float(landscape_reward(self.domain, self.landscape, speed, stand))
            if terminated or truncated:
                info["charts"] = {"speed": float(np.mean(self.speeds))}
                break
        info["speed"] = float(np.mean(self.speeds[steps_before:]))
        return obs, total, terminated, truncated, info


def make_env(domain: str, landscape: str, render_mode: str | None = None) -> gym.Env:
    """A run task of the Control Suite with flat observations and the reward `landscape`; ImportError without `dmc`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing display
            from dm_control import suite
            from shimmy.dm_control_compatibility import DmControlCompatibilityV0
    except ImportError as error:
        raise ImportError(f"it needs dm_control and shimmy, pip install -e '.[dmc]' ({error})") from error
    env = DmControlCompatibilityV0(suite.load(domain, "run"), render_mode=render_mode)
    return RewardLandscape(gym.wrappers.FlattenObservation(env), domain, landscape)


for _domain in TARGET_SPEEDS:
    for _landscape in LANDSCAPES:
        gym.register(f"{_domain}-run-{_landscape}-v0", partial(make_env, domain=_domain, landscape=_landscape))


@dataclass
class Args:
    figure: pathlib.Path = pathlib.Path(__file__).parent / "results" / "reward_landscapes.png"  # where to draw it


def main(args: Args) -> None:
    """Draw the four rewards over speed, one panel a task, for a walker that stands upright."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, domain in zip(figure.subplots(1, 2, sharey=True), TARGET_SPEEDS, strict=True):
        speed = np.linspace(-1.0, TARGET_SPEEDS[domain] + 1, 500)
        for landscape in LANDSCAPES:
            axes.plot(speed, landscape_reward(domain, landscape, speed), label=landscape)
        axes.set(title=f"{domain}-run", xlabel="speed (m/s)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward of a step")
    figure.axes[0].legend()
    try:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.figure, dpi=120)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--figure must be a picture's file that can be written, got {args.figure}: {error}") from None
    print(args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
