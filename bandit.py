# /// script
# requires-python = ">=3.11"
# dependencies = ["jax", "flax", "optax", "tyro", "tensorboardX", "matplotlib", "numpy", "scipy"]
# ///
"""The one-dimensional bandit of GeMPO (arXiv 2603.10250, section 5.1): its theory on one screen.

A flow policy is fitted to its own best samples: draw N candidates from it, weight them by their
rewards, and minimise sum_i w_i |v(x_t, t) - (eps - x_0)|^2 (equation 8). Only the weights differ:

    name     divergence      generator f            weight of candidate i              known as
    exp      forward KL      x log x                exp((q_i - nu) / lam)              DPMD, AWR
    linear   chi-squared     x^2 - 1                max((q_i - nu) / lam, 0)
    square   alpha = 1.5     as power               max((q_i - nu) / lam, 0)^2
    power    alpha > 1       (x^a - x) / (a(a-1))   max((q_i - nu) / lam, 0)^(1/(a-1))
    neg      chi-squared on signed measures         max((q_i - nu) / lam, ell / N)     equation 11
    qvpo     chi-squared, lambda = 1/2 for ever     max(q_i - nu, 0) / N               QVPO
    wd1      none (its weights sum to zero)         softmax(A)_i - softmax(-A)_i       WD1

nu makes the weights of the N candidates sum to one; A is q with zero mean and unit variance.
lam takes up constants such as the 2 in f' = 2 x. ell is a floor on N w_i. QVPO's V is read as nu,
as Example 3.2 says.

    python bandit.py --problem sharp --num-seeds 20      # Figure 2, two sharp optima
    python bandit.py --problem broad --num-seeds 20      # Figure 2, two broad optima
    python bandit.py --problem escape --num-seeds 20     # Figure 1, Neg escapes
    python bandit.py --problem escape --methods neg --ell 0 -0.05 -0.1 -0.3 -0.5 -1
    python bandit.py --problem sharp --methods linear power --alpha 1.2 --matching nce
    python bandit.py --problem velocity                  # Theorem D.2 with signed weights
"""

import csv
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy import stats
from tensorboardX import SummaryWriter

Weighting = Literal["exp", "linear", "square", "neg", "power", "wd1", "qvpo"]


@dataclass(frozen=True)  # frozen: hashable, so that the whole of it is a static argument of jit
class Args:
    problem: Literal["sharp", "broad", "escape", "velocity"] = "sharp"
    """two sharp optima, two broad ones, a policy that starts on the lower one, or Theorem D.2"""
    num_seeds: int = 20
    """seeds `seed` to `seed + num_seeds - 1`, all in one call"""
    seed: int = 1
    """the first seed (velocity uses this one alone)"""
    methods: tuple[Weighting, ...] = ()
    """weightings to compare (none given: exp linear square, and neg on escape)"""
    ell: tuple[float, ...] = (-0.3,)
    """floors of neg on the mean-one weights, each its own curve; 0 is linear"""
    alpha: float = 1.25
    """alpha of power, above 1; 2 is linear, 1.5 is square"""
    matching: Literal["flow", "nce"] = "flow"
    """reweighted flow matching (equation 8) or noise contrastive estimation (appendix G)"""
    nce_gamma: float = 1.0
    """gamma of NCE: the loss difference that counts as one nat"""
    temperature: float | None = None
    """lambda for weights of mean one, the same for all weightings (none: 0.05, on escape 0.01)"""
    target_kl: float | None = None
    """tune the temperature to this KL(w | uniform) in nats (appendix F), from `temperature` on"""
    temperature_lr: float = 0.05
    """Adam rate on log temperature, one step an epoch; used with target_kl"""
    eta: float = 0.0
    """stochasticity of the sampler (equation 4); 0 is the ODE"""
    sampler_steps: int = 20
    """steps of the sampler from noise to action"""
    num_epochs: int | None = None
    """rounds of sampling and fitting (none: 100, on escape 200)"""
    num_particles: int = 256
    """N, candidates an epoch"""
    candidate_noise: float = 0.1
    """standard deviation of the noise added to the candidates, after the action bound"""
    gradient_steps: int = 30
    """Adam steps an epoch, all on the same candidates"""
    learning_rate: float = 1e-3
    """Adam rate of the policy"""
    loss_clip: float | None = None
    """clip of the squared error before the weight, inf for no clip (none given: 5, escape inf)"""
    action_bound: float = 1.0
    """sampled actions are clipped to [-action_bound, action_bound]"""
    hidden: int = 48
    """width of the two hidden layers of the velocity network"""
    pretrain_steps: int = 1000
    """steps that fit the initial policy (and, times 5, the network of --problem velocity)"""
    runs_dir: str = "runs"
    """where the run's folder is made"""


class Method(NamedTuple):
    """One curve: a weighting with its parameters. `name` is what tables and the CSV say."""

    name: str
    weighting: Weighting
    ell: float = 0.0
    alpha: float = 2.0


def parse_methods(args: Args) -> tuple[Method, ...]:
    """One Method a curve: neg gives one for each value of --ell."""
    methods = []
    for weighting in args.methods:
        if weighting == "neg":
            methods += [Method(f"neg({ell + 0.0:g})", "neg", ell=ell) for ell in args.ell]
        else:
            methods.append(Method(weighting, weighting, alpha=args.alpha))
    return tuple(methods)


# --- problem: rewards on a line, and the defaults under which section 5.1's claims show


class Problem(NamedTuple):
    """R(a) = max_k heights[k] exp(-((a - centers[k]) / width)^2 / 2); policy from N(mean, std^2)"""

    width: float
    heights: tuple[float, float]
    centers: tuple[float, float]
    init_mean: float
    init_std: float
    defaults: dict


QUICK = dict(methods=("exp", "linear", "square"), num_epochs=100, temperature=0.05, loss_clip=5.0)
# Repulsion needs both: no loss clip (it stops the gradient of the pushed-away samples) and a
# temperature so small that a policy sitting on the lower optimum still has candidates at the floor.
SLOW = dict(methods=("exp", "linear", "square", "neg"), num_epochs=200, temperature=0.01)
PROBLEMS = {
    "sharp": Problem(0.08, (0.7, 1.0), (-0.7, 0.7), 0.0, 0.4, QUICK),
    "broad": Problem(0.5, (0.7, 1.0), (-0.7, 0.7), 0.0, 0.4, QUICK),
    "escape": Problem(0.2, (0.5, 1.0), (-0.5, 0.5), -0.5, 0.15, SLOW | dict(loss_clip=math.inf)),
}
BINS = np.linspace(-1.25, 1.25, 101)  # of the policy's histogram


def reward(problem: Problem, actions: jax.Array) -> jax.Array:
    """(...) -> (...)"""
    z = (actions[..., None] - jnp.array(problem.centers)) / problem.width
    return jnp.max(jnp.array(problem.heights) * jnp.exp(-(z**2) / 2), axis=-1)


# --- velocity network and the linear path x_t = (1 - t) x_0 + t eps


class VelocityNet(nn.Module):
    """v(x_t, t) for a scalar action: (...), (...) -> (...)."""

    hidden: int

    @nn.compact
    def __call__(self, x, t):
        t = jnp.broadcast_to(t, x.shape)
        h = jnp.stack([x, t, jnp.sin(2 * jnp.pi * t), jnp.cos(2 * jnp.pi * t)], axis=-1)
        for _ in range(2):
            h = nn.silu(nn.Dense(self.hidden)(h))
        return nn.Dense(1)(h)[..., 0]


def sampler_step(x, v, z, t, s, eta: float):
    """Equation 4 from t down to s with velocity v = v(x, t) and fresh noise z: (...) -> (...).

    Solves the SDE exactly while x0_hat stays the same, where Euler-Maruyama would divide by 1 - t
    at t = 1: on this path the noise direction follows an Ornstein-Uhlenbeck process of rate
    eta^2 / (t (1 - t)), so that from t to s it keeps (s (1 - t) / (t (1 - s)))^(eta^2) of itself.
    eta = 0 is Euler's step on the ODE, x - (t - s) v.
    """
    x0_hat, eps_hat = x - t * v, x + (1 - t) * v
    keep = (s * (1 - t) / (t * (1 - s))) ** (eta**2)
    return (1 - s) * x0_hat + s * (keep * eps_hat + jnp.sqrt(1 - keep**2) * z)


def sample_actions(velocity, x_1, key, num_steps: int, eta: float):
    """noise x_1 (...) -> actions (...), in num_steps equal steps from t = 1 to 0."""

    def step(x, i):
        t, s = (num_steps - i) / num_steps, (num_steps - i - 1) / num_steps
        z = jax.random.normal(jax.random.fold_in(key, i), x.shape) if eta > 0 else 0.0
        return sampler_step(x, velocity(x, t), z, t, s, eta), None

    return jax.lax.scan(step, x_1, jnp.arange(num_steps))[0]


# --- reweighting


def solve_normalizer(q, temp, weighting: Weighting, ell: float = 0.0, alpha: float = 2.0):
    """nu with sum_i w_i = 1 (appendix E): q (..., N), temp = lam -> (..., 1). Not for wd1."""
    n = q.shape[-1]
    q_max = jnp.max(q, axis=-1, keepdims=True)
    x = q - q_max  # all sums below lose digits to the size of q if this is left out
    if weighting == "exp":
        return q_max + temp * jax.nn.logsumexp(x / temp, axis=-1, keepdims=True)
    if weighting == "power":
        # Bisection on the weight of the best particle, which lies in [1/N, 1]: given it,
        # nu = -lam w_max^(alpha - 1), and the sum of the weights rises with it.
        def halve(_, bracket):
            low, high = bracket
            mid = (low + high) / 2
            w = jnp.maximum(x / temp + mid ** (alpha - 1), 0) ** (1 / (alpha - 1))
            over = jnp.sum(w, axis=-1, keepdims=True) > 1
            return jnp.where(over, low, mid), jnp.where(over, mid, high)

        bracket = jnp.full_like(q_max, 1 / n), jnp.ones_like(q_max)
        low, high = jax.lax.fori_loop(0, 30, halve, bracket)  # 2^-30 is below float32's step
        return q_max - temp * ((low + high) / 2) ** (alpha - 1)
    x = -jnp.sort(-x, axis=-1)
    ranks = jnp.arange(1, n + 1)
    sums = jnp.cumsum(x, axis=-1)
    if weighting == "square":
        excess = jnp.cumsum(x**2, axis=-1) - 2 * x * sums + ranks * x**2
        k = jnp.maximum(jnp.sum(excess <= temp**2, axis=-1, keepdims=True), 1)
        # mean and variance of the active ones rather than S1^2 - k S2, which cancels in float32
        active = ranks <= k
        mean = jnp.sum(jnp.where(active, x, 0), axis=-1, keepdims=True) / k
        spread = jnp.sum(jnp.where(active, (x - mean) ** 2, 0), axis=-1, keepdims=True)
        return q_max + mean - jnp.sqrt(jnp.maximum(temp**2 - spread, 0) / k)
    floor = ell if weighting == "neg" else 0.0  # linear and qvpo have none
    k = jnp.sum(sums - ranks * x <= temp * (1 - floor), axis=-1, keepdims=True)
    k = jnp.maximum(k, 1)
    rest = (n - k) / n * floor  # what the floored particles add to the sum of the weights
    return q_max + (jnp.take_along_axis(sums, k - 1, axis=-1) - temp * (1 - rest)) / k


def reweight(q, temp, weighting: Weighting, ell: float = 0.0, alpha: float = 2.0):
    """Weights that sum to one (wd1: to zero): q (..., N), temp = lam -> (..., N)."""
    if weighting == "wd1":  # Example 3.4; the constant only guards equal rewards
        adv = q - jnp.mean(q, axis=-1, keepdims=True)
        adv = adv / (jnp.std(q, axis=-1, keepdims=True) + 1e-8)
        return jax.nn.softmax(adv) - jax.nn.softmax(-adv)
    x = q - jnp.max(q, axis=-1, keepdims=True)  # q - nu directly would cancel at |q| >> lam
    if weighting == "exp":
        return jax.nn.softmax(x / temp, axis=-1)
    z = (x - solve_normalizer(x, temp, weighting, ell, alpha)) / temp
    if weighting == "neg":
        return jnp.maximum(z, ell / q.shape[-1])
    power = {"square": 2.0, "power": 1 / (alpha - 1)}.get(weighting, 1.0)
    return jnp.maximum(z, 0.0) ** power


def sum_one_temperature(temperature, weighting: Weighting, n: int, alpha: float = 2.0):
    """lam of weights that sum to one, from that of weights with mean one: temperature N^(alpha-1).

    (N w) = ((q - nu) / temperature)^(1/(alpha-1)) divided by N gives it; exp is alpha -> 1. qvpo
    keeps mean-one temperature 1: f = x^2 - 1 has g = x/2, and its lambda of 1/2 cancels that half.
    """
    power = {"exp": 0.0, "square": 0.5, "power": alpha - 1}.get(weighting, 1.0)
    return (1.0 if weighting == "qvpo" else temperature) * n**power


def kl_to_uniform(weights):
    """KL(w | uniform) (appendix F): (..., N) -> (...); signed weights by their positive part."""
    w = jnp.maximum(weights, 1e-6)
    w = w / jnp.sum(w, axis=-1, keepdims=True)
    return jnp.log(w.shape[-1]) + jnp.sum(w * jnp.log(w), axis=-1)


# --- losses and training


def matching_errors(velocity, key, x_0):
    """|v(x_t, t) - (eps - x_0)|^2 at a fresh (t, eps) for each sample: (N,) -> (N,)."""
    key_t, key_eps = jax.random.split(key)
    t = jax.random.uniform(key_t, x_0.shape)
    eps = jax.random.normal(key_eps, x_0.shape)
    return (velocity((1 - t) * x_0 + t * eps, t) - (eps - x_0)) ** 2


def flow_loss(errors, weights):
    """Equation 8, as the mean over N of the mean-one weights times the errors."""
    return jnp.sum(weights * errors)


def nce_loss(errors, weights, gamma: float):
    """Appendix G, its last line: the target's cross-entropy, positive plus negative part."""
    positive = jnp.sum(weights * errors) / gamma
    negative = jax.nn.logsumexp(-errors / gamma)
    return positive + negative


def fit(net, params, opt, opt_state, keys, draw, loss_fn):
    """len(keys) Adam steps: draw(key) -> (samples, weights), loss_fn(errors, weights) -> scalar."""

    def step(carry, key):
        params, opt_state = carry
        key_draw, key_loss = jax.random.split(key)
        samples, weights = draw(key_draw)

        def loss(params):
            return loss_fn(matching_errors(partial(net.apply, params), key_loss, samples), weights)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = opt.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.lax.scan(step, (params, opt_state), keys)


def initial_policy(args: Args, key):
    """Parameters of a velocity network fitted to the problem's initial Gaussian."""
    problem, net = PROBLEMS[args.problem], VelocityNet(args.hidden)
    opt = optax.adam(optax.cosine_decay_schedule(5e-3, args.pretrain_steps))
    key_init, key = jax.random.split(key)
    params = net.init(key_init, jnp.zeros(1), jnp.zeros(1))

    def draw(key):
        x_0 = problem.init_mean + problem.init_std * jax.random.normal(key, (256,))
        return x_0, jnp.full(256, 1 / 256)

    keys = jax.random.split(key, args.pretrain_steps)
    return fit(net, params, opt, opt.init(params), keys, draw, flow_loss)[0][0]


def train(args: Args, index, params, key):
    """One method on one seed: curves over epochs 0..num_epochs, epoch 0 the initial policy."""
    problem, net, n = PROBLEMS[args.problem], VelocityNet(args.hidden), args.num_particles
    opt, temperature_opt = optax.adam(args.learning_rate), optax.adam(args.temperature_lr)
    # Quantiles in place of draws: the ODE's regret then carries no sampling error of its own.
    quantiles = jax.scipy.special.ndtri((jnp.arange(256) + 0.5) / 256)

    def act(params, x_1, key):
        velocity = partial(net.apply, params)
        actions = sample_actions(velocity, x_1, key, args.sampler_steps, args.eta)
        return jnp.clip(actions, -args.action_bound, args.action_bound)

    def weigh(method, q, temperature):
        lam = sum_one_temperature(temperature, method.weighting, n, method.alpha)
        return reweight(q, lam, method.weighting, method.ell, method.alpha)

    def loss_fn(errors, weights):
        errors = jnp.minimum(errors, args.loss_clip)
        if args.matching == "nce":
            return nce_loss(errors, weights, args.nce_gamma)
        return flow_loss(errors, weights)

    def evaluate(params, key):
        actions = act(params, quantiles, key)
        regret = max(problem.heights) - reward(problem, actions).mean()
        # a broken network makes NaN actions, which the max in the reward may swallow
        regret = jnp.where(jnp.isfinite(actions).all(), regret, jnp.nan)
        return regret, jnp.histogram(actions, BINS)[0]

    def epoch(carry, key):
        params, opt_state, log_temperature, temperature_state = carry
        key_act, key_sde, key_noise, key_fit, key_eval = jax.random.split(key, 5)
        candidates = act(params, jax.random.normal(key_act, (n,)), key_sde)
        candidates += args.candidate_noise * jax.random.normal(key_noise, (n,))
        q, temperature = reward(problem, candidates), jnp.exp(log_temperature)
        # under vmap every method's weights are computed and one is kept: they cost next to nothing
        branches = [partial(weigh, method) for method in parse_methods(args)]
        weights = jax.lax.switch(index, branches, q, temperature)
        if args.target_kl is not None:  # gradient of temperature * (target_kl - KL), equation 23
            grad = temperature * (args.target_kl - kl_to_uniform(weights))
            update, temperature_state = temperature_opt.update(grad, temperature_state)
            log_temperature = log_temperature + update
        keys, draw = jax.random.split(key_fit, args.gradient_steps), lambda _: (candidates, weights)
        (params, opt_state), losses = fit(net, params, opt, opt_state, keys, draw, loss_fn)
        regret, density = evaluate(params, key_eval)
        carry = params, opt_state, log_temperature, temperature_state
        return carry, (regret, density, losses.mean(), temperature)

    key_eval, key = jax.random.split(key)
    first = evaluate(params, key_eval)
    log_temperature = jnp.log(args.temperature)
    carry = params, opt.init(params), log_temperature, temperature_opt.init(log_temperature)
    keys = jax.random.split(key, args.num_epochs)
    regret, density, loss, temperature = jax.lax.scan(epoch, carry, keys)[1]
    return {
        "regret": jnp.concatenate([first[0][None], regret]),  # (E + 1,)
        "density": jnp.concatenate([first[1][None], density]),  # (E + 1, bins), counts of 256
        "loss": loss,  # (E,)
        "temperature": temperature,  # (E,)
    }


@partial(jax.jit, static_argnums=0)
def run_bandit(args: Args, seeds):
    """Everything in one call: seeds (S,) -> dict of arrays (M, S, ...).

    The keys are mapped over seeds alone, so all methods share a seed's initial policy and draws:
    paired differences are then much less noisy, and the draws are computed once per seed.
    """
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    params = jax.vmap(partial(initial_policy, args))(keys[:, 0])
    over_seeds = jax.vmap(partial(train, args), in_axes=(None, 0, 0))
    over_methods = jax.vmap(over_seeds, in_axes=(0, None, None))
    return over_methods(jnp.arange(len(parse_methods(args))), params, keys[:, 1])


# --- Theorem D.2 for a mixture of Gaussians with one (signed) weight a component


class SignedMixture(NamedTuple):
    """pi_old = sum_k p_k N(m_k, s_k^2), and a sample of component k weighs w_k.

    So E[w | x_t] = sum_k w_k P(k | x_t), and the target w pi_old is a mixture again. (With w a
    function of x_0 alone, E[w | x_t] -> w(x_0) as t -> 0: any negative weight would be Case II.)
    """

    probs: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]  # sum_k p_k w_k = 1


HOLE = SignedMixture((0.7, 0.3), (0.0, 0.2), (0.5, 0.2), (1.7, -0.6333))
GONE = SignedMixture((0.4, 0.3, 0.3), (-0.7, 0.0, 0.7), (0.2, 0.15, 0.2), (1.45, -0.4, 1.8))
VELOCITY_CASES = {"positive everywhere: Case I": HOLE, "negative around 0: Case II": GONE}


@partial(jax.jit, static_argnums=0)
def component_densities(mix: SignedMixture, x, t):
    """p_k N(x_t; (1-t) m_k, (1-t)^2 s_k^2 + t^2): (...) -> (..., K)."""
    x, t = jnp.asarray(x)[..., None], jnp.asarray(t)[..., None]
    mean = (1 - t) * jnp.array(mix.means)
    std = jnp.sqrt(((1 - t) * jnp.array(mix.stds)) ** 2 + t**2)
    return jnp.array(mix.probs) * jax.scipy.stats.norm.pdf(x, mean, std)


@partial(jax.jit, static_argnums=0)
def mean_weight(mix: SignedMixture, x, t):
    """E[w | x_t]; Case II is where it is at most zero: (...) -> (...)."""
    p = component_densities(mix, x, t)
    return jnp.sum(jnp.array(mix.weights) * p, axis=-1) / jnp.sum(p, axis=-1)


@partial(jax.jit, static_argnums=0)
def closed_form_velocity(mix: SignedMixture, x, t):
    """Theorem D.2: E[w v | x_t] / E[w | x_t], (...), (...) -> (...)."""
    x, t = jnp.broadcast_arrays(jnp.asarray(x), jnp.asarray(t))
    weighted = jnp.array(mix.weights) * component_densities(mix, x, t)
    x, t = x[..., None], t[..., None]
    residual = x - (1 - t) * jnp.array(mix.means)
    variance = ((1 - t) * jnp.array(mix.stds)) ** 2 + t**2
    eps_hat = t / variance * residual  # E[eps | x_t, k]
    x0_hat = jnp.array(mix.means) + (1 - t) * jnp.array(mix.stds) ** 2 / variance * residual
    return jnp.sum(weighted * (eps_hat - x0_hat), axis=-1) / jnp.sum(weighted, axis=-1)


@partial(jax.jit, static_argnames=("mix", "n"))
def draw_mixture(mix: SignedMixture, key, n: int):
    """n samples of pi_old and their weights w_k / n."""
    key_k, key_x = jax.random.split(key)
    k = jax.random.choice(key_k, len(mix.probs), (n,), p=jnp.array(mix.probs))
    x = jnp.array(mix.means)[k] + jnp.array(mix.stds)[k] * jax.random.normal(key_x, (n,))
    return x, jnp.array(mix.weights)[k] / n


@partial(jax.jit, static_argnums=(0, 1))
def learn_velocity(args: Args, mix: SignedMixture, key):
    """Reweighted flow matching on fresh samples of pi_old; returns the network's parameters."""
    net, steps = VelocityNet(args.hidden), 5 * args.pretrain_steps
    opt = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    key_init, key = jax.random.split(key)
    params = net.init(key_init, jnp.zeros(1), jnp.zeros(1))

    def loss_fn(errors, weights):  # Case II has no lower bound without a clip; 100 spares Case I
        return flow_loss(jnp.minimum(errors, 100.0), weights)

    keys, draw = jax.random.split(key, steps), partial(draw_mixture, mix, n=1024)
    return fit(net, params, opt, opt.init(params), keys, draw, loss_fn)[0][0]


# --- tables and pictures; a seed with a non-finite regret has diverged and is left out of means


def finite(regret) -> np.ndarray:
    """Which seeds never diverged: (..., E + 1) -> (...)."""
    return np.isfinite(regret).all(axis=-1)


def half_interval(values) -> np.ndarray:
    """Half width of the t interval (95%) of the mean over axis 0; NaN for a single value."""
    n = len(values)
    if n < 2:
        return np.full(np.shape(values)[1:], np.nan)
    return stats.t.ppf(0.975, n - 1) * np.std(values, axis=0, ddof=1) / math.sqrt(n)


def escaped_share(args: Args, regret) -> str:
    """Seeds that end nearer in reward to the higher optimum, with Wilson's 95%: (S, E + 1) -> text.

    Diverged seeds count as not escaped.
    """
    gap = abs(np.subtract(*PROBLEMS[args.problem].heights))
    count, n = int(np.sum(finite(regret) & (regret[:, -1] < gap / 2))), len(regret)
    low, high = stats.binomtest(count, n).proportion_ci(method="wilson")
    return f"{count}/{n} [{low:.2f}, {high:.2f}]"


def make_table(args: Args, names: list[str], regret) -> list[list[str]]:
    """regret (M, S, E + 1) -> rows of text, the head first."""
    last, means = args.num_epochs, regret[:, :, 1:].mean(axis=-1)
    epochs = sorted({max(last // 5, 1), max(last // 2, 1), last})
    rows = [["method", *(f"regret at {e}" for e in epochs), "mean regret"]]
    rows[0] += [f"minus {names[0]} (s.e.)", "escaped", "diverged"]
    for i, name in enumerate(names):
        good, row = finite(regret[i]), [name]
        for x in (*(regret[i, good, e] for e in epochs), means[i, good]):
            row.append(f"{x.mean():.4f} +- {half_interval(x):.4f}" if len(x) else "-")
        paired = (means[i] - means[0])[good & finite(regret[0])]
        error = np.std(paired, ddof=1) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
        row.append(f"{paired.mean():+.4f} ({error:.5f})" if i and len(paired) else "-")
        rows.append([*row, escaped_share(args, regret[i]), f"{np.sum(~good)}/{len(good)}"])
    return rows


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def plot_regret(path: Path, args: Args, names: list[str], regret) -> None:
    """Reward and initial policy on the left, regret curves with 95% intervals on the right."""
    problem, grid, last = PROBLEMS[args.problem], np.linspace(-1.25, 1.25, 501), len(names) - 1
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    left.plot(grid, reward(problem, jnp.asarray(grid)), color="black", label="reward R(a)")
    bump = 0.8 * np.exp(-(((grid - problem.init_mean) / problem.init_std) ** 2) / 2)
    left.fill_between(grid, bump, alpha=0.3, label="initial policy (not to scale)")
    left.set(xlabel="action a", ylabel="reward", title=f"problem {args.problem}", ylim=(0, 1.35))
    left.legend(loc="upper left")
    for i, name in enumerate(names):
        good = regret[i][finite(regret[i])]
        lost = len(regret[i]) - len(good)
        label = name + (f" ({lost} diverged, left out)" if lost else "")
        # from thick to thin, and dashed: curves that lie on each other stay visible
        style = dict(color=f"C{i}", label=label, linewidth=1.3 + min(last - i, 6))
        style |= dict(linestyle=(0, (4 / style["linewidth"] + 1, 2)) if i else "-")
        good = good if len(good) else regret[i]  # all diverged: NaN, an empty curve with a label
        mean = good.mean(axis=0)
        half, x = half_interval(good), np.arange(regret.shape[-1])
        right.plot(x, mean, **style)
        right.fill_between(x, np.maximum(mean - half, 1e-4), mean + half, color=f"C{i}", alpha=0.15)
    right.set(xlabel="epoch", ylabel="simple regret (log scale)", yscale="log")
    right.set_title(f"mean and 95% interval over {regret.shape[1]} seeds, {args.matching} matching")
    right.set_xlim(0, args.num_epochs)
    lowest = min((r[finite(r)].mean(axis=0).min() for r in regret if finite(r).any()), default=0.1)
    right.set_ylim(lowest / 3, 2 * max(problem.heights))  # an interval may reach zero
    right.grid(alpha=0.3, which="both")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", handlelength=4)
    figure.savefig(path, dpi=90)


def plot_policy(path: Path, args: Args, names: list[str], regret, density) -> None:
    """How the density (M, S, E + 1, bins) moves: a row a method, the reward along its left."""
    problem, rows, grid = PROBLEMS[args.problem], len(names), np.linspace(BINS[0], BINS[-1], 501)
    figure = Figure(figsize=(11, 1.1 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, width_ratios=[1, 5, 5], sharey=True, squeeze=False)
    # a power scale, or a collapsed policy is all that one sees
    style = dict(aspect="auto", origin="lower", cmap="magma", norm=PowerNorm(0.4, 0, 20))
    style |= dict(extent=(-0.5, args.num_epochs + 0.5, BINS[0], BINS[-1]), interpolation="nearest")
    density = density / 256 / (BINS[1] - BINS[0])
    for i, (row, name) in enumerate(zip(axes, names, strict=True)):
        row[0].plot(reward(problem, jnp.asarray(grid)), grid, color="black")
        row[0].set(ylabel=f"{name}\naction a", xlim=(1.1, -0.1))
        good = finite(regret[i])
        mean = density[i, good].mean(axis=0) if good.any() else np.zeros_like(density[i, 0])
        for axis, image in ((row[1], mean), (row[2], density[i, 0])):
            shown = axis.imshow(image.T, **style)
            for center in problem.centers:
                axis.axhline(center, color="white", linewidth=0.6, linestyle=":")
    titles = ("reward", f"mean over {regret.shape[1]} seeds", f"seed {args.seed}")
    for axis, title, label in zip(axes[0], titles, ("R(a)", "epoch", "epoch"), strict=True):
        axis.set_title(title)
        axes[-1, titles.index(title)].set_xlabel(label)
    figure.colorbar(shown, ax=axes, label="policy density (clipped at 20)", aspect=12 * rows)
    figure.savefig(path, dpi=80)


def plot_velocity(path: Path, results) -> None:
    """A row a case: densities and samples; v at t = 0.1; E[w | x_t] over (t, x) with paths."""
    figure, grid = Figure(figsize=(14, 8), layout="constrained"), np.linspace(-1.6, 1.6, 401)
    for row, result in zip(figure.subplots(2, 3), results, strict=True):
        name, mix, velocity, samples, exact = result
        old = component_densities(mix, grid, 0.0)
        style = dict(bins=np.linspace(-1.6, 1.6, 65), density=True)
        row[0].hist(samples, **style, color="C1", alpha=0.5, label="samples of learned v")
        row[0].hist(exact, **style, histtype="step", color="C2", label="samples of closed form")
        row[0].plot(grid, old @ np.array(mix.weights), "k", label="signed target $w\\,\\pi_{old}$")
        row[0].plot(grid, old.sum(-1), "C0--", label="$\\pi_{old}$")
        row[0].set(xlabel="action", ylabel="density", title=name, ylim=(-0.6, 2.3))
        limit = 1.5 if np.min(mix_weight := np.asarray(mean_weight(mix, grid, 0.1))) > 0 else 8
        exact_v = np.asarray(closed_form_velocity(mix, grid, 0.1))
        exact_v = np.where(np.abs(exact_v) < 1.2 * limit, exact_v, np.nan)  # no line across a pole
        row[1].plot(grid, exact_v, "k", label="closed form")
        row[1].plot(grid, velocity(jnp.asarray(grid), jnp.float32(0.1)), "C1--", label="learned")
        row[1].set(xlabel="$x_t$", ylabel="velocity", ylim=(-limit, limit))
        row[1].set_title("velocity at t = 0.1 (Theorem D.2)")
        for axis, w in zip(row[:2], (mean_weight(mix, grid, 0.0), mix_weight), strict=True):
            shade = dict(where=np.asarray(w) <= 0, color="red", alpha=0.15)
            shade |= dict(label="$E[w|x_t] \\leq 0$")
            if shade["where"].any():
                axis.fill_between(grid, *axis.get_ylim(), **shade)
        row[0].legend(fontsize="small", ncols=2, loc="upper right")
        row[1].legend(fontsize="small", loc="lower left")
        times = np.linspace(0, 1, 201)
        w = np.asarray(mean_weight(mix, *np.meshgrid(grid, times))).T
        style = dict(extent=(0, 1, grid[0], grid[-1]), origin="lower", aspect="auto", cmap="RdBu")
        image = row[2].imshow(w, **style, vmin=-2, vmax=2)
        figure.colorbar(image, ax=row[2], label="$E[w|x_t]$ (inside the red line: Case II)")
        if w.min() < 0:
            row[2].contour(times, grid, w, levels=[0.0], colors="red")
        paths = [jnp.asarray(stats.norm.ppf((np.arange(24) + 0.5) / 24))]
        for t in np.linspace(1, 0.01, 100):  # Euler on the ODE, as in sample_actions
            paths.append(paths[-1] - 0.01 * velocity(paths[-1], jnp.float32(t)))
        row[2].plot(np.linspace(1, 0, 101), np.stack(paths), "k", linewidth=0.6)
        row[2].set(xlabel="t (1: noise, 0: action)", ylabel="$x_t$", ylim=(-1.6, 1.6))
        row[2].set_title("paths of the learned ODE")
    figure.savefig(path, dpi=75)


# --- main


def resolve(args: Args) -> Args:
    """Fills in the problem's defaults and ends with one line if a value is not allowed."""
    defaults = PROBLEMS[args.problem].defaults if args.problem in PROBLEMS else QUICK
    unset = {name: value for name, value in defaults.items() if getattr(args, name) in (None, ())}
    args = replace(args, **unset)
    max_kl, ells = math.log(max(args.num_particles, 2)), args.ell
    ints = dict(num_seeds=1, seed=0, num_epochs=1, num_particles=2, gradient_steps=1)
    ints |= dict(sampler_steps=1, hidden=1, pretrain_steps=1)
    reals = ("temperature", "temperature_lr", "nce_gamma", "learning_rate", "action_bound")
    rules = [(f, getattr(args, f) >= low, f"at least {low}") for f, low in ints.items()]
    rules += [(f, 0 < getattr(args, f) < math.inf, "above 0 and finite") for f in reals]
    rules += [
        ("seed", args.seed + args.num_seeds <= 2**31, "at most 2**31 - num_seeds"),
        ("methods", len(set(args.methods)) == len(args.methods), "each weighting once"),
        ("ell", len({f"{e + 0.0:g}" for e in ells}) == len(ells) > 0, "given, each floor once"),
        ("ell", all(-math.inf < ell <= 0 for ell in ells), "at most 0 and finite"),
        ("alpha", 1 < args.alpha < math.inf, "above 1 and finite"),
        ("eta", 0 <= args.eta < math.inf, "at least 0 and finite"),
        ("candidate_noise", 0 <= args.candidate_noise < math.inf, "at least 0 and finite"),
        ("loss_clip", args.loss_clip > 0, "above 0 (inf: no clip)"),
        ("target_kl", args.target_kl is None or 0 < args.target_kl < max_kl, "in (0, log N)"),
    ]
    for name, ok, allowed in rules:
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"bandit.py: {flag} must be {allowed}; got {getattr(args, name)}")
    signed = any(method.ell < 0 or method.weighting == "wd1" for method in parse_methods(args))
    if args.matching == "nce" and signed:
        allowed = "--methods exp linear square power qvpo (a distribution), or neg with --ell 0"
        raise SystemExit(f"bandit.py: --matching nce needs {allowed}; got {' '.join(args.methods)}")
    return args


def main_velocity(args: Args, folder: Path) -> None:
    """Theorem D.2: closed-form and learned velocity, and what the two generate."""
    results, rows = [], [["case: samples", "share where w pi_old < 0", "W1 to w pi_old"]]
    for i, (name, mix) in enumerate(VELOCITY_CASES.items()):
        key_fit, key_x, key_sde, key_old = jax.random.split(jax.random.key(args.seed + i), 4)
        params = learn_velocity(args, mix, key_fit)
        velocity = jax.jit(partial(VelocityNet(args.hidden).apply, params))
        x_1, steps = jax.random.normal(key_x, (20_000,)), 10 * args.sampler_steps
        samples, exact = (
            np.asarray(sample_actions(v, x_1, key_sde, steps, args.eta))
            for v in (velocity, partial(closed_form_velocity, mix))
        )
        results.append((name, mix, velocity, samples, exact))
        old, grid = np.asarray(draw_mixture(mix, key_old, 20_000)[0]), np.linspace(-3, 3, 3001)
        # the positive part stands in for the signed target, which nothing can sample
        target = np.maximum(component_densities(mix, grid, 0.0) @ np.array(mix.weights), 0)
        for who, x in (("pi_old", old), ("closed form", exact), ("learned", samples)):
            share = np.mean(np.asarray(mean_weight(mix, x, 0.0)) <= 0)
            distance = stats.wasserstein_distance(x, grid, None, target)
            rows.append([f"{name}: {who}", f"{share:.4f}", f"{distance:.4f}"])
    print_table(rows)
    plot_velocity(folder / "velocity.png", results)


def main(args: Args) -> Path:
    """Runs one problem and returns the folder with its files."""
    args, start = resolve(args), time.time()
    folder = Path(args.runs_dir) / f"{args.problem}__bandit__{args.seed}__{int(start)}"
    folder.mkdir(parents=True)  # first: a folder that cannot be made should not cost minutes
    if args.problem == "velocity":
        main_velocity(args, folder)
        print(f"{time.time() - start:.0f} s; see {folder}")
        return folder
    names, seeds = [m.name for m in parse_methods(args)], args.seed + np.arange(args.num_seeds)
    results = jax.tree.map(np.asarray, run_bandit(args, jnp.asarray(seeds)))
    regret = results["regret"]
    print_table(make_table(args, names, regret))
    for name, good in zip(names, finite(regret), strict=True):
        if not good.all():
            print(f"warning: {name} diverged on seeds {seeds[~good].tolist()}", file=sys.stderr)
    with (folder / "regret.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "epoch", "regret"])
        for i, j, epoch in np.ndindex(regret.shape):
            writer.writerow([names[i], seeds[j], epoch, f"{regret[i, j, epoch]:.6g}"])
    plot_regret(folder / "regret.png", args, names, regret)
    plot_policy(folder / "policy.png", args, names, regret, results["density"])
    tags = {"charts/regret": regret, "losses/actor": results["loss"]}
    tags["charts/temperature"] = results["temperature"]
    with SummaryWriter(str(folder)) as board:
        for i, epoch in np.ndindex(len(names), args.num_epochs):
            good = finite(regret[i])
            name = names[i].replace("(", "_").replace(")", "")  # TensorBoard allows no brackets
            for tag, values in tags.items():
                if good.any():  # from the end, as regret alone has an epoch 0
                    mean = values[i, good, epoch - args.num_epochs].mean()
                    board.add_scalar(f"{tag}/{name}", mean, epoch + 1)
    print(f"{time.time() - start:.0f} s; see {folder}")
    return folder


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
