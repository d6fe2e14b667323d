# /// script
# requires-python = ">=3.11"
# dependencies = ["flax", "gymnasium[mujoco]>=1.1", "jax>=0.5", "mujoco>=3.3,<4", "optax", "tensorboardX", "tyro>=0.9"]
# ///
"""GeMPO-Linear: online RL of a diffusion policy by flow matching with weights linear in Q, cut off at zero.

Paper: "GeMPO: Generalized Measure Matching for Online Diffusion Reinforcement Learning", Ma, Gao, Chen, Li and Dai,
2026, arXiv 2603.10250. At a state s, draw N actions a_1..a_N from an older copy of the policy, value each by the
critics, q_i = Q(s, a_i), and train the policy to denoise them with the weights

    w_i = max((q_i - nu) / lambda, 0),   nu such that sum_i w_i = 1                                 (section 4)

This is the improvement step regularized by the chi-squared divergence (table 1; QVPO is it at a fixed temperature).
Actions below nu do not count; above it the weights grow slowly, which keeps the policy broad on steep rewards.
Usage: `python gempo_linear.py --env-id Hopper-v5`, or `--help`. The siblings gempo_exp.py, gempo_square.py and
gempo_neg.py differ in this docstring, in the section REWEIGHTING and in the flag --ell of gempo_neg.py.
"""

import contextlib
import copyreg
import fcntl
import importlib.util
import math
import os
import pathlib
import signal
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import cloudpickle
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import serialization, struct
from tensorboardX import event_file_writer as tb, summary

# =================================================== ARGUMENTS ===================================================
Count = Annotated[int, "a whole number, at least 1", lambda v: v >= 1]
Natural = Annotated[int, "a whole number, at least 0", lambda v: v >= 0]
Positive = Annotated[float, "a finite number above 0", lambda v: 0 < v < math.inf]
Fraction = Annotated[float, "a number from 0 to 1", lambda v: 0 <= v <= 1]


@dataclass(frozen=True)
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # name of this experiment
    seed: Natural = 1  # seed of environments, networks and sampling; a run repeats exactly on the same machine
    track: bool = False  # whether to track this experiment with Weights and Biases
    wandb_project_name: str = "gempo"  # project name at wandb
    wandb_entity: str | None = None  # entity (team) of the wandb project
    capture_video: bool = False  # whether to record an episode of each evaluation (runs/{run}/videos)
    save_model: bool = False  # whether to save the parameters at the end (runs/{run}/{exp_name}.model)
    checkpoint_frequency: Natural = 50_000  # steps between two checkpoints (runs/{run}/checkpoints); 0 turns them off
    checkpoint_buffer: bool = True  # whether they hold the replay buffer; if not, a resumed run fills a new one first
    resume: str | None = None  # a run's folder (runs/{run}) to go on from at its newest checkpoint, with its flags
    env_id: str = "HalfCheetah-v5"  # gymnasium id, Box observations and actions; `module:id` imports the module first
    num_envs: Count = 1  # environments stepped side by side
    total_timesteps: Count = 1_000_000  # environment steps in all, counted over all environments
    learning_starts: Count = 5_000  # environment steps with uniformly random actions before learning starts
    buffer_size: Count = 1_000_000  # capacity of the replay buffer in transitions; it lies in the device's memory
    batch_size: Count = 256  # states per update (B)
    updates_per_step: Count = 1  # updates per environment step
    gamma: Fraction = 0.99  # discount factor (gamma)
    tau: Fraction = 0.005  # rate at which the target critics follow the critics (tau)
    policy_lr: Positive = 1e-4  # learning rate of the actor
    q_lr: Positive = 3e-4  # learning rate of the critics
    temperature_lr: Positive = 3e-4  # learning rate of log lambda
    hidden_dim: Count = 256  # width of the hidden layers of actor and critics
    num_particles: Count = 64  # actions drawn from pi_old at each state of the batch (N)
    diffusion_steps: Count = 20  # denoising steps of the sampler (T)
    additive_noise: Annotated[float, "finite, at least 0", lambda v: 0 <= v < math.inf] = 0.2  # noise added to actions
    target_kl: Positive | None = None  # KL budget of the weights in nats (kappa), below log N; None: the paper's
    old_policy_interval: Count = 1_000  # updates between two hard copies of the actor to pi_old
    loss_clip: Positive = 5.0  # upper limit of an element's squared error in the actor's loss; bounds negative weights
    reward_scale: Positive = 1.0  # factor on the rewards that the critics learn from
    act_best_of: Count = 1  # samples per action in training; the best by the minimum of the critics is played
    td_best_of: Count = 1  # samples per TD target; the best by the minimum of the target critics counts
    eval_best_of: Count = 10  # samples per action in evaluation; the best by the minimum of the critics is played
    eval_frequency: Natural = 10_000  # environment steps between two evaluations; 0 turns them off
    eval_episodes: Count = 10  # episodes per evaluation


def check_args(args: Args) -> Args:
    """Exit with one line if a flag is out of its range; return `args` with the paper's target_kl for None."""
    total, capacity, log_n = args.total_timesteps, args.buffer_size, math.log(max(args.num_particles, 1))
    rules = [(name, *get_args(kind)[1:]) for name, hint in get_type_hints(Args, include_extras=True).items()
             for kind in (hint, *get_args(hint)) if get_origin(kind) is Annotated]  # fmt: skip
    rules += [
        ("learning_starts", f"below --total-timesteps, {total}", lambda v: v < total),
        ("num_envs", f"at most --buffer-size, {capacity}", lambda v: v <= capacity),
        ("target_kl", f"below log(num_particles), {log_n:.3f}", lambda v: v < log_n),  # no weights are further apart
        ("track", "off: wandb is not installed", lambda v: not v or importlib.util.find_spec("wandb")),
    ]
    for name, allowed, is_allowed in rules:
        if (value := getattr(args, name)) is not None and not is_allowed(value):
            raise SystemExit(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    paper_kl = {"Hopper-v5": 2.5, "Ant-v5": 1.5}.get(args.env_id, 2.0) * log_n / math.log(64)  # Table 4, for N = 64
    return args if args.target_kl is not None else replace(args, target_kl=paper_kl)


# ================================================== ENVIRONMENT ==================================================
def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    """An environment with flat observations and actions in [-1, 1]^d; exits with one line if it has no such form."""
    try:
        env = gym.make(env_id, render_mode="rgb_array" if video_folder else None)
        if video_folder:
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda _: True, disable_logger=True)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise SystemExit(f"--env-id {env_id} or --capture-video fails: {' '.join(str(error).split())}") from None
    spaces, box = (env.observation_space, env.action_space), gym.spaces.Box
    if not all(isinstance(space, box) for space in spaces) or len(spaces[1].shape) != 1 or not spaces[1].is_bounded():
        raise SystemExit(f"--env-id must have Box observations and flat, bounded Box actions, unlike {env_id}")
    copyreg.pickle(type(env.unwrapped), lambda env: (  # for checkpoints; gymnasium's own way keeps no state
        object.__new__, (type(env),), vars(env), None, None, lambda new, state: vars(new).update(state)))  # fmt: skip
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


# =================================================== NETWORKS ====================================================
Dense = partial(nn.Dense, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))
TIME_DIM, STATE_DIM = 64, 128  # widths of the time and the state features (released code)


def mish(x: jax.Array) -> jax.Array:
    """Mish, x tanh(log(1 + e^x)), in a form with one exponential and a cheap gradient: x - 2x / (e^2x + 2e^x + 2)."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # beyond 20 mish(x) is x in float32; the gradient would overflow at 44
    return x - 2.0 * x / (e * (e + 2.0) + 2.0)


def bfloat16_dot(x: jax.Array, w: jax.Array, dims, **_) -> jax.Array:
    """jax.lax.dot_general of inputs rounded to bfloat16, summed in float32."""
    return jax.lax.dot_general(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32)


class Actor(nn.Module):
    """The denoiser eps_hat(x_t, t, s): an MLP 3x256 on [x_t, time features f(t), state features g(s)].

    The first layer is a sum, W_x x + W_t f + W_s g + b, so the sampler computes W_s g once a state and W_t f + b once a
    step (the embeddings), not for every particle at every step: 36% fewer multiply-adds.
    """

    action_dim: int
    hidden_dim: int = 256
    dot: Any = jax.lax.dot_general  # that of the hidden layers

    def setup(self):
        width = self.hidden_dim
        self.frequencies = self.param("frequencies", nn.initializers.normal(0.2), (TIME_DIM // 2,))
        self.embed_features = nn.Sequential([Dense(TIME_DIM), mish, Dense(TIME_DIM), mish, Dense(width)])
        self.embed_obs = nn.Sequential([Dense(STATE_DIM), mish, Dense(STATE_DIM), mish, Dense(width, use_bias=False)])
        self.embed_x, hidden = Dense(width, use_bias=False), partial(Dense, width, dot_general=self.dot)
        self.layers = nn.Sequential([mish, hidden(), mish, hidden(), mish, Dense(self.action_dim)])

    def embed_time(self, t):
        """W_t f(t) + b (..., hidden_dim) at times t (..., 1); f: learned Fourier features and two layers."""
        angles = 2 * jnp.pi * t * self.frequencies
        return self.embed_features(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))

    def denoise(self, x, time_embedding, obs_embedding):
        """eps_hat (..., d) at x (..., d); the embeddings broadcast over the leading axes."""
        h = self.embed_x(x) + (time_embedding + obs_embedding)
        return self.layers(h.reshape(-1, self.hidden_dim)).reshape(x.shape)  # 3-axis products: slow gradients on CPUs

    def __call__(self, x, t, obs):
        return self.denoise(x, self.embed_time(t), self.embed_obs(obs))


class Critic(nn.Module):
    """Q(s, a) (...), an MLP 2x256 ReLU, at obs (..., obs_dim) and actions (..., d), that broadcast; TwinCritic: two."""

    hidden_dim: int = 256

    @nn.compact
    def __call__(self, obs, actions):
        h = Dense(self.hidden_dim)(obs) + Dense(self.hidden_dim, use_bias=False)(actions)  # of [s, a]; once a state
        layers = nn.Sequential([nn.relu, Dense(self.hidden_dim), nn.relu, Dense(1)])
        return layers(h.reshape(-1, self.hidden_dim)).reshape(h.shape[:-1])


TwinCritic = nn.vmap(Critic, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True})


# =================================================== DIFFUSION ===================================================
T_MIN, T_MAX = 0.001, 0.9946  # at t = 1 the cosine schedule would leave no signal (released code)


def noise_schedule(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine schedule at t in [0, 1]: alpha_t = cos(u_t) / cos(u_0) with u_t = pi/2 (t + .008) / 1.008, and sigma_t."""
    u_0, rise = math.pi / 2 * 0.008 / 1.008, math.pi / 2 * t / 1.008  # u_t = u_0 + rise
    sigma = jnp.sqrt(jnp.sin(rise) * jnp.sin(rise + 2 * u_0)) / math.cos(u_0)  # sqrt(1 - alpha^2), without cancellation
    return jnp.cos(u_0 + rise) / math.cos(u_0), sigma


def add_noise(key: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Diffuse actions (..., d) to uniform times: x_t (..., d), t (..., 1) and eps (..., d)."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.uniform(t_key, (*actions.shape[:-1], 1), minval=T_MIN, maxval=T_MAX)
    eps = jax.random.normal(eps_key, actions.shape)
    alpha, sigma = noise_schedule(t)
    return alpha * actions + sigma * eps, t, eps


def sample_actions(actor: Actor, params, obs, key, num_samples: int, num_steps: int) -> jax.Array:
    """Draw actions (B, num_samples, d) in [-1, 1] at observations (B, obs_dim) by `num_steps` ancestral DDPM steps."""
    grid = jnp.linspace(T_MIN, T_MAX, num_steps + 1)
    alpha, sigma = noise_schedule(grid)
    beta = 1 - (a := alpha[1:] / alpha[:-1]) ** 2  # x_i = a_i x_{i-1} + sqrt(beta_i) eps
    x_0_weight, x_weight = alpha[:-1] * beta / sigma[1:] ** 2, a * sigma[:-1] ** 2 / sigma[1:] ** 2
    noise_std = jnp.sqrt(beta).at[0].set(0.0)  # no noise in the last step
    time_embeddings = actor.apply(params, grid[1:, None], method="embed_time")  # (T, hidden_dim)
    obs_embedding = actor.apply(params, obs[:, None], method=lambda actor, obs: actor.embed_obs(obs))  # (B, 1, .)

    def denoising_step(x, step):
        alpha, sigma, x_0_weight, x_weight, noise_std, time_embedding, key = step
        eps_hat = actor.apply(params, x, time_embedding, obs_embedding, method="denoise")
        x_0 = jnp.clip((x - sigma * eps_hat) / alpha, -1.0, 1.0)
        return x_0_weight * x_0 + x_weight * x + noise_std * jax.random.normal(key, x.shape), None

    keys = jax.random.split(key, num_steps + 1)
    x = jax.random.normal(keys[0], (obs.shape[0], num_samples, actor.action_dim))
    steps = (alpha[1:], sigma[1:], x_0_weight, x_weight, noise_std, time_embeddings, keys[1:])
    x, _ = jax.lax.scan(denoising_step, x, steps, reverse=True)
    return jnp.clip(x, -1.0, 1.0)  # the last mean may leave the box by about sigma(T_MIN) = 0.006


# ================================================== REWEIGHTING ==================================================
def active_set(q: jax.Array, temp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest q above nu, q_k, and its weight w_k = (q_k - nu) / temp: (..., 1) each, for q (..., N).

    With q descending, particle k is active (above nu) iff its excess e_k = sum_{i<=k} (q_i - q_k) is at most temp
    (Appendix E.2). The excess is summed from the gaps between neighbours, e_{k+1} = e_k + k (q_k - q_{k+1}): terms of
    one sign, so nothing cancels, whatever the scale of q.
    """
    q_sorted = jnp.sort(q, axis=-1, descending=True)
    gaps = -jnp.diff(q_sorted, axis=-1, prepend=q_sorted[..., :1]) / temp
    excess = jnp.cumsum(jnp.arange(q.shape[-1]) * gaps, axis=-1)
    k = jnp.sum(excess <= 1, axis=-1, keepdims=True)
    q_k, e_k = (jnp.take_along_axis(x, k - 1, axis=-1) for x in (q_sorted, excess))
    return q_k, (1 - e_k) / k


def solve_normalizer(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, 0) = 1, for q (..., N) and temp > 0."""
    q_k, w_k = active_set(q, temp)
    return q_k - temp * w_k


def reweight(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights w_i = max((q_i - nu) / temp, 0) (section 4), which sum to one: (..., N), for q (..., N)."""
    q_k, w_k = active_set(q, temp)  # not nu: at |q| = 1e5 float32 rounds it by up to 0.004
    return jnp.maximum((q - q_k) / temp + w_k, 0.0)


def compute_weights(q: jax.Array, temp: jax.Array, args: Args) -> jax.Array:
    """`reweight` with this script's arguments."""
    return reweight(q, temp)


# ================================================= REPLAY BUFFER =================================================
class Transition(NamedTuple):
    """Transitions as arrays of obs (..., obs_dim), actions (..., d), rewards (...), and so on."""

    obs: Any
    actions: Any
    rewards: Any
    next_obs: Any  # the true last observation where an episode ended
    terminations: Any  # 1.0 where the episode terminated; a truncated one counts as going on


class ReplayBuffer(NamedTuple):
    """A ring of transitions in the device's memory, and how many have ever been written to it."""

    storage: Transition
    count: jax.Array


def create_buffer(capacity: int, obs_dim: int, action_dim: int) -> ReplayBuffer:
    """An empty buffer; exits with one line if it would take more than 0.9 of the device's memory."""
    stats = jax.devices()[0].memory_stats() or {"bytes_limit": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    if capacity > (fitting := int(0.9 * stats["bytes_limit"]) // (4 * (2 * obs_dim + action_dim + 2))):
        raise SystemExit(f"--buffer-size must be at most {fitting} to fit in the device's memory, got {capacity}")
    storage = Transition(*(jnp.zeros((capacity, *shape)) for shape in ((obs_dim,), (action_dim,), (), (obs_dim,), ())))
    return ReplayBuffer(storage, jnp.zeros((), jnp.int32))


def add_transitions(buffer: ReplayBuffer, transitions: Transition) -> ReplayBuffer:
    """Write E <= capacity transitions, over the oldest ones once the buffer is full."""
    rows = (buffer.count + jnp.arange(len(transitions.rewards))) % len(buffer.storage.rewards)
    storage = jax.tree.map(lambda old, new: old.at[rows].set(new), buffer.storage, transitions)
    return ReplayBuffer(storage, buffer.count + len(transitions.rewards))


def sample_batch(buffer: ReplayBuffer, key: jax.Array, batch_size: int) -> Transition:
    """Draw `batch_size` transitions uniformly, with replacement."""
    rows = jax.random.randint(key, (batch_size,), 0, jnp.minimum(buffer.count, len(buffer.storage.rewards)))
    return jax.tree.map(lambda stored: stored[rows], buffer.storage)


# =================================================== LEARNING ====================================================
class Agent(struct.PyTreeNode):
    """All that learning changes; static: the networks and the optimizer."""

    params: dict  # "actor", "critic" and "log_lambda", the logarithm of the temperature
    slow_params: dict  # "actor": pi_old, "critic": the target critics
    opt_state: Any
    num_updates: jax.Array
    actor: Actor = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)


def create_agent(args: Args, obs_dim: int, action_dim: int, key: jax.Array) -> Agent:
    """A new agent: orthogonal networks, lambda = 1, and Adam with a rate for each of the three parts."""
    actor, critic = Actor(action_dim, args.hidden_dim), TwinCritic(args.hidden_dim)
    actor_key, critic_key = jax.random.split(key)
    obs, actions, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)), jnp.zeros((1, 1))
    params = {"actor": actor.init(actor_key, actions, t, obs), "critic": critic.init(critic_key, obs, actions)}
    slow_params = jax.tree.map(jnp.copy, params)  # arrays of its own: train_step donates both
    params["log_lambda"] = jnp.zeros(())  # so that lambda moves by a fixed ratio a step, at any scale of Q
    rates = {"actor": args.policy_lr, "critic": args.q_lr, "log_lambda": args.temperature_lr}
    optimizer = optax.multi_transform({part: optax.adam(rate) for part, rate in rates.items()}, {k: k for k in rates})
    return Agent(params, slow_params, optimizer.init(params), jnp.zeros((), jnp.int32), actor, critic, optimizer)


def critic_loss(params, critic: Critic, batch: Transition, targets: jax.Array) -> jax.Array:
    """Mean squared TD error of both critics against targets (B,)."""
    return jnp.mean((critic.apply(params, batch.obs, batch.actions) - targets) ** 2)


def actor_loss(params, actor: Actor, obs, particles, weights, key, loss_clip: float) -> jax.Array:
    """Reweighted flow matching (equation 8) by epsilon-prediction: mean of N w_i min((eps_hat - eps)^2, loss_clip)."""
    x_t, t, eps = add_noise(key, particles)  # particles (B, N, d), obs (B, obs_dim), weights (B, N) that sum to one
    eps_hat = actor.apply(params, x_t, t, obs[:, None])
    errors = jnp.minimum((eps_hat - eps) ** 2, loss_clip)  # clipped first: past it a negative weight has no pull
    return jnp.mean(weights.shape[-1] * weights[..., None] * errors)


def temperature_loss(log_lambda: jax.Array, weights: jax.Array, target_kl: float) -> tuple[jax.Array, jax.Array]:
    """lambda (kappa - KL(w || uniform)) (equation 23) and the KL, averaged over states; weights (B, N)."""
    p = (p := jnp.maximum(weights, 1e-6)) / p.sum(axis=-1, keepdims=True)  # of negative weights the positive part
    kl = math.log(weights.shape[-1]) + jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))
    return jnp.exp(log_lambda) * (target_kl - kl), kl


def update(agent: Agent, batch: Transition, key: jax.Array, args: Args) -> tuple[Agent, dict]:
    """One gradient step of critics, actor and temperature on B transitions, and the scalars to log. Pure."""
    actor, critic, params, slow_params = agent.actor, agent.critic, agent.params, agent.slow_params
    next_key, old_key, noise_key, loss_key = jax.random.split(key, 4)
    n, num_steps = args.num_particles, args.diffusion_steps
    # TD targets: y = r + gamma (1 - terminated) min_j Q_target_j(s', a'), a' from the current policy.
    next_actions = sample_actions(actor, params["actor"], batch.next_obs, next_key, args.td_best_of, num_steps)
    next_q = critic.apply(slow_params["critic"], batch.next_obs[:, None], next_actions).min(axis=0).max(axis=-1)
    targets = args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    # Algorithm 1: N particles from pi_old plus noise, which drowns the rounding of bfloat16 (30% off a CPU's update).
    particles = sample_actions(actor.clone(dot=bfloat16_dot), slow_params["actor"], batch.obs, old_key, n, num_steps)
    particles += args.additive_noise * jax.random.normal(noise_key, particles.shape)  # (B, N, d)
    q_values = critic.apply(params["critic"], batch.obs[:, None], particles).mean(axis=0)  # (B, N)
    weights = compute_weights(q_values, temp := jnp.exp(params["log_lambda"]), args)

    def loss(params):  # the three losses share no parameters, so one gradient of their sum serves all
        q_loss = critic_loss(params["critic"], critic, batch, targets)
        pi_loss = actor_loss(params["actor"], actor, batch.obs, particles, weights, loss_key, args.loss_clip)
        lambda_loss, kl = temperature_loss(params["log_lambda"], weights, args.target_kl)
        metrics = {"losses/critic_loss": q_loss, "losses/actor_loss": pi_loss, "losses/temperature_loss": lambda_loss}
        metrics |= {"losses/q_values": q_values.mean(), "charts/temperature": temp, "charts/kl": kl}
        metrics |= {"charts/weights_min": n * weights.min(), "charts/weights_negative_share": jnp.mean(weights < 0)}
        return q_loss + pi_loss + lambda_loss, metrics | {"charts/particles_std": particles.std(axis=1).mean()}

    grads, metrics = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = agent.optimizer.update(grads, agent.opt_state)
    params, num_updates = optax.apply_updates(params, updates), agent.num_updates + 1
    old = optax.periodic_update(params["actor"], slow_params["actor"], num_updates, args.old_policy_interval)
    slow_params = {"actor": old, "critic": optax.incremental_update(params["critic"], slow_params["critic"], args.tau)}
    metrics["charts/params_norm"] = optax.tree.norm(params)  # not finite where any parameter is not
    return agent.replace(params=params, slow_params=slow_params, opt_state=opt_state, num_updates=num_updates), metrics


@partial(jax.jit, static_argnames="args", donate_argnames=("agent", "buffer"))
def train_step(agent, buffer, transitions, key, step, args: Args) -> tuple[Agent, ReplayBuffer, dict]:
    """The device's work of a step: insert E transitions, then make E * updates_per_step updates, all in place."""
    buffer = add_transitions(buffer, transitions)

    def sample_and_update(agent, key):
        batch_key, update_key = jax.random.split(key)
        return update(agent, sample_batch(buffer, batch_key, args.batch_size), update_key, args)

    keys = jax.random.split(jax.random.fold_in(key, step), args.num_envs * args.updates_per_step)
    agent, metrics = jax.lax.scan(sample_and_update, agent, keys)
    return agent, buffer, jax.tree.map(lambda values: values[-1], metrics)


@partial(jax.jit, static_argnames=("best_of", "num_steps"))
def act(agent: Agent, obs, key, step, best_of: int, num_steps: int) -> jax.Array:
    """Actions (E, d) at observations (E, obs_dim): the best of `best_of` samples by the minimum of the critics."""
    key = jax.random.fold_in(key, step)
    actions = sample_actions(agent.actor, agent.params["actor"], obs, key, best_of, num_steps)  # (E, K, d)
    q_values = agent.critic.apply(agent.params["critic"], obs[:, None], actions).min(axis=0)  # (E, K)
    return actions[jnp.arange(len(obs)), q_values.argmax(axis=-1)]


# ================================================== EVALUATION ===================================================
def evaluate(agent: Agent, envs: list[gym.Env], seed: int, args: Args) -> dict[str, float]:
    """Play one episode in each environment by the best of `eval_best_of` samples; depends on agent and seed alone."""
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    returns, lengths, running = np.zeros(len(envs)), np.zeros(len(envs), int), list(range(len(envs)))
    while running:
        actions = act(agent, obs, jax.random.key(seed), lengths.max(), args.eval_best_of, args.diffusion_steps)
        for i, action in zip(running.copy(), np.asarray(actions)[running], strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
            if terminated or truncated:
                running.remove(i)
    scores = {"return": returns.mean(), "return_std": returns.std(), "length": lengths.mean()}
    return {f"eval/episodic_{name}": value for name, value in scores.items()}


# ================================================== CHECKPOINTS ==================================================
def require_finite(manager: ocp.CheckpointManager, step: int, **values) -> None:
    """Exit with one line if a value is not finite, before it reaches environment, buffer, log or checkpoint."""
    if bad := [name for name, value in values.items() if not np.isfinite(value).all()]:
        manager.close()  # waits for a checkpoint that is being written
        raise SystemExit(f"stopped at step {step}: non-finite {', '.join(bad)}; saved: step {manager.latest_step()}")


def load_checkpoint(args: Args) -> dict:
    """The state in the newest checkpoint of the run `args.resume`; exits with one line if it cannot be used."""
    folder = pathlib.Path(args.resume, "checkpoints").absolute()
    *older, step = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) or ["*"]
    try:
        state = cloudpickle.loads(zlib.decompress(ocp.StandardCheckpointer().restore(folder / f"{step}/default")[0]))
        if state["script"] != pathlib.Path(__file__).stem or args != Args(resume=args.resume):
            raise ValueError(f"a run of {state['script']}.py, which keeps its script and its flags")
    except Exception as error:  # of any kind: the file may hold anything
        reason = f"{' '.join(str(error).split())}; older ones (remove this one to use them): {older}"
        raise SystemExit(f"--resume cannot use {folder}/{step}: {reason}") from None
    return state | {"args": Args(**state["args"] | {"resume": args.resume})}


# ===================================================== MAIN ======================================================
def main(args: Args, signals: list[int] | tuple = ()) -> Agent:
    """Train an agent, log to runs/{run} and return it; a number put into `signals` ends the run after the step."""
    saved = load_checkpoint(args) if args.resume else {"args": check_args(args), "step": 0}
    args, first = saved["args"], saved["step"]
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run = pathlib.Path(args.resume or f"runs/{name}")
    same_step = gym.vector.AutoresetMode.SAME_STEP  # the default would add a fake transition after each episode
    envs = gym.vector.SyncVectorEnv([partial(make_env, args.env_id)] * args.num_envs, autoreset_mode=same_step)
    video_folders = [f"{run}/videos/{first}" if args.capture_video else None] + [None] * (args.eval_episodes - 1)
    eval_envs = [make_env(args.env_id, folder) for folder in video_folders if args.eval_frequency]
    dims = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    agent, buffer = create_agent(args, *dims, init_key), create_buffer(args.buffer_size, *dims)
    insert = jax.jit(add_transitions, donate_argnames="buffer")
    envs.action_space.seed(args.seed)
    obs = envs.reset(seed=args.seed + first)[0].astype(np.float32)  # MuJoCo's are float64: cast once
    transitions, clock, learn_from = None, None, args.learning_starts
    if args.resume:
        (leaves, structure), loaded = jax.tree.flatten((agent, buffer)), saved["leaves"]
        if [x.shape for x in loaded] != [x.shape for x in leaves[: len(loaded)]]:
            raise SystemExit(f"--resume {run}: its networks have other sizes than this script's")
        leaves[: len(loaded)] = [old.delete() or jnp.array(new) for old, new in zip(leaves, loaded, strict=False)]
        agent, buffer = jax.tree.unflatten(structure, leaves)
        learn_from += first * (len(loaded) < len(leaves))  # --no-checkpoint-buffer: a new one is filled first
        transitions = Transition(*saved["last"])
        envs, obs = cloudpickle.loads(saved["envs"]) if "envs" in saved else (envs, obs)
        if "envs" not in saved:
            print(f"{args.env_id} cannot be restored exactly: new episodes start", flush=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
        fcntl.flock(_lock := open(run / "lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)  # noqa: SIM115 (freed at the end)
        for path in run.glob("events*"):
            os.truncate(path, saved["log_sizes"].get(path.name, 0))  # what came after the checkpoint comes again
        log = tb.EventsWriter(f"{run}/events", f".{first}")
    except OSError as error:
        raise SystemExit(f"{run} cannot be written, or another process is writing it: {error}") from None
    if not args.resume:
        table = "\n".join(["|flag|value|", "|-|-|", *(f"|{flag}|{value}|" for flag, value in asdict(args).items())])
        log.write_event(tb.event_pb2.Event(wall_time=time.time(), summary=summary.text("hyperparameters", table)))
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run.name, "id": run.name}
        wandb = importlib.import_module("wandb").init(**names, config=asdict(args), save_code=True, resume="allow")
    print(f"{args.env_id} on {jax.devices()[0].device_kind}: tensorboard --logdir {run}", flush=True)
    manager = ocp.CheckpointManager(run.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    for step in range(first, args.total_timesteps, args.num_envs):
        done, records = step + args.num_envs, []  # done: environment steps once this one has been made
        is_due = [n and done // n > step // n for n in (100, args.eval_frequency, args.checkpoint_frequency)]
        is_last = bool(stop := list(signals)) or done >= args.total_timesteps
        # The device's calls return at once: it acts, then makes the update while the environments step.
        if step >= args.learning_starts:
            actions = act(agent, obs, act_key, step, args.act_best_of, args.diffusion_steps)
        else:
            actions = envs.action_space.sample()
        if learning := step >= learn_from:
            agent, buffer, metrics = train_step(agent, buffer, transitions, update_key, step, args)
        elif transitions:
            buffer = insert(buffer, transitions)
        require_finite(manager, done, actions=(actions := np.asarray(actions)))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        last_obs = next_obs.astype(np.float32)
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]  # next_obs[i] is the first of the next episode
            final = infos["final_info"]
            charts = {"episodic_return": final["episode"]["r"], "episodic_length": final["episode"]["l"]}
            charts |= final.get("charts", {})  # scalars of the environment's own, and gymnasium's masks, _{name}
            records += [(step + i + 1, f"charts/{tag}", charts[tag][i]) for tag in charts if tag[0] != "_"]
        transitions = Transition(obs, actions, np.float32(rewards), last_obs, np.float32(terminations))
        obs = next_obs.astype(np.float32)
        require_finite(manager, done, observations=(last_obs, obs), rewards=transitions.rewards)
        if learning and (any(is_due) or is_last):  # only here device values are read, and waited for
            require_finite(manager, done, **(scalars := jax.device_get(metrics)))
            if clock:  # SPS leaves out the random steps, compiling and evaluation
                scalars["charts/SPS"] = (done - clock[0]) / (time.perf_counter() - clock[1])
            if is_due[1]:
                scalars |= evaluate(agent, eval_envs, args.seed + 1_000_003 * done, args)
                print(f"step {done}: evaluation {scalars['eval/episodic_return']:.1f}", flush=True)
            require_finite(manager, done, **scalars)
            records += [(done, tag, value) for tag, value in scalars.items() if any(is_due[:2])]
            clock = done, time.perf_counter()
        try:
            for at, tag, value in records:
                log.write_event(tb.event_pb2.Event(wall_time=time.time(), step=at, summary=summary.scalar(tag, value)))
                if args.track:
                    wandb.log({tag: value, "global_step": at})
            if any(is_due) or is_last:
                log.flush()
            if args.checkpoint_frequency and (is_due[2] or is_last):
                state = {"script": pathlib.Path(__file__).stem, "args": asdict(args), "step": done}
                state |= {"last": (*transitions,), "log_sizes": {p.name: p.stat().st_size for p in run.glob("events*")}}
                state["leaves"] = jax.device_get(jax.tree.leaves((agent, buffer) if args.checkpoint_buffer else agent))
                with contextlib.suppress(Exception):  # an environment may hold what cannot be pickled
                    state["envs"] = cloudpickle.dumps((envs, obs))
                array = np.frombuffer(zlib.compress(cloudpickle.dumps(state), 0), np.uint8)  # Orbax has no checksum
                if not manager.all_steps():
                    print(f"step {done}: checkpoints take {len(array) / 1e6:.1f} MB, two of them are kept", flush=True)
                manager.save(done, args=ocp.args.StandardSave([array]))
            (manager.close if is_last else manager.check_for_errors)()
        except (OSError, ValueError) as error:  # a full disk, for one; Orbax raises the latter
            raise SystemExit(f"stopped at step {done}: {error}; earlier checkpoints are kept") from None
        if stop:
            raise SystemExit(128 + stop[0])
    if args.save_model:
        (run / f"{args.exp_name}.model").write_bytes(serialization.to_bytes(agent.params))
    for env in (envs, *eval_envs):
        env.close()
    return agent


if __name__ == "__main__":
    received = []  # the first signal ends the run after its step, a second one ends it at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number) if received else received.append(number))
    main(tyro.cli(Args), received)
