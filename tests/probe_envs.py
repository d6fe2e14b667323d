"""Environments small enough that their values are known; importing this registers them with gymnasium."""

import itertools

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """Episodes of `horizon` steps; the observation is `observe(step, sign)`, where `sign` is -1 or 1 for an episode."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    render_mode, counter = None, itertools.count()

    def __init__(self, horizon, reward, observe, truncates=False, render_mode=None):
        self.horizon, self.reward, self.observe, self.truncates = horizon, reward, observe, truncates
        self.number = next(self.counter)  # which of the environments made so far this is

    def observation(self):
        return np.array([self.observe(self.steps, self.sign)], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.sign = 0, self.np_random.choice([-1, 1])
        return self.observation(), {}

    def step(self, action):
        reward = float(self.reward(self, action[0]))
        self.steps += 1
        ends = self.steps == self.horizon
        return self.observation(), reward, ends and not self.truncates, ends and self.truncates, {}


PROBES = {
    "ConstantReward": dict(horizon=1, reward=lambda env, action: 1, observe=lambda step, sign: 0),
    "ObservedReward": dict(horizon=1, reward=lambda env, action: env.sign, observe=lambda step, sign: sign),
    "DelayedReward": dict(horizon=2, reward=lambda env, action: env.steps, observe=lambda step, sign: step),
    "ActionReward": dict(horizon=1, reward=lambda env, action: -((action - 0.5) ** 2), observe=lambda step, sign: 0),
    "ObservedAction": dict(
        horizon=1, reward=lambda env, action: -((action - 0.5 * env.sign) ** 2), observe=lambda step, sign: sign
    ),
    "Truncated": dict(horizon=2, reward=lambda env, action: 1, observe=lambda step, sign: 0, truncates=True),
    "Counting": dict(horizon=4, reward=lambda env, action: env.number, observe=lambda step, sign: step),
    "CountingTruncated": dict(
        horizon=4, reward=lambda env, action: env.number, observe=lambda step, sign: step, truncates=True
    ),
}
for probe_name, probe in PROBES.items():
    gym.register(f"{probe_name}-v0", Probe, kwargs=probe, disable_env_checker=True)


class OwnCharts(Probe):
    """Logs its number at the end of an episode."""

    def step(self, action):
        *rest, terminated, truncated, info = super().step(action)
        return *rest, terminated, truncated, info | ({"charts": {"number": self.number}} if terminated else {})


gym.register("OwnCharts-v0", OwnCharts, kwargs=PROBES["Counting"], disable_env_checker=True)


class DictObservations(Probe):
    observation_space = gym.spaces.Dict(position=Probe.observation_space)


class UnboundedActions(Probe):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


for env_class in (DictObservations, UnboundedActions):
    gym.register(f"{env_class.__name__}-v0", env_class, kwargs=PROBES["ConstantReward"], disable_env_checker=True)
