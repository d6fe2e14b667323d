# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flax", "gymnasium[mujoco]>=1.1", "jax>=0.5", "mujoco>=3.3,<3.16", "optax", "tensorboard",
#     "tqdm", "tyro>=0.9",
# ]
# ///
"""DIPO: diffusion policy for model-free online RL, by action gradients. A baseline for GeMPO.

Paper: "Policy Representation via Diffusion Probability Model for Reinforcement Learning", Yang et
al., 2023, arXiv 2305.13122. The buffer holds for each transition a second action b, at first the one
that was played. At every update B of them climb the critics and are written back, and the policy is
trained to imitate them. No gradient of Q and no weight enters the policy's loss:

    b     <- K steps of Adam from b up the sum over rows of min_j Q_j(s, b), kept in [-1, 1]
    actor:   mean over B and d of (eps_hat(b_t, t, s) - eps)^2,  b_t = alpha_t b + sigma_t eps
    critics: y = r + gamma (1 - terminated) min_j Q'_j(s', a'),  a' a sample of a copy of the actor
             that follows it by tau (on HalfCheetah-v5 at every second update); they learn from the
             actions played, never from b

There is no temperature: K steps of --improvement-lr, of which each moves a coordinate by about that
much, say how greedy the policy is, and how often a row is drawn. Training plays a sample, evaluation
one whose steps add no noise (the first x_T is random).

Settings: the authors' code (github.com/BellmanTimeHut/DIPO), with the siblings' networks, schedule
and protocol. There: critics 3x256 Mish, episodes cut by a time limit that count as terminated, and
critics that step before b climbs them; here all losses and b are computed at the parameters before
the update. And there b is never kept: it is written to a copy of the buffer's rows, so that each
climb starts from the action played. Here climbs add up, as that code means to. The limit of the
gradient's norm in the climb is almost without effect, since Adam divides the scale out again.

Usage: `python dipo.py --env-id Hopper-v5`, or `--help`. A sibling of gempo_linear.py, with the same
environments, networks, loop, log and checkpoints: the diff of the two files is the algorithm.
After Ctrl-C, `--resume runs/{run}` goes on as if the run had never stopped.

Shapes: B states of a batch, E environments, T steps of the sampler, d action dimensions.
"""

import collections
import gzip
import importlib.util
import io
import math
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import cloudpickle
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

# =========================================== ARGUMENTS ===========================================


@dataclass(frozen=True)
class Hyperparameters:
    """What learning and acting depend on. An agent knows its own; they are compiled into it."""

    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate at which slow actor and target critics follow
    batch_size: int = 256  # states per update (B)
    updates_per_step: int = 1  # updates per environment step
    policy_lr: float = 3e-4  # learning rate of the actor
    q_lr: float = 3e-4  # learning rate of the critics
    hidden_dim: int = 256  # width of the hidden layers of actor and critics
    diffusion_steps: int = 100  # denoising steps of the sampler (T)
    improvement_steps: int | None = None  # steps up Q from a stored action (K); None: by env_id
    improvement_lr: float = 0.03  # about the move of a coordinate in such a step, in [-1, 1]
    gradient_ratio: float | None = None  # limit of their gradient (B, d), over d; None: by env_id
    max_grad_norm: float | None = None  # of the gradients of actor and critics; None: by env_id
    slow_actor_interval: int | None = None  # updates between two steps of it; None: by env_id
    reward_scale: float = 1.0  # factor on the rewards that the critics learn from


@dataclass(frozen=True)
class Args(Hyperparameters):
    """The flags of a run, those of learning among them."""

    exp_name: str = "dipo"  # name of this experiment
    seed: int = 1  # seed of everything; a run repeats exactly on the same machine
    track: bool = False  # whether to track this experiment with Weights and Biases
    wandb_project_name: str = "gempo"  # project name at wandb
    wandb_entity: str | None = None  # entity (team) of the wandb project
    capture_video: bool = False  # whether to record an episode of each evaluation
    save_model: bool = False  # whether to save the agent at the end (runs/{run}/{exp_name}.model)
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints; 0: never any
    resume: str | None = None  # a run's folder (runs/{run}) to go on from, with its flags
    extend_to: int | None = None  # a resumed run's new total_timesteps; None: as it was
    env_id: str = "HalfCheetah-v5"  # gymnasium id; `module:id` imports the module first
    num_envs: int = 1  # environments stepped side by side (E)
    total_timesteps: int = 1_000_000  # environment steps in all, counted over all environments
    learning_starts: int = 5_000  # environment steps with random actions (at least one) at first
    buffer_size: int = 1_000_000  # capacity of the replay buffer in transitions
    eval_frequency: int = 10_000  # environment steps between two evaluations; 0: none
    eval_episodes: int = 10  # episodes per evaluation


COUNTS = ("batch_size", "updates_per_step", "hidden_dim", "diffusion_steps")
COUNTS += ("num_envs", "total_timesteps", "buffer_size", "eval_episodes")
NATURALS = ("seed", "checkpoint_frequency", "learning_starts", "eval_frequency")
RESUME_ALONE = "the only flag but for --extend-to: a run keeps its flags"
POSITIVES = ("policy_lr", "q_lr", "improvement_lr", "reward_scale")


def require(args: Args, flag: str, is_allowed: bool, allowed: str) -> None:
    """Exit with one line that names the flag and what it may be, unless `is_allowed`."""
    if not is_allowed:
        name = flag.replace("_", "-")
        raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, flag)}")


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for flag in COUNTS:
        require(args, flag, getattr(args, flag) >= 1, "a whole number, at least 1")
    for flag in NATURALS:
        require(args, flag, getattr(args, flag) >= 0, "a whole number, at least 0")
    require(args, "seed", args.seed < 2**32, "below 2**32")
    is_file_name = not set(args.exp_name) & set("/\\:")
    require(args, "exp_name", is_file_name, "a part of a file's name, without / \\ :")
    for flag in POSITIVES:
        require(args, flag, 0 < getattr(args, flag) < math.inf, "a finite number above 0")
    for flag in ("gamma", "tau"):
        require(args, flag, 0 <= getattr(args, flag) <= 1, "a number from 0 to 1")
    for flag in ("gradient_ratio", "max_grad_norm"):
        value = getattr(args, flag)
        if value is not None:
            require(args, flag, 0 < value < math.inf, "a finite number above 0")
    for flag in ("improvement_steps", "slow_actor_interval"):
        value = getattr(args, flag)
        require(args, flag, value is None or value >= 1, "a whole number, at least 1")
    below = f"below --total-timesteps, {args.total_timesteps}"
    require(args, "learning_starts", args.learning_starts < args.total_timesteps, below)
    at_most = f"at most --buffer-size, {args.buffer_size}"
    require(args, "num_envs", args.num_envs <= args.buffer_size, at_most)
    has_evaluations = args.eval_frequency > 0
    require(args, "capture_video", has_evaluations or not args.capture_video, "off: no evaluations")
    is_used = args.extend_to is None or args.resume is not None
    require(args, "extend_to", is_used, "left out without --resume")
    has_wandb = importlib.util.find_spec("wandb") is not None
    require(args, "track", has_wandb or not args.track, "off: wandb is not installed")
    has_moviepy = importlib.util.find_spec("moviepy") is not None
    what = "off: moviepy is not installed"
    require(args, "capture_video", has_moviepy or not args.capture_video, what)


def learning_part(args: Args) -> Hyperparameters:
    """The flags that learning depends on, with the authors' values where they are None."""
    values = {field.name: getattr(args, field.name) for field in fields(Hyperparameters)}
    if args.improvement_steps is None:
        values["improvement_steps"] = {"HalfCheetah-v5": 40}.get(args.env_id, 20)
    if args.gradient_ratio is None:
        ratios = {"Hopper-v5": 0.3, "Walker2d-v5": 0.08, "HalfCheetah-v5": 0.08}
        values["gradient_ratio"] = ratios.get(args.env_id, 0.1)
    if args.max_grad_norm is None:
        values["max_grad_norm"] = {"Hopper-v5": 1.0, "Ant-v5": 0.8}.get(args.env_id, 2.0)
    if args.slow_actor_interval is None:
        values["slow_actor_interval"] = {"HalfCheetah-v5": 2}.get(args.env_id, 1)
    return Hyperparameters(**values)


# ========================================== ENVIRONMENT ==========================================
def make_env(env_id: str, video_folder: pathlib.Path | None = None) -> gym.Env:
    """An environment with flat observations and actions in [-1, 1]^d.

    Observations of any space that gymnasium can flatten into a Box are flattened (Dict, Tuple,
    ...); actions are scaled. With a `video_folder`, every episode is recorded there. Exits with one
    line that says what fails if the environment cannot be made or has no such form.
    """
    allow_local_modules(env_id)
    try:
        if video_folder is None:
            env = gym.make(env_id)
        else:
            env = gym.make(env_id, render_mode="rgb_array")
            env.reset()
            env.render()  # where nothing can be drawn it fails here, not in the first evaluation
            env = gym.wrappers.RecordVideo(
                env, video_folder, episode_trigger=lambda episode: True, disable_logger=True
            )
        env = gym.wrappers.FlattenObservation(env)
    except Exception as error:  # of any kind: the environment may be the user's own
        flag = "--env-id" if video_folder is None else "--capture-video with --env-id"
        raise SystemExit(f"{flag} {env_id} fails: {one_line(error)}") from None
    check_spaces(env, env_id)
    # Not under "episode", the default: an environment may have statistics of its own there.
    env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="whole_episode")
    # RescaleAction, below, hands it actions that may be outside of the bounds by a rounding error.
    clip = partial(np.clip, a_min=env.action_space.low, a_max=env.action_space.high)
    env = gym.wrappers.TransformAction(env, clip, env.action_space)
    # Bounds in float32, or the rescaled space's actions would be float64.
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def check_spaces(env: gym.Env, env_id: str) -> None:
    """Exit with one line unless observations are a Box and actions a bounded Box of floats."""
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(obs_space, gym.spaces.Box):
        raise SystemExit(
            f"--env-id {env_id} has observations {obs_space}, of which gymnasium's "
            "FlattenObservation cannot make a Box: wrap the environment"
        )
    is_box = isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
    is_continuous = is_box and np.issubdtype(action_space.dtype, np.floating)
    is_bounded = is_box and action_space.is_bounded()
    if not (is_continuous and is_bounded and (action_space.low < action_space.high).all()):
        raise SystemExit(
            f"--env-id {env_id} has actions {action_space}, which must be a bounded Box of floats "
            "with one axis and low < high: wrap the environment in a gymnasium.ActionWrapper"
        )


def allow_local_modules(env_id: str) -> None:
    """Let an environment's id `module:id` name a module in the working directory."""
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """`num_envs` environments side by side; one that ends an episode is reset in the same step.

    By default gymnasium spends the next step on the reset and ignores its action, which would make
    a false transition.
    """

    def make_one():
        return EpisodeInfo(make_env(env_id))

    same_step = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([make_one] * num_envs, autoreset_mode=same_step)


class EpisodeInfo(gym.Wrapper):
    """Keeps of `info` only what `episode_charts` reads, at an episode's last step, as floats.

    gymnasium stacks the environments' infos in arrays with the shape and the type of the first: those
    of other environments may not fit, or may be rounded.
    """

    def reset(self, **options):
        obs, _ = self.env.reset(**options)
        return obs, {}

    def step(self, action):
        *transition, info = self.env.step(action)
        kept = {}
        if "whole_episode" in info:
            charts = {name: float(value) for name, value in info.get("charts", {}).items()}
            kept = {"whole_episode": info["whole_episode"], "charts": charts}
        return *transition, kept


def episode_seeds(seed: int, count: int) -> list[int]:
    """`count` seeds drawn from `seed`, so that runs with seeds 1 and 2 share none.

    They are below 2**32: dm_control's environments take no greater ones.
    """
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def episode_charts(infos: dict, index: int) -> dict[str, float]:
    """Return and length of the episode that environment `index` has just ended.

    An environment may put scalars of its own into info["charts"] at an episode's last step; they
    are logged beside these.
    """
    final = infos["final_info"]
    statistics = final["whole_episode"]
    charts = {
        "charts/episodic_return": statistics["r"][index],
        "charts/episodic_length": statistics["l"][index],
    }
    own_charts = final.get("charts", {})
    for name, values in own_charts.items():
        reported = own_charts.get(f"_{name}")  # gymnasium's mask: which environments have the value
        if reported is not None and reported[index]:
            charts[f"charts/{name}"] = values[index]
    return charts


# =========================================== NETWORKS ============================================
ORTHOGONAL = nn.initializers.orthogonal(math.sqrt(2))  # of every layer, as in the released code
Dense = partial(nn.Dense, kernel_init=ORTHOGONAL)
TIME_DIM = 64  # width of the time features (released code)
STATE_DIM = 128  # width of the state features (released code)


def mish(x: jax.Array) -> jax.Array:
    """Mish, x tanh(log(1 + e^x)), as x - 2x / (e^2x + 2e^x + 2): one exponential."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # beyond 20 mish(x) is x; the gradient would overflow at 44
    return x - 2.0 * x / (e * (e + 2.0) + 2.0)


class Actor(nn.Module):
    """The denoiser eps_hat(x_t, t, s): an MLP 3x256 on [x_t, f(t), g(s)].

    The first layer W [x, f, g] + b is written as a sum, W_x x + (W_t f + b) + W_s g. The sampler
    then computes W_s g (`embed_obs`) once a state and W_t f + b (`embed_time`) once a time, and not
    for every particle at every time: 36% fewer multiply-adds at the default sizes. In a network of
    your own, both may return their argument and `denoise` do it all, on inputs whose batch axes only
    broadcast; it keeps the field `dot`.
    """

    action_dim: int
    hidden_dim: int = 256
    dot: Any = jax.lax.dot_general  # the product of hidden_1, hidden_2, output

    def setup(self):
        width = self.hidden_dim
        self.frequencies = self.param("frequencies", nn.initializers.normal(0.2), (TIME_DIM // 2,))
        self.time_features = nn.Sequential([Dense(TIME_DIM), mish, Dense(TIME_DIM), mish])
        self.obs_features = nn.Sequential([Dense(STATE_DIM), mish, Dense(STATE_DIM), mish])
        # One matrix W = [W_x, W_t, W_s], orthogonal as a whole, as that of a first layer would be.
        inputs = self.action_dim + TIME_DIM + STATE_DIM
        kernel = self.param("first_kernel", ORTHOGONAL, (inputs, width))
        splits = [self.action_dim, self.action_dim + TIME_DIM]
        self.kernel_x, self.kernel_t, self.kernel_s = jnp.split(kernel, splits)
        self.first_bias = self.param("first_bias", nn.initializers.zeros, (width,))
        self.hidden_1 = Dense(width, dot_general=self.dot)
        self.hidden_2 = Dense(width, dot_general=self.dot)
        self.output = Dense(self.action_dim, dot_general=self.dot)

    def embed_time(self, t):
        """W_t f(t) + b (..., hidden_dim) at times t (..., 1); f: learned frequencies, 2 layers."""
        angles = 2 * jnp.pi * t * self.frequencies
        fourier = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.time_features(fourier) @ self.kernel_t + self.first_bias

    def embed_obs(self, obs):
        """W_s g(s) (..., hidden_dim) at observations (..., obs_dim); g: 2 layers."""
        return self.obs_features(obs) @ self.kernel_s

    def denoise(self, x, time_embedding, obs_embedding):
        """eps_hat (..., d) at x (..., d); the embeddings broadcast over the leading axes."""
        h = mish(x @ self.kernel_x + (time_embedding + obs_embedding))
        h = h.reshape(-1, self.hidden_dim)  # products of 3 axes have slow gradients on a CPU
        h = mish(self.hidden_1(h))
        h = mish(self.hidden_2(h))
        return self.output(h).reshape(x.shape)

    def __call__(self, x, t, obs):
        """eps_hat (..., d) at noisy actions x (..., d), times t (..., 1) and obs (..., obs_dim)."""
        return self.denoise(x, self.embed_time(t), self.embed_obs(obs))


class Critic(nn.Module):
    """Q(s, a) (...), an MLP 2x256 ReLU, at obs (..., obs_dim) and actions (..., d), broadcast."""

    hidden_dim: int = 256

    @nn.compact
    def __call__(self, obs, actions):
        # The first layer on [s, a] is a sum: W_s s is computed once for all actions of a state.
        obs_dim = obs.shape[-1]
        inputs = obs_dim + actions.shape[-1]
        kernel = self.param("first_kernel", ORTHOGONAL, (inputs, self.hidden_dim))
        bias = self.param("first_bias", nn.initializers.zeros, (self.hidden_dim,))
        h = nn.relu((obs @ kernel[:obs_dim] + bias) + actions @ kernel[obs_dim:])
        leading = h.shape[:-1]
        h = h.reshape(-1, self.hidden_dim)
        h = nn.relu(Dense(self.hidden_dim)(h))
        return Dense(1)(h).reshape(leading)


# Two critics with parameters of their own on the same inputs: values (2, ...).
TwinCritic = nn.vmap(
    Critic, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
)


# =========================================== DIFFUSION ===========================================
T_MIN, T_MAX = 0.001, 0.9946  # (released code); at t = 1 the schedule would leave no signal


def noise_schedule(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps, at t in [0, 1] (cosine schedule).

    alpha_t = cos(u_t) / cos(u_0) with u_t = pi/2 (t + .008) / 1.008, and sigma_t^2 = 1 - alpha_t^2,
    written as a product of sines, cos^2 u_0 - cos^2 u = sin(u - u_0) sin(u + u_0), so that nothing
    cancels where t is small.
    """
    u_0 = math.pi / 2 * 0.008 / 1.008
    rise = math.pi / 2 * t / 1.008  # u_t - u_0
    alpha = jnp.cos(u_0 + rise) / math.cos(u_0)
    sigma = jnp.sqrt(jnp.sin(rise) * jnp.sin(rise + 2 * u_0)) / math.cos(u_0)
    return alpha, sigma


def draw_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal variates of `shape`; drawn as a vector, which XLA compiles much faster."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def add_noise(key: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Diffuse actions (..., d) to uniform times: x_t (..., d), t (..., 1) and eps (..., d)."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.uniform(t_key, (*actions.shape[:-1], 1), minval=T_MIN, maxval=T_MAX)
    eps = draw_normal(eps_key, actions.shape)
    alpha, sigma = noise_schedule(t)
    return alpha * actions + sigma * eps, t, eps


class DenoisingStep(NamedTuple):
    """What the sampler needs for its step from time t_i to t_{i-1}; stacked over i = 1..T."""

    alpha: jax.Array  # alpha and sigma at t_i
    sigma: jax.Array
    x_0_weight: jax.Array  # the mean of x_{i-1} is x_0_weight x_0 + x_weight x_i
    x_weight: jax.Array
    noise_std: jax.Array  # sqrt(beta_i), and none in the last step
    time_embedding: jax.Array
    noise: jax.Array


def sample_actions(
    actor: Actor, params, obs, key, num_samples: int, num_steps: int, noise: float = 1.0
) -> jax.Array:
    """Draw actions (B, num_samples, d) in [-1, 1] at observations (B, obs_dim).

    Ancestral DDPM sampling on a uniform grid of times t_T = T_MAX, ..., t_0 = T_MIN: noise was added
    by x_i = a_i x_{i-1} + sqrt(beta_i) eps, so it is taken away by the mean of x_{i-1} given x_i and
    the predicted x_0, which is clipped to the box of actions; the noise of a step back has the
    standard deviation sqrt(beta_i) times `noise`. The action is the mean at t_0.
    """
    with jax.ensure_compile_time_eval():  # constants of the compiled program
        times = jnp.linspace(T_MIN, T_MAX, num_steps + 1)
        alpha, sigma = noise_schedule(times)
    a = alpha[1:] / alpha[:-1]
    beta = 1 - a**2  # since alpha^2 + sigma^2 = 1
    # x_T and the noise of all steps in one draw: many small ones would take longer.
    shape = num_steps + 1, obs.shape[0], num_samples, actor.action_dim
    eps = draw_normal(key, shape)
    # Arrays over i = 1..T; the scan goes through them backwards.
    steps = DenoisingStep(
        alpha=alpha[1:],
        sigma=sigma[1:],
        x_0_weight=alpha[:-1] * beta / sigma[1:] ** 2,
        x_weight=a * sigma[:-1] ** 2 / sigma[1:] ** 2,
        noise_std=jnp.sqrt(beta).at[0].set(0.0),  # none in the last step
        time_embedding=actor.apply(params, times[1:, None], method="embed_time"),
        noise=eps[1:],
    )
    obs_embedding = actor.apply(params, obs[:, None], method="embed_obs")  # (B, 1, hidden_dim)

    def denoising_step(x, step: DenoisingStep):
        eps_hat = actor.apply(params, x, step.time_embedding, obs_embedding, method="denoise")
        x_0 = jnp.clip((x - step.sigma * eps_hat) / step.alpha, -1.0, 1.0)
        mean = step.x_0_weight * x_0 + step.x_weight * x
        return mean + noise * step.noise_std * step.noise, None

    # In each round of a loop a GPU launches kernels that only count and slice: there it is unrolled.
    # A CPU would gain nothing and take half as long again to compile.
    unroll = jax.default_backend() != "cpu"
    x, _ = jax.lax.scan(denoising_step, eps[0], steps, reverse=True, unroll=unroll)
    return jnp.clip(x, -1.0, 1.0)  # the last mean may leave the box a little


# ========================================= REPLAY BUFFER =========================================
class Transition(NamedTuple):
    """Transitions as arrays with one batch axis of E, B or all rows: obs (E, obs_dim), rewards (E,)."""

    obs: Any
    actions: Any  # in [-1, 1]
    rewards: Any
    next_obs: Any  # the true last observation where an episode ended
    terminations: Any  # 1.0 where the episode terminated; a truncated one counts as going on
    improved: Any = None  # the action as improved so far, in the buffer; None outside of it


class ReplayBuffer(NamedTuple):
    """A ring of transitions in the device's memory, and how many have ever been written to it."""

    storage: Transition
    count: jax.Array


def create_buffer(capacity: int, obs_dim: int, action_dim: int) -> ReplayBuffer:
    """An empty buffer of `capacity` transitions, float32."""
    shapes = Transition((obs_dim,), (action_dim,), (), (obs_dim,), (), (action_dim,))
    storage = Transition(*(jnp.zeros((capacity, *shape)) for shape in shapes))
    return ReplayBuffer(storage, jnp.zeros((), jnp.int32))


@partial(jax.jit, donate_argnames="buffer")
def add_transitions(buffer: ReplayBuffer, transitions: Transition) -> ReplayBuffer:
    """Write E transitions over the oldest ones, in place: the buffer passed in is gone.

    Raises ValueError for more transitions than the buffer holds, and for arrays of other shapes.
    """
    capacity, rows = len(buffer.storage.rewards), len(transitions.rewards)
    if rows > capacity:
        raise ValueError(f"{rows} transitions do not fit into a buffer of {capacity}")
    transitions = transitions._replace(improved=transitions.actions)
    for name, old, new in zip(Transition._fields, buffer.storage, transitions, strict=True):
        if new.shape != (rows, *old.shape[1:]):  # it might be broadcast without a word
            raise ValueError(f"{name} has the shape {new.shape}, not {(rows, *old.shape[1:])}")
    places = (buffer.count + jnp.arange(rows)) % capacity
    storage = jax.tree.map(lambda old, new: old.at[places].set(new), buffer.storage, transitions)
    return ReplayBuffer(storage, buffer.count + rows)


def sample_batch(buffer: ReplayBuffer, key: jax.Array, batch_size: int) -> Transition:
    """Draw `batch_size` transitions uniformly, with replacement."""
    filled = jnp.minimum(buffer.count, len(buffer.storage.rewards))
    rows = jax.random.randint(key, (batch_size,), 0, filled)
    return jax.tree.map(lambda stored: stored[rows], buffer.storage)


# ====================================== ACTION IMPROVEMENT =======================================
ADAM_EPS = 1e-5  # of every Adam here (authors' code)


def improve_actions(agent: "Agent", obs: jax.Array, actions: jax.Array) -> jax.Array:
    """Actions (B, d) after K steps of a fresh Adam up min_j Q_j at obs (B, obs_dim), in the box.

    The norm that is limited is that of the whole gradient (B, d).
    """
    args, critic_params = agent.args, agent.params["critic"]
    max_norm = args.gradient_ratio * agent.action_dim
    optimizer = optax.chain(
        optax.clip_by_global_norm(max_norm), optax.adam(args.improvement_lr, eps=ADAM_EPS)
    )

    def loss(actions):
        return -agent.critic.apply(critic_params, obs, actions).min(axis=0).sum()

    def climb(carry, _):
        actions, opt_state = carry
        changes, opt_state = optimizer.update(jax.grad(loss)(actions), opt_state)
        return (jnp.clip(actions + changes, -1.0, 1.0), opt_state), None

    start = actions, optimizer.init(actions)
    (actions, _), _ = jax.lax.scan(climb, start, length=args.improvement_steps)
    return actions


def write_rows(stored: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """`stored` with values (B, d) in its rows (B,); of equal rows the last one counts.

    The others are sent out of range: on a GPU, which of them is written last would be left to chance.
    """
    order = jnp.arange(len(rows))
    is_overwritten = (rows[:, None] == rows) & (order[:, None] < order)  # (B, B)
    places = jnp.where(is_overwritten.any(axis=1), len(stored), rows)
    return stored.at[places].set(values, mode="drop")


# =========================================== LEARNING ============================================
class Agent(struct.PyTreeNode):
    """All that learning changes, and what is fixed: hyperparameters and dimensions (static)."""

    params: dict  # "actor" and "critic"
    slow_params: dict  # "actor" and "critic": copies that follow by tau
    opt_state: Any
    num_updates: jax.Array
    args: Hyperparameters = struct.field(pytree_node=False)
    obs_dim: int = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @property
    def actor(self) -> Actor:
        return Actor(self.action_dim, self.args.hidden_dim)

    @property
    def critic(self) -> nn.Module:
        return TwinCritic(self.args.hidden_dim)


def make_optimizer(args: Hyperparameters) -> optax.GradientTransformation:
    """Adam on clipped gradients, with a learning rate for each of the two parts."""

    def clipped_adam(learning_rate):
        clip = optax.clip_by_global_norm(args.max_grad_norm)
        return optax.chain(clip, optax.adam(learning_rate, eps=ADAM_EPS))

    optimizers = {"actor": clipped_adam(args.policy_lr), "critic": clipped_adam(args.q_lr)}
    return optax.multi_transform(optimizers, {part: part for part in optimizers})


def create_agent(args: Args, obs_dim: int, action_dim: int, key: jax.Array) -> Agent:
    """A new agent: orthogonal networks, and slow copies equal to them."""
    hyperparameters = learning_part(args)
    actor_key, critic_key = jax.random.split(key)
    obs, actions, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)), jnp.zeros((1, 1))
    params = {
        "actor": Actor(action_dim, args.hidden_dim).init(actor_key, actions, t, obs),
        "critic": TwinCritic(args.hidden_dim).init(critic_key, obs, actions),
    }
    return Agent(
        params=params,
        slow_params=jax.tree.map(jnp.copy, params),  # train_step cannot donate an array twice
        opt_state=make_optimizer(hyperparameters).init(params),
        num_updates=jnp.zeros((), jnp.int32),
        args=hyperparameters,
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def td_targets(agent: Agent, batch: Transition, key: jax.Array) -> jax.Array:
    """y = r + gamma (1 - terminated) min_j Q_target_j(s', a') (B,), a' a sample of the slow actor."""
    args = agent.args
    params, target_params = agent.slow_params["actor"], agent.slow_params["critic"]
    next_actions = sample_actions(
        agent.actor, params, batch.next_obs, key, num_samples=1, num_steps=args.diffusion_steps
    )
    next_actions = next_actions[:, 0]
    next_q = agent.critic.apply(target_params, batch.next_obs, next_actions).min(axis=0)
    return args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminations) * next_q


def critic_loss(params, critic: nn.Module, batch: Transition, targets: jax.Array) -> jax.Array:
    """Mean squared TD error of both critics against targets (B,)."""
    q_values = critic.apply(params, batch.obs, batch.actions)  # (2, B)
    return jnp.mean((q_values - targets) ** 2)


def actor_loss(params, actor: Actor, obs, actions, key) -> jax.Array:
    """Denoising loss (behaviour cloning) of actions (B, d): the mean of (eps_hat - eps)^2."""
    x_t, t, eps = add_noise(key, actions)
    return jnp.mean((actor.apply(params, x_t, t, obs) - eps) ** 2)


def update(agent: Agent, batch: Transition, obs, improved, key: jax.Array) -> tuple[Agent, dict]:
    """One gradient step of the critics on B transitions, of the actor on B improved actions.

    obs (B, obs_dim) and improved (B, d) are drawn apart from the batch. Also scalars to log.
    """
    args = agent.args
    next_key, loss_key = jax.random.split(key)
    targets = td_targets(agent, batch, next_key)
    q_values = agent.critic.apply(agent.params["critic"], batch.obs, batch.actions)

    def loss(params):  # the two losses share no parameters, so one gradient of the sum serves both
        q_loss = critic_loss(params["critic"], agent.critic, batch, targets)
        pi_loss = actor_loss(params["actor"], agent.actor, obs, improved, loss_key)
        # Both critics' losses are summed, since the norm of the gradient is clipped.
        return 2 * q_loss + pi_loss, {"critic_loss": q_loss, "actor_loss": pi_loss}

    grads, losses = jax.grad(loss, has_aux=True)(agent.params)
    changes, opt_state = make_optimizer(args).update(grads, agent.opt_state)
    agent = step_agent(agent, optax.apply_updates(agent.params, changes), opt_state)

    metrics = {f"losses/{name}": value for name, value in losses.items()}
    metrics["losses/q_values"] = q_values.mean()
    metrics["charts/params_norm"] = optax.tree.norm(agent.params)  # NaN if any parameter is
    return agent, metrics


def step_agent(agent: Agent, params: dict, opt_state: Any) -> Agent:
    """The agent with new parameters, which the slow copies follow, the actor's not always."""
    num_updates = agent.num_updates + 1
    has_actor_turn = num_updates % agent.args.slow_actor_interval == 0
    slow_params = optax.incremental_update(params, agent.slow_params, agent.args.tau)
    slow_params["actor"] = jax.tree.map(
        partial(jnp.where, has_actor_turn), slow_params["actor"], agent.slow_params["actor"]
    )
    return agent.replace(
        params=params, slow_params=slow_params, opt_state=opt_state, num_updates=num_updates
    )


@partial(jax.jit, static_argnames="num_updates", donate_argnames=("agent", "buffer"))
def learn(agent: Agent, buffer: ReplayBuffer, key, num_updates: int):
    """Make `num_updates` updates on batches of the buffer, whose actions they improve.

    Returns agent, buffer, and the mean of the metrics; the agent and the buffer passed in are gone.
    """
    # Only this array changes. The others stay outside of the loop, which would copy them.
    all_improved = buffer.storage.improved
    fixed = buffer._replace(storage=buffer.storage._replace(improved=None))
    filled = jnp.minimum(buffer.count, len(all_improved))

    def sample_and_update(carry, key):
        agent, all_improved = carry
        batch_key, rows_key, update_key = jax.random.split(key, 3)
        batch = sample_batch(fixed, batch_key, agent.args.batch_size)
        rows = jax.random.randint(rows_key, (agent.args.batch_size,), 0, filled)
        obs = buffer.storage.obs[rows]
        improved = improve_actions(agent, obs, all_improved[rows])
        shift = jnp.abs(improved - all_improved[rows]).mean()
        all_improved = write_rows(all_improved, rows, improved)
        agent, metrics = update(agent, batch, obs, improved, update_key)
        return (agent, all_improved), metrics | {"charts/action_shift": shift}

    keys = jax.random.split(key, num_updates)
    (agent, all_improved), metrics = jax.lax.scan(sample_and_update, (agent, all_improved), keys)
    buffer = buffer._replace(storage=buffer.storage._replace(improved=all_improved))
    return agent, buffer, jax.tree.map(jnp.mean, metrics)


@partial(jax.jit, donate_argnames=("agent", "buffer"))
def train_step(agent: Agent, buffer: ReplayBuffer, transitions: Transition, key, step: int):
    """The device's work of a step: insert E transitions, then make E * updates_per_step updates.

    Returns agent, buffer and metrics; the agent and the buffer passed in are gone. `key` may be
    the same at each call, `step` may not: the random numbers are made from both.
    """
    buffer = add_transitions(buffer, transitions)
    num_updates = len(transitions.rewards) * agent.args.updates_per_step
    return learn(agent, buffer, jax.random.fold_in(key, step), num_updates)


@partial(jax.jit, static_argnames="training")
def act(agent: Agent, obs: jax.Array, key, step: int, training: bool) -> jax.Array:
    """Actions (E, d) in [-1, 1] at observations (E, obs_dim): a sample.

    Outside of training its steps add no noise. `key` may be the same at each call, `step` may not.
    """
    args = agent.args
    key = jax.random.fold_in(key, step)
    noise = 1.0 if training else 0.0
    params = agent.params["actor"]
    actions = sample_actions(agent.actor, params, obs, key, 1, args.diffusion_steps, noise)
    return actions[:, 0]


# ========================================== EVALUATION ===========================================
MAX_EVAL_STEPS = 10_000  # an episode that does not end by itself is cut here
EVAL_SEED_STRIDE = 1_000_003  # keeps the seeds of two evaluations apart


def evaluate(agent: Agent, envs: list[gym.Env], seed: int, run: "RunFolder | None" = None) -> dict:
    """Play an episode in each environment as `act` does outside of training; the scores to log.

    Depends on agent and seed alone. A signal to the `run` ends it early, without scores.
    """
    seeds = episode_seeds(seed, len(envs))
    obs = [env.reset(seed=own_seed)[0] for env, own_seed in zip(envs, seeds, strict=True)]
    obs = np.stack(obs).astype(np.float32)
    returns = np.zeros(len(envs))
    lengths = np.zeros(len(envs), int)
    running = list(range(len(envs)))
    key = jax.random.key(seed)
    for step in range(MAX_EVAL_STEPS):
        if not running:
            break
        if run is not None and run.stop_signal:
            return {}
        actions = np.asarray(act(agent, obs, key, step, training=False))
        for i in running.copy():
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                running.remove(i)
    return {
        "eval/episodic_return": returns.mean(),
        "eval/episodic_return_std": returns.std(),
        "eval/episodic_length": lengths.mean(),
    }


# =========================================== TRAINING ============================================
LOG_FREQUENCY = 100  # environment steps between two entries of the losses


class State(NamedTuple):
    """All that training changes: a checkpoint is one of these, and the flags.

    Resuming is exact, on the same machine, because learning depends on nothing else. Random keys are
    made from the seed and the step (`jax.random.fold_in`), so there are none to keep; environments
    are saved with their simulators and random generators (where they can be pickled; a line says so
    where not); what TensorBoard was told after the checkpoint is dropped and told again. Only an
    evaluation that a signal cut short is not made up for.
    """

    step: int  # environment steps made, over all environments
    agent: Agent
    buffer: ReplayBuffer
    envs: gym.vector.VectorEnv
    obs: np.ndarray  # (E, obs_dim), what the environments show now
    transitions: Transition | None  # of the last step: they enter the buffer in the next one


def make_eval_envs(args: Args, run_folder: pathlib.Path, first_step: int) -> list[gym.Env]:
    """An environment for each episode of an evaluation; --capture-video records the first one."""
    if args.eval_frequency == 0:
        return []
    videos = run_folder / "videos" / f"from-step-{first_step}" if args.capture_video else None
    others = [make_env(args.env_id) for _ in range(args.eval_episodes - 1)]
    return [make_env(args.env_id, videos), *others]


def run_keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of a run: for the networks, for acting and for learning."""
    init_key, act_key, update_key = jax.random.split(jax.random.key(seed), 3)
    return init_key, act_key, update_key


def create_state(args: Args) -> State:
    """The beginning of a run; exits with one line if a flag is not allowed."""
    check_args(args)
    choose_renderer(args)
    envs = make_envs(args.env_id, args.num_envs)
    envs.action_space.seed(args.seed)
    obs, _ = envs.reset(seed=episode_seeds(args.seed, args.num_envs))
    dims = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    init_key, _, _ = run_keys(args.seed)
    agent = create_agent(args, *dims, init_key)
    try:
        buffer = create_buffer(args.buffer_size, *dims)
    except jax.errors.JaxRuntimeError:
        what = "does not fit into the device's memory"
        raise SystemExit(f"--buffer-size must be smaller: {args.buffer_size} {what}") from None
    return State(0, agent, buffer, envs, obs.astype(np.float32), None)


def is_due(frequency: int, before: int, after: int) -> bool:
    """Whether a multiple of `frequency` lies among the steps before+1..after; never if it is 0."""
    return frequency > 0 and after // frequency > before // frequency


def train(args: Args, state: State, run: "RunFolder") -> Agent:
    """Act, learn, step the environments and log, until `total_timesteps` or a signal."""
    _, act_key, update_key = run_keys(args.seed)
    eval_envs = make_eval_envs(args, run.path, state.step)
    run.require_finite(state.step, observations=state.obs)
    while state.step < args.total_timesteps and not run.stop_signal:
        before, agent, buffer, envs, obs, transitions = state
        step = before + args.num_envs  # environment steps made by the end of this round
        is_learning = before >= args.learning_starts and transitions is not None

        # 1. Act: uniformly at first, then by the policy.
        if is_learning:
            actions = act(agent, obs, act_key, before, training=True)
        else:
            actions = envs.action_space.sample()

        # 2. Learn. JAX returns before the device is done: np.asarray(actions) below waits for `act`
        #    alone, which was called first, and the updates run while the CPU steps the environments.
        #    The price: compared with acting, stepping and then learning, the policy that acts lacks
        #    the updates that use the last transitions (with one environment, by default one update).
        if is_learning:
            agent, buffer, metrics = train_step(agent, buffer, transitions, update_key, before)
        elif transitions is not None:
            buffer = add_transitions(buffer, transitions)

        # 3. Step the environments. Only a termination has no future: a truncated episode bootstraps
        #    from its true last observation; new_obs is then the first one of the next episode.
        actions = np.asarray(actions)
        run.require_finite(step, actions=actions)
        new_obs, rewards, terminations, truncations, infos = envs.step(actions)
        new_obs, rewards = np.float32(new_obs), np.float32(rewards)
        next_obs = new_obs.copy()
        ended = np.flatnonzero(terminations | truncations)
        for i in ended:
            next_obs[i] = infos["final_obs"][i]
        run.require_finite(step, observations=(next_obs, new_obs), rewards=rewards)
        transitions = Transition(obs, actions, rewards, next_obs, np.float32(terminations))
        state = State(step, agent, buffer, envs, new_obs, transitions)

        # 4. Once in a while: log, evaluate, save. This waits for the updates; else the next act does.
        for i in ended:
            run.log(before + i + 1, episode_charts(infos, i))  # environment i steps i-th
        if is_learning and is_due(LOG_FREQUENCY, before, step):
            scalars = jax.device_get(metrics)
            run.require_finite(step, **scalars)
            run.log(step, scalars | run.speed())
        if is_learning and is_due(args.eval_frequency, before, step):
            scores = evaluate(agent, eval_envs, args.seed + EVAL_SEED_STRIDE * step, run)
            run.require_finite(step, **scores)
            run.log(step, scores)
            if args.capture_video:
                run.save_video(step, eval_envs[0])
        if is_due(args.checkpoint_frequency, before, step):
            run.save(state)
        run.show_progress(step)
    run.finish(state)
    for env in (state.envs, *eval_envs):
        env.close()
    return state.agent


def main(args: Args) -> Agent:
    """Train an agent, or go on training one, and return it; after a signal, exit with its code."""
    is_extended = args.extend_to is not None
    args, state = (args, create_state(args)) if args.resume is None else load_state(args)
    with RunFolder(args, state.step) as run:
        if is_extended:
            run.save(state)  # with the new length, which a crash can then not undo
        agent = train(args, state, run)
    if run.stop_signal:
        raise SystemExit(128 + run.stop_signal)
    return agent


# ========================================== RUN FOLDER ===========================================
# Nothing below is needed to understand the method: log, progress, checkpoints, signals, errors.


class RunFolder:
    """The folder of a run, and its TensorBoard log, progress, checkpoints and signals.

    One process writes a folder at a time. The first SIGINT or SIGTERM sets `stop_signal`, on which
    `train` ends after the step it is in; a second one ends the process at once.
    """

    def __init__(self, args: Args, first_step: int):
        self.args = args
        self.stop_signal = 0
        self.saved_step = first_step if args.resume else None
        env_name = args.env_id.replace("/", "-").replace(":", "-")
        name = f"{env_name}__{args.exp_name}__{args.seed}"
        try:
            self.path = pathlib.Path(args.resume) if args.resume else create_folder(name)
            self.lock = lock_folder(self.path)
            start_tracking(args, self.path)
            # Not imported by its name: wandb.init has put a class that it follows in its place.
            self.writer = event_file_writer.EventFileWriter(str(self.path), flush_secs=30)
        except OSError as error:
            what = "cannot be written, or another process is writing it"
            raise SystemExit(f"{args.resume or 'runs'} {what}: {one_line(error)}") from None
        if args.resume:
            # TensorBoard drops what earlier files say of steps after `first_step`.
            start = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=first_step + 1, session_log=start)
            self.writer.add_event(event)
        table = text_pb("hyperparameters", hyperparameters_table(args))
        self.writer.add_event(Event(wall_time=time.time(), step=first_step, summary=table))
        self.start_progress(first_step)

    def __enter__(self):
        self.old_handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old_handlers[number] = signal.signal(number, self.receive_signal)
        return self

    def __exit__(self, error_type, error, traceback):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        is_failed = error_type is not None
        try:
            self.writer.close()
        except OSError as close_error:
            if not is_failed:
                is_failed = True
                raise SystemExit(f"the log is cut off: {one_line(close_error)}") from None
        finally:
            self.lock.close()
            stopped = 128 + self.stop_signal if self.stop_signal else 0
            stop_tracking(self.args, exit_code=1 if is_failed else stopped)

    def receive_signal(self, number, frame):
        """The first signal asks `train` to stop; a second one ends the process.

        Within a second it does nothing: timeout(1) and batch systems send the same signal twice.
        """
        now = time.monotonic()
        if not self.stop_signal:
            self.stop_signal = number
            self.signal_time = now
        elif now > self.signal_time + 1:
            os._exit(128 + number)

    # ------------------------------------------- log -------------------------------------------
    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars to TensorBoard; a full disk ends the run with one line."""
        values = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            self.writer.add_event(event)
        except OSError as error:
            self.stop(step, error)
        if "charts/episodic_return" in scalars:
            self.shown["return"] = f"{scalars['charts/episodic_return']:.1f}"
        if "eval/episodic_return" in scalars:
            self.shown["evaluation"] = f"{scalars['eval/episodic_return']:.1f}"
            self.print_line(step)
        self.bar.set_postfix(self.shown, refresh=False)

    def require_finite(self, step: int, **values) -> None:
        """End the run with one line if a value is not finite, before it is used or kept."""
        for name, arrays in values.items():
            if not all(np.isfinite(array).all() for array in jax.tree.leaves(arrays)):
                self.stop(step, f"non-finite {name}")

    def stop(self, step: int, reason) -> None:
        """Exit with one line that names the step, the reason and the last checkpoint."""
        saved = "none" if self.saved_step is None else f"step {self.saved_step}"
        line = f"stopped at step {step}: {one_line(reason)}; last checkpoint: {saved}"
        raise SystemExit(line) from None

    # ----------------------------------------- progress ----------------------------------------
    def start_progress(self, first_step: int) -> None:
        """A bar on a terminal; lines elsewhere."""
        self.first_step = first_step
        self.shown = {}  # last episodic return and evaluation
        self.durations = collections.deque(maxlen=50)  # seconds of the last learning steps
        self.step_time = self.line_time = time.monotonic()
        self.is_long_run_announced = False
        device = jax.devices()[0].device_kind
        print(f"{self.args.env_id} on {device}: tensorboard --logdir {self.path}", flush=True)
        self.bar = tqdm(
            initial=first_step,
            total=self.args.total_timesteps,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            unit="step",
            dynamic_ncols=True,
        )

    def speed(self) -> dict[str, float]:
        """Environment steps per second, by the median of the last 50 steps; empty before learning.

        The median leaves out compiling, evaluations and checkpoints.
        """
        if not self.durations:
            return {}
        return {"charts/SPS": self.args.num_envs / float(np.median(self.durations))}

    def show_progress(self, step: int) -> None:
        """Call once a step: moves the bar, or prints a line every 30 seconds."""
        now = time.monotonic()
        self.durations.append(now - self.step_time)
        self.step_time = now
        if step <= max(self.args.learning_starts, self.first_step) + 2 * self.args.num_envs:
            self.durations.clear()  # random steps, and the first ones, which compile
        # Not after the first steps, one of which may have compiled.
        if len(self.durations) == self.durations.maxlen:
            self.announce_long_run(step)
        self.bar.update(step - self.bar.n)
        if now - self.line_time > 30:
            self.print_line(step)

    def print_line(self, step: int) -> None:
        """Where there is no bar, one line: step, last return and evaluation, speed, time left."""
        self.line_time = time.monotonic()
        if not self.bar.disable:
            return
        total = self.args.total_timesteps
        parts = [f"step {step:,} of {total:,}"]
        parts += [f"{name} {value}" for name, value in self.shown.items()]
        for speed in self.speed().values():
            left = tqdm.format_interval((total - step) / speed)
            parts += [f"{speed:.3g} steps/s", f"{left} left"]
        try:
            print(", ".join(parts), flush=True)
        except OSError as error:  # into a file on a full disk
            self.stop(step, error)

    def announce_long_run(self, step: int) -> None:
        """Say once how long a run without an accelerator will take, if more than an hour."""
        if self.is_long_run_announced or jax.default_backend() != "cpu":
            return
        self.is_long_run_announced = True
        hours = (self.args.total_timesteps - step) / self.speed()["charts/SPS"] / 3600
        if hours > 1:
            line = f"This run will take about {hours:.0f} hours on this CPU; README.md has sizes"
            tqdm.write(f"{line} for a CPU under 'On a laptop'.", sys.stdout)

    # ---------------------------------------- checkpoints --------------------------------------
    def save(self, state: State) -> None:
        """Write checkpoints/{step}; the checkpoint before it is kept, older ones are removed."""
        content = agent_content(self.args, state.agent) | training_content(state)
        self.require_finite(state.step, parameters=content["leaves"])
        folder = self.path / "checkpoints"
        try:
            self.writer.flush()  # the log is never behind a checkpoint
            folder.mkdir(exist_ok=True)
            for unfinished in folder.glob("*.tmp"):  # of a process that was killed while it saved
                unfinished.unlink()
            write_file(folder / str(state.step), content)
            for old_step in checkpoint_steps(folder)[:-2]:
                (folder / str(old_step)).unlink()
        except OSError as error:
            self.stop(state.step, error)
        self.saved_step = state.step

    def save_video(self, step: int, env: gym.Env) -> None:
        """Write the film of an evaluation; its wrapper would keep it in memory until the next one."""
        try:
            if env.get_wrapper_attr("recording"):
                env.get_wrapper_attr("stop_recording")()
        except OSError as error:
            self.stop(step, error)

    def finish(self, state: State) -> None:
        """The last checkpoint, and the saved model."""
        if self.args.checkpoint_frequency and self.saved_step != state.step:
            self.save(state)
        if self.args.save_model:
            self.require_finite(state.step, parameters=state.agent.params)
            try:
                save_agent(self.path / f"{self.args.exp_name}.model", self.args, state.agent)
            except OSError as error:
                self.stop(state.step, error)


def agent_content(args: Args, agent: Agent) -> dict:
    """What a saved model holds: an agent as plain data, with its flags and dimensions."""
    return {
        "script": Args.exp_name,  # the default: the name of this script
        "args": asdict(args),
        "obs_dim": agent.obs_dim,
        "action_dim": agent.action_dim,
        "leaves": jax.device_get(jax.tree.leaves(agent)),
    }


def training_content(state: State) -> dict:
    """What a checkpoint holds beside the agent: the rest of the `State` as plain data."""
    count = int(state.buffer.count)
    return {
        "step": state.step,
        "buffer": [np.asarray(stored)[:count] for stored in state.buffer.storage],  # filled rows
        "buffer_count": count,
        "envs": pickle_environments(state.envs),
        "obs": state.obs,
        "transitions": None if state.transitions is None else tuple(state.transitions),
    }


def load_content(path: str | pathlib.Path) -> tuple[dict, Args, Agent]:
    """What a file holds, with its flags and agent; exits with one line if it is of no use here."""
    path = find_file(pathlib.Path(path))
    try:
        with gzip.open(path) as file:
            content = pickle.loads(file.read())  # read to the end, where the checksum stands
        if content["script"] != Args.exp_name:
            raise ValueError(f"it was written by {content['script']}.py")
        args = Args(**content["args"])
        create = partial(create_agent, args, content["obs_dim"], content["action_dim"])
        shapes = jax.eval_shape(create, jax.random.key(0))  # of the leaves; computes nothing
        expected, structure = jax.tree.flatten(shapes)
        if [leaf.shape for leaf in expected] != [leaf.shape for leaf in content["leaves"]]:
            raise ValueError("its networks have other sizes than this script's")
        agent = jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in content["leaves"]])
    except Exception as error:  # of any kind: the file may hold anything
        raise SystemExit(f"{path} cannot be used: {one_line(error)}") from None
    return content, args, agent


def save_agent(path: str | pathlib.Path, args: Args, agent: Agent) -> None:
    """Write a file that `load_agent` reads: the whole agent, with its flags and dimensions."""
    write_file(pathlib.Path(path), agent_content(args, agent))


def load_agent(path: str | pathlib.Path) -> tuple[Args, Agent]:
    """Flags and agent of a saved model, a checkpoint, or a run's folder (its newest checkpoint).

    The agent is whole: it acts, and it can go on learning. The file is unpickled: load only what
    you trust. Exits with one line if it cannot be used.
    """
    _, args, agent = load_content(path)
    return args, agent


def load_state(args: Args) -> tuple[Args, State]:
    """Flags and state of the newest checkpoint of the run --resume; exits with one line if none."""
    is_alone = args == Args(resume=args.resume, extend_to=args.extend_to)
    require(args, "resume", is_alone, RESUME_ALONE)
    require(args, "resume", os.path.isdir(args.resume), "the folder of a run")
    content, saved_args, agent = load_content(args.resume)
    if "step" not in content:
        raise SystemExit(
            f"--resume {args.resume} must hold a checkpoint; it holds a saved model only"
        )
    if args.extend_to is not None:
        at_least = f"at least the run's --total-timesteps, {saved_args.total_timesteps}"
        require(args, "extend_to", args.extend_to >= saved_args.total_timesteps, at_least)
        saved_args = replace(saved_args, total_timesteps=args.extend_to)
    args = replace(saved_args, resume=args.resume)
    check_args(args)
    choose_renderer(args)
    storage = []
    for rows in content["buffer"]:
        whole = np.zeros((args.buffer_size, *rows.shape[1:]), np.float32)
        whole[: len(rows)] = rows
        storage.append(jnp.array(whole))
    buffer = ReplayBuffer(Transition(*storage), jnp.int32(content["buffer_count"]))
    step, transitions = content["step"], content["transitions"]
    if transitions is not None:
        transitions = Transition(*transitions)
    allow_local_modules(args.env_id)
    try:
        envs, obs = pickle.loads(content["envs"]), content["obs"]
        # One that only points to its simulator, in a process that is gone, fails when it is used.
        trial = pickle.loads(content["envs"])
        trial.step(trial.action_space.sample())
    except Exception:  # of any kind; they are None where they could not be pickled
        print(f"{args.env_id} cannot be restored exactly: new episodes start", flush=True)
        envs = make_envs(args.env_id, args.num_envs)
        envs.action_space.seed((args.seed + step) % 2**32)
        obs, _ = envs.reset(seed=episode_seeds(args.seed + step, args.num_envs))
    return args, State(step, agent, buffer, envs, np.float32(obs), transitions)


def pickle_environments(envs: gym.vector.VectorEnv) -> bytes | None:
    """The environments with simulators and random generators; None if one cannot be pickled.

    gymnasium's own way (EzPickle) would construct them anew; here the attributes are kept. One that
    has a way of its own, to open a connection anew, say, counts as one that cannot be pickled.
    """
    methods = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")

    def has_own_way(env_class):
        usual = (object, gym.utils.EzPickle)
        for name in methods:
            known = [getattr(a_class, name, None) for a_class in usual]
            if getattr(env_class, name, None) not in known:
                return True
        return False

    def set_attributes(env, attributes):
        vars(env).update(attributes)

    class EnvironmentPickler(cloudpickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, gym.Env):
                if has_own_way(type(value)):
                    raise pickle.PicklingError("it has a way of its own")
                # Constructor, its arguments, state, list and dict items (none), how to set the state.
                return object.__new__, (type(value),), vars(value), None, None, set_attributes
            return super().reducer_override(value)

    file = io.BytesIO()
    try:
        EnvironmentPickler(file).dump(envs)
    except Exception:  # of any kind: the environment may be the user's own
        return None
    return file.getvalue()


def checkpoint_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder, in ascending order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def find_file(path: pathlib.Path) -> pathlib.Path:
    """`path` if it is a file; of a run's folder the newest checkpoint, else the saved model."""
    if not path.is_dir():
        return path
    steps = checkpoint_steps(path / "checkpoints")
    files = [path / "checkpoints" / str(step) for step in steps[-1:]] or list(path.glob("*.model"))
    if not files:
        raise SystemExit(f"{path} holds no checkpoint and no saved model")
    return files[0]


def write_file(path: pathlib.Path, content: dict) -> None:
    """Write plain data, whole or not at all: the file gets its name once it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            # Level 0 does not compress; gzip is here for its checksum, which `load_content` checks.
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) as gzip_file:
                pickle.dump(content, gzip_file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if the disk was full


def create_folder(name: str) -> pathlib.Path:
    """A new folder runs/{name}__{seconds since 1970}; the next second if another run has taken it."""
    pathlib.Path("runs").mkdir(exist_ok=True)
    second = int(time.time())
    while True:
        path = pathlib.Path(f"runs/{name}__{second}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            second += 1


def lock_folder(folder: pathlib.Path):
    """An open file that keeps other processes out of `folder`; BlockingIOError if one is in it."""
    file = open(folder / "lock", "w")  # noqa: SIM115 (closed with the run)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def start_tracking(args: Args, folder: pathlib.Path) -> None:
    """With --track, start a Weights and Biases run, which follows TensorBoard writers made later."""
    if not args.track:
        return
    import wandb

    id_file = folder / "wandb_id"  # not the folder's name, which a run elsewhere may have, too
    if not id_file.exists():
        id_file.write_text(os.urandom(8).hex())
    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=folder.name,
            id=id_file.read_text(),
            config=asdict(args),
            sync_tensorboard=True,
            save_code=True,
            resume="allow",
        )
    except Exception as error:  # of any kind: no login, no network, no such entity
        raise SystemExit(f"--track fails: {one_line(error)}") from None


def stop_tracking(args: Args, exit_code: int) -> None:
    """With --track, end the run, which has failed unless `exit_code` is 0.

    Another run in this process then begins one of its own.
    """
    if args.track:
        import wandb

        wandb.finish(exit_code=exit_code)


def hyperparameters_table(args: Args) -> str:
    """The flags as a Markdown table, with the values that learning uses."""
    flags = {"script": Args.exp_name} | asdict(args) | asdict(learning_part(args))
    rows = [f"|{flag}|{value}|" for flag, value in flags.items()]
    return "\n".join(["|flag|value|", "|-|-|", *rows])


def choose_renderer(args: Args) -> None:
    """Let MuJoCo render offscreen for --capture-video where there is no display."""
    has_display = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if args.capture_video and sys.platform == "linux" and not has_display:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported


def one_line(error) -> str:
    """An error's text without line breaks; its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_args() -> Args:
    """The flags of the command line."""
    args = tyro.cli(Args)
    flags = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    # `load_state` cannot tell a flag with its default value from one that is not given.
    is_alone = flags <= {"--resume", "--extend-to", "--extend_to"}
    require(args, "resume", is_alone or args.resume is None, RESUME_ALONE)
    return args


if __name__ == "__main__":
    main(parse_args())
