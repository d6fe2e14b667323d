# /// script
# requires-python = ">=3.11"
# dependencies = ["flax", "jax>=0.5", "matplotlib", "numpy", "optax", "scipy", "tyro>=0.9"]
# ///
"""The one-dimensional bandit of GeMPO (arXiv 2603.10250, section 5.1): the method without the RL.

A policy over a single action a in [-1, 1] is fitted to its own best samples. One epoch is:

    1. draw N candidates a_i from the policy, clipped to [-1, 1], and add Gaussian noise to them;
    2. look up their rewards q_i = R(a_i), which are the Q-values here: a bandit has no future;
    3. turn the rewards into weights w_i, with a temperature T;
    4. take 30 Adam steps on sum_i w_i |v(x_t, t) - (eps - x_0)|^2 at x_0 = a_i (equation 8);
    5. evaluate: the simple regret is max_a R(a) - E_pi[R(a)], without the noise of step 1.

The policy is a velocity field v on the path x_t = (1 - t) x_0 + t eps, from an action x_0 at t = 0
to noise eps at t = 1. Methods differ in step 3 alone. The weights of the first five maximize
sum_i w_i q_i - lambda D_f(w, uniform) over weights that sum to one, with the f-divergence
D_f = 1/N sum_i f(N w_i), so that f'(N w_i) = (q_i - nu) / lambda wherever no bound holds w_i:

    name     divergence          f(x)                      N w_i
    exp      forward KL          x log x                   exp((q_i - nu) / T)
    linear   chi-squared         x^2 - 1                   max((q_i - nu) / T, 0)
    power    alpha > 1           p (x^alpha - x) / alpha   max((q_i - nu) / T, 0)^p
    square   power, alpha = 1.5                            max((q_i - nu) / T, 0)^2
    neg      signed chi-squared  x^2 - 1                   max((q_i - nu) / T, ell)
    qvpo     QVPO (example 3.2)  linear at T = 1           max(q_i - nu, 0)
    wd1      WD1 (example 3.4)                             N softmax(A)_i - N softmax(-A)_i

with p = 1 / (alpha - 1). nu is the multiplier for which the mean of N w_i is one. T, --temperature,
is lambda times a constant of the divergence: 1 for exp, 2 for linear and neg, p for power. exp (DPMD,
AWR) gives every candidate a weight; linear, power, square and qvpo none below nu; neg a negative one
there, down to ell average weights (equation 11). qvpo does not adapt to the scale of the rewards:
with rewards from 0 to 1 it is 1 + q_i - mean(q), nearly uniform. A is q with zero mean and unit
variance; wd1 has no nu, as its weights sum to zero.

    python bandit.py --problem sharp                  # Figure 2, two sharp optima
    python bandit.py --problem broad                  # Figure 2, two broad optima
    python bandit.py --problem escape                 # Figure 1, the policy starts on the lower one
    python bandit.py --problem escape --methods neg --ell 0 -0.05 -0.1 -0.3 -0.5 -1
    python bandit.py --methods linear power --alpha 1.2 --matching nce

A run prints a table and saves four files to runs/{problem}__bandit__{seed}__{time}: args.json (the
flags), regret.csv, regret.png, and results.npz with what else was measured at each epoch, from
which benchmark/plot_bandit.py draws how the policy moved. The last three are written after each
method, so that a run that is stopped keeps the methods that are done.

Shapes: N candidates, S seeds, E epochs; epoch 0 is the initial policy.
"""

import csv
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from scipy import stats

# =========================================== ARGUMENTS ===========================================
Weighting = Literal["exp", "linear", "square", "neg", "power", "wd1", "qvpo"]


@dataclass(frozen=True)  # hashable, so that all flags together are a static argument of jit
class Args:
    """The flags. None or () is the default of the problem, in PROBLEMS (but for target_kl)."""

    problem: Literal["sharp", "broad", "escape"] = "sharp"  # which reward and initial policy
    seed: int = 1  # first seed
    num_seeds: int = 20  # seeds, `seed` and those after it; all methods share a seed's draws
    methods: tuple[Weighting, ...] = ()  # one curve each; (): exp linear square (escape: and neg)
    ell: tuple[float, ...] = (-0.3,)  # neg only: floors on N w_i, one curve each; 0 is linear
    alpha: float = 1.25  # power only: its alpha; 2 is linear, 1.5 is square
    matching: Literal["flow", "nce"] = "flow"  # equation 8, or noise contrastive (appendix G)
    nce_gamma: float = 1.0  # nce only: the difference in squared error that counts as one nat
    temperature: float | None = None  # T, not of wd1 and qvpo; None: .05 (escape: .01)
    target_kl: float | None = None  # KL budget in nats to tune T to, from there; None: T stays
    temperature_lr: float = 0.05  # Adam's rate on its logarithm, one step an epoch, in that case
    num_epochs: int | None = None  # epochs (E); None: 100 (escape: 200)
    num_particles: int = 256  # candidates an epoch (N)
    candidate_noise: float = 0.1  # standard deviation of the noise added to the candidates
    gradient_steps: int = 30  # Adam steps an epoch, all on the same candidates
    learning_rate: float = 1e-3  # Adam's rate on the policy
    loss_clip: float | None = None  # limit of a squared error; inf: none; None: 5 (escape: inf)
    action_bound: float = 1.0  # sampled actions are clipped to [-action_bound, action_bound]
    sampler_steps: int = 20  # steps of the sampler from noise to action
    eta: float = 0.0  # noise of the sampler (equation 4): 0 is the ODE, 1 the reverse-time SDE
    hidden: int = 48  # width of the two hidden layers of the velocity network
    pretrain_steps: int = 1000  # Adam steps that fit the initial policy
    runs_dir: str = "runs"  # where the run's folder is made


class Method(NamedTuple):
    """One curve: a weighting, and for neg its floor."""

    weighting: Weighting
    ell: float = 0.0

    @property
    def name(self) -> str:
        return f"neg({self.ell:g})" if self.weighting == "neg" else self.weighting


def list_methods(args: Args) -> list[Method]:
    """The curves of a run; neg has one for each floor."""
    methods = []
    for weighting in args.methods:
        if weighting == "neg":
            methods += [Method("neg", ell + 0.0) for ell in args.ell]  # + 0.0: -0 becomes 0
        else:
            methods.append(Method(weighting))
    return methods


COUNTS = ("num_seeds", "num_epochs", "num_particles", "gradient_steps", "sampler_steps", "hidden")
COUNTS += ("pretrain_steps",)
POSITIVES = ("temperature", "temperature_lr", "nce_gamma", "learning_rate", "action_bound")


def require(args: Args, flag: str, is_allowed: bool, allowed: str) -> None:
    """Exit with one line that names the flag and what it may be, unless `is_allowed`."""
    if not is_allowed:
        name = flag.replace("_", "-")
        raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, flag)}")


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for flag in COUNTS:
        require(args, flag, getattr(args, flag) >= 1, "a whole number, at least 1")
    for flag in POSITIVES:
        require(args, flag, 0 < getattr(args, flag) < math.inf, "a finite number above 0")
    require(args, "eta", 0 <= args.eta <= 10, "a number from 0 to 10")
    noise = args.candidate_noise
    require(args, "candidate_noise", 0 <= noise < math.inf, "finite and at least 0")
    ends = [abs(center) for center in PROBLEMS[args.problem].centers]
    require(args, "action_bound", args.action_bound >= max(ends), f"at least {max(ends)}")
    is_seed = 0 <= args.seed <= 2**31 - args.num_seeds
    require(args, "seed", is_seed, "at least 0, and the last seed below 2^31")
    require(args, "alpha", 1 < args.alpha <= 5, "above 1, at most 5: float32 is not exact beyond")
    require(args, "loss_clip", args.loss_clip > 0, "above 0, inf for no clip")
    if args.target_kl is not None:
        log_n = math.log(args.num_particles)  # weights that sum to one are never further apart
        is_allowed = 0 < args.target_kl < log_n
        require(args, "target_kl", is_allowed, f"above 0, below log(num_particles) = {log_n:.3f}")
        has_temperature = not {"wd1", "qvpo"} & set(args.methods)
        require(args, "target_kl", has_temperature, "left out with wd1 and qvpo, which have no T")
    are_floors = all(-math.inf < ell <= 0 for ell in args.ell)
    require(args, "ell", are_floors, "finite and at most 0")
    has_floors = len(args.ell) > 0 or "neg" not in args.methods
    require(args, "ell", has_floors, "one or more floors for neg")
    methods = list_methods(args)
    is_distinct = len({method.name for method in methods}) == len(methods) > 0
    require(args, "methods", is_distinct, "one or more, each once, and so the floors in --ell")
    is_signed = any(method.ell < 0 or method.weighting == "wd1" for method in methods)
    is_allowed = args.matching == "flow" or not is_signed
    require(args, "matching", is_allowed, "flow with signed weights (wd1, and neg below 0)")


# ============================================ PROBLEM ============================================
# To add a problem, add an entry to PROBLEMS and its name to Args.problem. For a reward of another
# form, change `reward`, and `best` and `middle` of Problem with it.
class Problem(NamedTuple):
    """R(a) = max_k heights[k] exp(-((a - centers[k]) / width)^2 / 2), and the initial policy."""

    width: float
    heights: tuple[float, float]  # the lower optimum first
    centers: tuple[float, float]
    init_mean: float  # the initial policy is N(init_mean, init_std^2)
    init_std: float
    defaults: dict  # of flags that were not given

    @property
    def best(self) -> float:
        """max_a R(a)."""
        return max(self.heights)

    @property
    def middle(self) -> float:
        """The reward above which a policy counts as escaped from the lower optimum."""
        return sum(self.heights) / 2


# The paper prints neither its rewards nor these settings: benchmark/BANDIT.md says how they were
# chosen. In sharp and broad the policy starts between the two optima.
BETWEEN = dict(
    heights=(0.7, 1.0),
    centers=(-0.7, 0.7),
    init_mean=0.0,
    init_std=0.4,
    defaults=dict(
        methods=("exp", "linear", "square"), num_epochs=100, temperature=0.05, loss_clip=5.0
    ),
)
# In escape it starts on the lower one. neg then needs two other settings: no loss clip, since a clip
# stops the gradient of candidates that are being pushed away, and a temperature so small that a
# policy on top of the lower optimum still has candidates at the floor.
ON_LOWER = dict(
    heights=(0.5, 1.0),
    centers=(-0.5, 0.5),
    init_mean=-0.5,
    init_std=0.15,
    defaults=dict(
        methods=("exp", "linear", "square", "neg"),
        num_epochs=200,
        temperature=0.01,
        loss_clip=math.inf,
    ),
)
PROBLEMS = {
    "sharp": Problem(width=0.08, **BETWEEN),
    "broad": Problem(width=0.5, **BETWEEN),
    "escape": Problem(width=0.2, **ON_LOWER),
}


def fill_defaults(args: Args) -> Args:
    """The flags, with the problem's defaults for those that were not given."""
    defaults = PROBLEMS[args.problem].defaults
    missing = [flag for flag in defaults if getattr(args, flag) in (None, ())]
    return replace(args, **{flag: defaults[flag] for flag in missing})


def reward(problem: Problem, actions: jax.Array) -> jax.Array:
    """R (...) at actions (...)."""
    z = (actions[..., None] - jnp.array(problem.centers)) / problem.width
    bumps = jnp.array(problem.heights) * jnp.exp(-(z**2) / 2)
    return bumps.max(axis=-1)


# ============================================ POLICY =============================================
class VelocityNet(nn.Module):
    """v(x_t, t) (...) at x_t (...) and times t that broadcast to it; two hidden layers."""

    hidden: int

    @nn.compact
    def __call__(self, x, t):
        t = jnp.broadcast_to(t, x.shape)
        features = [x, t, jnp.sin(2 * jnp.pi * t), jnp.cos(2 * jnp.pi * t)]
        h = jnp.stack(features, axis=-1)
        h = nn.silu(nn.Dense(self.hidden)(h))
        h = nn.silu(nn.Dense(self.hidden)(h))
        return nn.Dense(1)(h)[..., 0]


def sampler_step(x, v, z, t, s, eta: float) -> jax.Array:
    """Equation 4 from time t down to s: x_s (...), for x = x_t, v = v(x, t) and fresh noise z.

    x_0 and eps, as the velocity predicts them, are mixed anew for time s, after a part of eps has
    been replaced by z. If eta = 0 all of eps is kept, which is Euler's step x - (t - s) v on the
    ODE. Else what is kept comes from solving equation 4's SDE exactly for a fixed x_0 (an Euler
    step of it would divide by 1 - t = 0 at the start): eps is then an Ornstein-Uhlenbeck process of
    rate eta^2 / (t (1 - t)), which from t to s keeps (s (1 - t) / (t (1 - s)))^(eta^2) of itself.
    For the exact velocity and small steps the law of x_0 is the same for every eta.
    """
    x_0 = x - t * v
    eps = x + (1 - t) * v
    kept = (s * (1 - t) / (t * (1 - s))) ** (eta**2)  # at t = 1 none, or all (0^0 = 1) if eta = 0
    eps = kept * eps + jnp.sqrt(1 - kept**2) * z
    return (1 - s) * x_0 + s * eps


def sample_actions(velocity, x_1, key, num_steps: int, eta: float) -> jax.Array:
    """Actions x_0 (...) from noise x_1 (...), in equal steps from t = 1 to 0; velocity(x, t)."""

    def step(x, i):
        t = (num_steps - i) / num_steps
        s = (num_steps - i - 1) / num_steps
        z = 0.0
        if eta > 0:
            z = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        return sampler_step(x, velocity(x, t), z, t, s, eta), None

    x_0, _ = jax.lax.scan(step, x_1, jnp.arange(num_steps))
    return x_0


def act(args: Args, params, x_1, key) -> jax.Array:
    """Actions (...) of the policy from noise x_1 (...), clipped to the action bound."""
    velocity = partial(VelocityNet(args.hidden).apply, params)
    actions = sample_actions(velocity, x_1, key, args.sampler_steps, args.eta)
    return jnp.clip(actions, -args.action_bound, args.action_bound)


# ========================================== REWEIGHTING ==========================================
# To add a weighting: write its function here, which shifts q by its maximum; call it in
# compute_weights with the temperature scaled as said there; add its name to Weighting, and to
# is_signed in check_args if it can be negative or does not sum to one (which nce needs).
#
# exp, linear, square and neg are those of gempo_{exp,linear,square,neg}.py word for word, where
# they are derived: what is tried here can be carried over. In short, with q in descending order,
# `excess` at rank k is what the top k would sum to if nu were q_k; it rises with k, and those ranks
# are active (above nu) where it does not pass the sum that is asked for. In square, `deviations`
# are the sums of squared deviations from the mean of the top k, updated as Welford does: as a
# difference of sums of squares they would lose their digits in float32.


def solve_normalizer_exp(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i exp((q_i - nu) / temp) = 1, for q (..., N) and temp > 0."""
    return temp * jax.nn.logsumexp(q / temp, axis=-1, keepdims=True)


def reweight_exp(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights exp((q_i - nu) / temp) (example 3.1), which sum to one: (..., N), for q (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_exp(q, temp)
    return jnp.exp((q - nu) / temp)


def solve_normalizer_linear(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, 0) = 1, for q (..., N) and temp > 0."""
    x = jnp.sort(q, axis=-1, descending=True)
    prefix_sums = jnp.cumsum(x, axis=-1)
    excess = prefix_sums - jnp.arange(1, q.shape[-1] + 1) * x
    k = jnp.sum(excess <= temp, axis=-1, keepdims=True)
    active_sum = jnp.take_along_axis(prefix_sums, k - 1, axis=-1)
    return (active_sum - temp) / k


def reweight_linear(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights max((q_i - nu) / temp, 0) (section 4), which sum to one: (..., N), for q (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_linear(q, temp)
    return jnp.maximum((q - nu) / temp, 0.0)


def solve_normalizer_square(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, 0)^2 = 1, for q (..., N) and temp > 0."""
    z = jnp.sort(q, axis=-1, descending=True) / temp
    ranks = jnp.arange(1, q.shape[-1] + 1)
    means = jnp.cumsum(z, axis=-1) / ranks
    # D_k grows by (z_k - z-bar_k)^2 k / (k - 1) (Welford); the paper's S_2 and S_1^2 would cancel.
    growth = (z - means) ** 2 * ranks / jnp.maximum(ranks - 1, 1)
    deviations = jnp.cumsum(growth, axis=-1)
    excess = deviations + ranks * (means - z) ** 2
    k = jnp.sum(excess <= 1, axis=-1, keepdims=True)
    active_mean = jnp.take_along_axis(means, k - 1, axis=-1)
    active_deviations = jnp.take_along_axis(deviations, k - 1, axis=-1)
    return temp * (active_mean - jnp.sqrt((1 - active_deviations) / k))


def reweight_square(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights max((q_i - nu) / temp, 0)^2 (section 4), which sum to one: (..., N), for q (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_square(q, temp)
    return jnp.maximum((q - nu) / temp, 0.0) ** 2


def solve_normalizer_neg(q: jax.Array, temp: jax.Array, ell: float) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, ell / N) = 1, for q (..., N), ell <= 0."""
    n = q.shape[-1]
    floor = ell / n
    x = jnp.sort(q, axis=-1, descending=True)
    prefix_sums = jnp.cumsum(x, axis=-1)
    excess = prefix_sums - jnp.arange(1, n + 1) * x
    k = jnp.sum(excess <= temp * (1 - n * floor), axis=-1, keepdims=True)
    active_sum = jnp.take_along_axis(prefix_sums, k - 1, axis=-1)
    return (active_sum - temp * (1 - (n - k) * floor)) / k


def reweight_neg(q: jax.Array, temp: jax.Array, ell: float) -> jax.Array:
    """Weights max((q_i - nu) / temp, ell / N) (equation 11), which sum to one: (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_neg(q, temp, ell)
    return jnp.maximum((q - nu) / temp, ell / q.shape[-1])


def reweight_power(q: jax.Array, temp: jax.Array, alpha: float) -> jax.Array:
    """Weights max((q_i - nu) / temp, 0)^(1/(alpha-1)) (example 3.3), which sum to one: (..., N).

    By bisection on m, the weight of the best particle, which lies in [1/N, 1]. For q shifted by its
    maximum nu = -temp m^(alpha-1), and the sum of all weights rises with m.
    """
    z = (q - q.max(axis=-1, keepdims=True)) / temp

    def weights_at(best):
        return jnp.maximum(z + best ** (alpha - 1), 0.0) ** (1 / (alpha - 1))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        is_high = weights_at(middle).sum(axis=-1, keepdims=True) > 1
        return jnp.where(is_high, low, middle), jnp.where(is_high, middle, high)

    bracket = jnp.full_like(z[..., :1], 1 / q.shape[-1]), jnp.ones_like(z[..., :1])
    low, _ = jax.lax.fori_loop(0, 30, halve, bracket)  # 2^-30 is below what float32 resolves
    return weights_at(low)


def reweight_wd1(q: jax.Array) -> jax.Array:
    """Weights softmax(A) - softmax(-A) (example 3.4), which sum to zero: (..., N), for q alike."""
    deviation = q - q.mean(axis=-1, keepdims=True)
    advantages = deviation / (q.std(axis=-1, keepdims=True) + 1e-8)  # rewards may all be equal
    return jax.nn.softmax(advantages) - jax.nn.softmax(-advantages)


def compute_weights(args: Args, method: Method, q: jax.Array, temperature: jax.Array) -> jax.Array:
    """The method's weights (..., N) for rewards q (..., N).

    `temperature` is T in the table at the top. It means the same for every N. It does not make the
    weightings equally sharp, since w is steeper in q the larger p is; --target-kl does. The reweight
    functions give w_i instead of N w_i, so they are called with T N^(1/p); N cancels in exp.
    """
    n = q.shape[-1]
    match method.weighting:
        case "exp":
            return reweight_exp(q, temperature)
        case "linear":
            return reweight_linear(q, temperature * n)
        case "square":
            return reweight_square(q, temperature * n**0.5)
        case "neg":
            return reweight_neg(q, temperature * n, method.ell)
        case "power":
            return reweight_power(q, temperature * n ** (args.alpha - 1), args.alpha)
        case "qvpo":
            return reweight_linear(q, jnp.float32(n))  # temperature 1: N w_i = max(q_i - nu, 0)
        case "wd1":
            return reweight_wd1(q)


def kl_to_uniform(weights: jax.Array) -> jax.Array:
    """KL(w, uniform) (...) of weights (..., N) (appendix F); of their positive part if signed."""
    p = jnp.maximum(weights, 1e-6)  # keeps the logarithm finite
    p = p / p.sum(axis=-1, keepdims=True)
    return jnp.log(p.shape[-1]) + jnp.sum(p * jnp.log(p), axis=-1)


# =========================================== MATCHING ============================================
def matching_errors(velocity, x_0, key) -> jax.Array:
    """|v(x_t, t) - (eps - x_0)|^2 (N,) for samples x_0 (N,), each at a t and eps of its own."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.uniform(t_key, x_0.shape)
    eps = jax.random.normal(eps_key, x_0.shape)
    x_t = (1 - t) * x_0 + t * eps
    target = eps - x_0
    return (velocity(x_t, t) - target) ** 2


def flow_loss(errors, weights) -> jax.Array:
    """Reweighted flow matching, sum_i w_i error_i (equation 8), for errors and weights (N,)."""
    return jnp.sum(weights * errors)


def nce_loss(errors, weights, gamma: float) -> jax.Array:
    """Noise contrastive estimation: -sum_i w_i log softmax(-errors / gamma)_i (appendix G).

    A cross-entropy of two distributions over the candidates: the weights, and the policy's, with
    -errors / gamma in place of its log density. So weights must not be negative and must sum to one.
    An error is of one t and eps; the paper's objective has its mean over them in the softmax, of which
    this is an upper bound on average (Jensen's inequality, as in the last step of appendix G).
    """
    attraction = jnp.sum(weights * errors) / gamma
    log_partition = jax.nn.logsumexp(-errors / gamma)
    return attraction + log_partition


def fit(loss_fn, optimizer, params, opt_state, keys):
    """A gradient step on loss_fn(params, key) for each key: params, opt_state and the losses."""

    def step(carry, key):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), keys)
    return params, opt_state, losses


# =========================================== TRAINING ============================================
class State(NamedTuple):
    """What learning changes."""

    params: Any  # of the velocity network
    opt_state: Any
    log_temperature: jax.Array
    temperature_opt_state: Any


class Record(NamedTuple):
    """What is measured after an epoch."""

    regret: jax.Array  # simple regret; NaN if an action is (a huge one ends on the action bound)
    histogram: jax.Array  # (100,) how many of the evaluation's actions lie in each bin
    loss: jax.Array  # mean over the epoch's gradient steps
    temperature: jax.Array  # that the epoch's weights were computed with


EVAL_ACTIONS = 256  # actions of an evaluation


def bin_edges(args: Args) -> np.ndarray:
    """Edges (101,) of the histogram's bins, which reach beyond the action bound: none is left out."""
    return np.linspace(-1.25 * args.action_bound, 1.25 * args.action_bound, 101)


def initial_state(args: Args, key) -> State:
    """The policy after flow matching to samples of the problem's N(init_mean, init_std^2)."""
    problem = PROBLEMS[args.problem]
    net = VelocityNet(args.hidden)
    init_key, fit_key = jax.random.split(key)
    params = net.init(init_key, jnp.zeros(1), jnp.zeros(1))

    def loss_fn(params, key):
        draw_key, loss_key = jax.random.split(key)
        x_0 = problem.init_mean + problem.init_std * jax.random.normal(draw_key, (256,))  # a batch
        errors = matching_errors(partial(net.apply, params), x_0, loss_key)
        return errors.mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, args.pretrain_steps))
    keys = jax.random.split(fit_key, args.pretrain_steps)
    params, _, _ = fit(loss_fn, optimizer, params, optimizer.init(params), keys)
    log_temperature = jnp.log(args.temperature)
    return State(
        params=params,
        opt_state=optax.adam(args.learning_rate).init(params),
        log_temperature=log_temperature,
        temperature_opt_state=optax.adam(args.temperature_lr).init(log_temperature),
    )


def initial_states(args: Args) -> tuple[State, jax.Array]:
    """Initial states (S, ...), and a key (S,) for each seed's training.

    Everything random comes from these, so that methods share a seed's initial policy and draws:
    their paired differences are less noisy than their regrets.
    """
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seed, args.seed + args.num_seeds))
    pairs = jax.vmap(jax.random.split)(keys)  # (S, 2)
    init_keys, train_keys = pairs[:, 0], pairs[:, 1]
    state = jax.jit(jax.vmap(partial(initial_state, args)))(init_keys)
    return state, train_keys


def tune_temperature(args: Args, state: State, weights) -> State:
    """An Adam step on T (target_kl - KL(w, uniform)) (equation 23) in log T, T the temperature."""
    temperature = jnp.exp(state.log_temperature)
    grad = temperature * (args.target_kl - kl_to_uniform(weights))
    optimizer = optax.adam(args.temperature_lr)
    update, opt_state = optimizer.update(grad, state.temperature_opt_state)
    log_temperature = state.log_temperature + update
    return state._replace(log_temperature=log_temperature, temperature_opt_state=opt_state)


def evaluate(args: Args, params, key) -> tuple[jax.Array, jax.Array]:
    """Simple regret () and histogram (100,) of the policy, from quantiles of the noise.

    With quantiles in place of draws, the regret of the ODE carries no sampling error.
    """
    problem = PROBLEMS[args.problem]
    quantiles = jax.scipy.special.ndtri((jnp.arange(EVAL_ACTIONS) + 0.5) / EVAL_ACTIONS)
    actions = act(args, params, quantiles, key)
    regret = problem.best - reward(problem, actions).mean()
    is_finite = jnp.isfinite(actions).all()  # the reward's max may swallow a NaN
    histogram, _ = jnp.histogram(actions, bin_edges(args))
    return jnp.where(is_finite, regret, jnp.nan), histogram


# The same for all seeds: params and keys (S, ...) to regrets (S,) and histograms (S, 100).
evaluate_seeds = jax.jit(jax.vmap(evaluate, in_axes=(None, 0, 0)), static_argnums=0)


def run_epoch(args: Args, method: Method, state: State, key) -> tuple[State, Record]:
    """One epoch of one seed: the state after it, and what was measured."""
    act_key, sampler_key, noise_key, fit_key, eval_key = jax.random.split(key, 5)

    # 1. Draw candidates, and add noise after the action bound.
    x_1 = jax.random.normal(act_key, (args.num_particles,))
    candidates = act(args, state.params, x_1, sampler_key)
    candidates += args.candidate_noise * jax.random.normal(noise_key, candidates.shape)

    # 2. and 3. Weigh them by their rewards.
    q = reward(PROBLEMS[args.problem], candidates)
    temperature = jnp.exp(state.log_temperature)
    weights = compute_weights(args, method, q, temperature)
    if args.target_kl is not None:
        state = tune_temperature(args, state, weights)

    # 4. Fit the policy to the weighted candidates.
    def loss_fn(params, key):
        velocity = partial(VelocityNet(args.hidden).apply, params)
        errors = matching_errors(velocity, candidates, key)
        errors = jnp.minimum(errors, args.loss_clip)
        if args.matching == "nce":
            return nce_loss(errors, weights, args.nce_gamma)
        return flow_loss(errors, weights)

    optimizer = optax.adam(args.learning_rate)
    keys = jax.random.split(fit_key, args.gradient_steps)
    params, opt_state, losses = fit(loss_fn, optimizer, state.params, state.opt_state, keys)

    # 5. Evaluate.
    regret, histogram = evaluate(args, params, eval_key)
    state = state._replace(params=params, opt_state=opt_state)
    return state, Record(regret, histogram, losses.mean(), temperature)


# The same for all seeds: states and keys (S, ...) to states and records (S, ...).
run_epoch_of_seeds = jax.jit(jax.vmap(run_epoch, in_axes=(None, None, 0, 0)), static_argnums=(0, 1))


def train(args: Args, method: Method, state: State, keys: jax.Array) -> Record:
    """Train a method on all seeds, from their initial states: records (S, E + 1, ...)."""
    epoch_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    regret, histogram = evaluate_seeds(args, state.params, epoch_keys(keys, 0))
    no_loss = jnp.full_like(regret, jnp.nan)
    records = [Record(regret, histogram, no_loss, jnp.exp(state.log_temperature))]
    for epoch in range(1, args.num_epochs + 1):
        state, record = run_epoch_of_seeds(args, method, state, epoch_keys(keys, epoch))
        records.append(record)
    # One Record of (S, ...) an epoch becomes a single Record of (S, E + 1, ...), on the host.
    return jax.tree.map(lambda *epochs: np.stack(epochs, axis=1), *records)


# ============================================ RESULTS ============================================
# In the table and the figure, a seed whose regret is not finite has diverged, and is left out.
def is_sound(regret) -> np.ndarray:
    """Which seeds (S,) never diverged, for regret (S, E + 1)."""
    return np.isfinite(regret).all(axis=-1)


def standard_error(values) -> np.ndarray:
    """Of the mean over axis 0; NaN for fewer than two values."""
    if len(values) < 2:
        return np.full(np.shape(values)[1:], np.nan)
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def half_interval(values) -> np.ndarray:
    """Half width of the 95% t interval of the mean over axis 0; NaN for fewer than two values."""
    return stats.t.ppf(0.975, len(values) - 1) * standard_error(values)


def escaped_share(args: Args, regret) -> str:
    """How many of all seeds end with a mean reward above the middle, with Wilson's 95% interval.

    A diverged seed has not escaped.
    """
    problem = PROBLEMS[args.problem]
    has_escaped = is_sound(regret) & (problem.best - regret[:, -1] > problem.middle)
    count = int(has_escaped.sum())
    interval = stats.binomtest(count, len(regret)).proportion_ci(method="wilson")
    return f"{count}/{len(regret)} [{interval.low:.2f}, {interval.high:.2f}]"


def print_table(args: Args, regrets: dict[str, np.ndarray]) -> None:
    """A row for each {name: regret (S, E + 1)}.

    Regrets at three epochs, and the mean over epochs 1 to E: mean over the seeds that did not
    diverge +- half of its 95% interval. Then the difference of the mean regret to the first method's,
    paired by seed, with its standard error.
    """
    last = args.num_epochs
    epochs = sorted({max(last // 5, 1), max(last // 2, 1), last})
    names = list(regrets)
    titles = ["method", *(f"regret at {epoch}" for epoch in epochs), "mean regret"]
    titles += [f"minus {names[0]} (s.e.)", "escaped", "diverged"]
    widths = [max(19, len(title) + 2) for title in titles]

    def print_row(cells):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("".join(padded).rstrip())

    print_row(titles)
    for name, regret in regrets.items():
        sound = is_sound(regret)
        mean_regret = regret[:, 1:].mean(axis=-1)
        row = [name]
        for values in (*(regret[sound, epoch] for epoch in epochs), mean_regret[sound]):
            mean = values.mean() if len(values) else math.nan
            row.append(f"{mean:.4f} +- {half_interval(values):.4f}")
        first = regrets[names[0]]
        difference = (mean_regret - first[:, 1:].mean(axis=-1))[sound & is_sound(first)]
        mean = difference.mean() if len(difference) else math.nan
        row.append(f"{mean:+.4f} ({standard_error(difference):.5f})")
        row += [escaped_share(args, regret), f"{np.sum(~sound)}/{len(sound)}"]
        print_row(row)


def plot_regret(path: Path, args: Args, regrets: dict[str, np.ndarray]) -> None:
    """Reward and initial policy on the left, mean regret with 95% intervals on the right."""
    problem = PROBLEMS[args.problem]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    edges = bin_edges(args)
    actions = np.linspace(edges[0], edges[-1], 501)
    left.plot(actions, reward(problem, actions), color="black", label="reward R(a)")
    bump = 0.8 * np.exp(-(((actions - problem.init_mean) / problem.init_std) ** 2) / 2)
    left.fill_between(actions, bump, alpha=0.3, label="initial policy (not to scale)")
    left.set(xlabel="action a", ylabel="reward", title=f"problem {args.problem}", ylim=(0, 1.35))
    left.legend(loc="upper left")
    lowest = problem.best
    for i, (name, regret) in enumerate(regrets.items()):
        sound = regret[is_sound(regret)]
        if len(sound) == 0:
            continue
        lost = len(regret) - len(sound)
        label = f"{name} ({lost} diverged, left out)" if lost else name
        mean, half = sound.mean(axis=0), half_interval(sound)
        lowest = min(lowest, mean.min())
        # Thick below, thin and dashed above: curves that lie on each other stay visible.
        width = 1.3 + min(len(regrets) - 1 - i, 6)
        dashes = (0, (1 + 4 / width, 2)) if i else "-"
        right.plot(mean, color=f"C{i}", linewidth=width, linestyle=dashes, label=label)
        low = np.maximum(mean - half, 1e-4)  # an interval may reach zero, where there is no log
        right.fill_between(np.arange(len(mean)), low, mean + half, color=f"C{i}", alpha=0.15)
    right.set(xlabel="epoch", ylabel="simple regret (log scale)", yscale="log")
    right.set(xlim=(0, args.num_epochs), ylim=(lowest / 3, 2 * problem.best))
    right.set_title(f"mean and 95% interval of {args.num_seeds} seeds, {args.matching} matching")
    right.grid(alpha=0.3, which="both")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", handlelength=4)
    figure.savefig(path, dpi=90)


def save_args(folder: Path, args: Args) -> None:
    """args.json, the flags."""
    flags = asdict(args)
    if args.loss_clip == math.inf:
        flags["loss_clip"] = "inf"  # JSON has no such number
    (folder / "args.json").write_text(json.dumps(flags, indent=1, allow_nan=False) + "\n")


def save(folder: Path, args: Args, records: dict[str, Record]) -> None:
    """regret.csv, results.npz with arrays (methods, S, E + 1, ...), and regret.png."""
    with open(folder / "regret.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "epoch", "regret"])
        for name, record in records.items():
            for (i, epoch), regret in np.ndenumerate(record.regret):
                writer.writerow([name, args.seed + i, epoch, f"{regret:.6g}"])
    arrays = {"methods": np.array(list(records)), "bins": bin_edges(args)}
    for field in Record._fields:
        arrays[field] = np.stack([getattr(record, field) for record in records.values()])
    np.savez_compressed(folder / "results.npz", **arrays)
    regrets = {name: record.regret for name, record in records.items()}
    plot_regret(folder / "regret.png", args, regrets)


def create_folder(runs_dir: str, name: str) -> Path:
    """A new folder {name}__{seconds since 1970}; the next second if another run has taken it."""
    Path(runs_dir).mkdir(parents=True, exist_ok=True)
    second = int(time.time())
    while True:
        path = Path(runs_dir, f"{name}__{second}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            second += 1


STOPPED = 130  # exit code of a run that was stopped, the shell's for Ctrl-C


def main(args: Args) -> Path:
    """Train all methods; print the table and save the files to a new folder, which is returned."""
    args = fill_defaults(args)
    check_args(args)
    start = time.time()
    try:
        folder = create_folder(args.runs_dir, f"{args.problem}__bandit__{args.seed}")
    except OSError as error:
        what = f"a folder in which one can be made, got {args.runs_dir}: {error}"
        raise SystemExit(f"--runs-dir must be {what}") from None
    print(f"{args.num_seeds} seeds of {args.problem}, to {folder}", flush=True)

    save_args(folder, args)
    records = {}
    try:
        state, keys = initial_states(args)
        for method in list_methods(args):
            record = train(args, method, state, keys)
            save(folder, args, {**records, method.name: record})
            records[method.name] = record  # only now: what is listed as done is on disk
            print(f"{method.name}: done after {time.time() - start:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; {folder} has: {', '.join(records) or 'no method yet'}")
        raise SystemExit(STOPPED) from None

    print_table(args, {name: record.regret for name, record in records.items()})
    return folder


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends a run as Ctrl-C does
    args = tyro.cli(Args, description=__doc__)
    try:
        main(args)
    except SystemExit as stop:
        if stop.code != STOPPED:
            raise
        # JAX, interrupted in a call, often crashes while Python closes down: leave without that.
        sys.stdout.flush()
        os._exit(STOPPED)
