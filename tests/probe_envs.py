"""Environments small enough that their values are known; importing this registers them."""

import itertools

import gymnasium as gym
import numpy as np

BOX_1 = gym.spaces.Box(-1, 1, (1,), np.float32)
UNBOUNDED_1 = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Probe(gym.Env):
    """Episodes of `horizon` steps; what they show and pay is up to the subclass.

    `sign` is -1 or 1 for an episode; `number` says which of the environments made so far this is.
    The constructor takes no render_mode, as an environment of one's own may not.
    """

    action_space = BOX_1
    observation_space = UNBOUNDED_1
    horizon = 1
    truncates = False  # whether the end is a truncation
    counter = itertools.count()

    def __init__(self):
        self.number = next(self.counter)

    def show(self):
        return 0.0

    def pay(self, action):
        return 1.0

    def observation(self):
        return np.array([self.show()], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.sign = self.np_random.choice([-1, 1])
        return self.observation(), {}

    def step(self, action):
        reward = float(self.pay(action[0]))
        self.steps += 1
        ends = self.steps == self.horizon
        terminated, truncated = ends and not self.truncates, ends and self.truncates
        return self.observation(), reward, terminated, truncated, {}


class ConstantReward(Probe):
    pass


class ObservedReward(Probe):
    def show(self):
        return self.sign

    def pay(self, action):
        return self.sign


class DelayedReward(Probe):
    horizon = 2

    def show(self):
        return self.steps

    def pay(self, action):
        return self.steps


class ObservedAction(Probe):
    def show(self):
        return self.sign

    def pay(self, action):
        return -((action - 0.5 * self.sign) ** 2)


class Truncated(Probe):
    horizon, truncates = 2, True


class Counting(Probe):
    """Shows the steps of its episode and pays its number."""

    horizon = 4

    def show(self):
        return self.steps

    def pay(self, action):
        return self.number


class CountingTruncated(Counting):
    truncates = True


class Staggered(Counting):
    """Neighbours have horizons of 2, 3 and 4 steps, so that episodes end together and alone."""

    def __init__(self):
        super().__init__()
        self.horizon = 2 + self.number % 3


class StaggeredTruncated(Staggered):
    truncates = True


class OwnCharts(Counting):
    """Logs its number at the end of an episode, if that is odd."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated and self.number % 2:
            info["charts"] = {"number": self.number}
        return obs, reward, terminated, truncated, info


class UnevenInfo(Counting):
    """Its info differs from environment to environment in shape and type.

    Logs half its number and half the next one, one of which is an integer, the other one a float.
    """

    def info(self):
        return {"path": np.zeros(1 + self.number % 3), "goal": None if self.number % 2 else 1}

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, self.info()

    def step(self, action):
        *transition, _ = super().step(action)
        whole, rest = divmod(self.number, 2)
        half, next_half = (whole + 0.5, whole + 1) if rest else (whole, whole + 0.5)
        return *transition, self.info() | {"charts": {"half": half, "next_half": next_half}}


class Endless(Probe):
    horizon = None


class DictObservations(Probe):
    observation_space = gym.spaces.Dict(position=gym.spaces.Box(-9, 9, (2,)), velocity=BOX_1)

    def observation(self):
        return {"velocity": np.float32([0.5]), "position": np.float32([1, 2])}


class TupleObservations(Probe):
    observation_space = gym.spaces.Tuple([gym.spaces.Box(-9, 9, (2,)), BOX_1])

    def observation(self):
        return np.float32([1, 2]), np.float32([0.5])


class MatrixObservations(Probe):
    observation_space = gym.spaces.Box(-9, 9, (2, 3))

    def observation(self):
        return np.arange(6, dtype=np.float32).reshape(2, 3)


class SequenceObservations(Probe):
    observation_space = gym.spaces.Sequence(BOX_1)

    def observation(self):
        return (np.zeros(1, np.float32),)


class UnboundedActions(Probe):
    action_space = UNBOUNDED_1


class MatrixActions(Probe):
    action_space = gym.spaces.Box(-1, 1, (2, 3))


class IntegerActions(Probe):
    action_space = gym.spaces.Box(-5, 5, (2,), np.int32)


class OneAction(Probe):
    action_space = gym.spaces.Box(np.float32([0, 1]), np.float32([1, 1]))


class RefusesOtherActions(Probe):
    """Between -1 and 1, scaled in float32, there are actions just outside of these bounds."""

    action_space = gym.spaces.Box(np.float32([0.4]), np.float32([5.1]))

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(action)


class OwnStatistics(Counting):
    """Reports an episode of its own, like an environment in gymnasium's RecordEpisodeStatistics."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | {"episode": {"r": -1.0, "l": -1}}


class OwnPickling(Counting):
    """Has a connection that must be opened anew; `connections` counts those that were."""

    connections = itertools.count()

    def __init__(self):
        super().__init__()
        self.connection = next(self.connections)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "connection"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.connection = next(self.connections)


class OwnReduction(Counting):
    """Pickled by a way of its own."""

    def __reduce__(self):
        return type(self), ()


class Handle(Counting):
    """Its simulator is elsewhere, and found by a number; it ends with the process."""

    simulators = {}  # noqa: RUF012 (of all of them)

    def __init__(self):
        super().__init__()
        self.simulators[self.number] = "a simulator"

    def step(self, action):
        assert self.simulators[self.number]
        return super().step(action)


class StartsWithNaN(Probe):
    def show(self):
        return np.nan if self.steps == 0 else 0.0


class DictActions(Probe):
    action_space = gym.spaces.Dict(torque=BOX_1)


class FailsAtOnce(Probe):
    def __init__(self):
        raise RuntimeError("no licence\nfor this simulator")


PROBES = [ConstantReward, ObservedReward, DelayedReward, ObservedAction, Truncated, Counting]
PROBES += [CountingTruncated, Staggered, StaggeredTruncated, OwnCharts, Endless, DictObservations]
PROBES += [TupleObservations, MatrixObservations, SequenceObservations, UnboundedActions]
PROBES += [MatrixActions, DictActions, FailsAtOnce, IntegerActions, OneAction]
PROBES += [RefusesOtherActions, OwnStatistics, OwnPickling, StartsWithNaN]
PROBES += [UnevenInfo, OwnReduction, Handle]
for probe in PROBES:
    gym.register(f"{probe.__name__}-v0", probe, disable_env_checker=True)
