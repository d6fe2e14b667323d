"""Theorem D.2 with signed weights: what flow matching learns where weights are negative.

pi_old is a mixture of Gaussians, and a sample of its component k has the weight w_k, which may be
negative. Reweighted flow matching (equation 8) then has the closed-form solution
E[w v | x_t] / E[w | x_t] (Theorem D.2, equation 9), and the target w pi_old is a mixture of signed
components (Remark I.1). Appendix I tells two cases apart:

    Case I    E[w | x_t] > 0 everywhere: the ODE of the closed form generates w pi_old
    Case II   E[w | x_t] <= 0 somewhere: there the loss has no lower bound, and the closed form has
              a pole on the border

    python benchmark/signed_measures.py

fits a network to one mixture of each kind, samples from it and from the closed form, and prints
where the samples lie; the picture goes to --figure. 35 s of CPU time.

Weights that are a function of x_0 alone, and negative anywhere, are always Case II, since
E[w | x_t] tends to w(x_0) as t tends to 0. Here a weight belongs to the component, so that where
components overlap the negative ones can be outweighed, which is Case I.
"""

import pathlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bandit  # noqa: E402 (the line above finds it)


@dataclass(frozen=True)
class Args:
    seed: int = 1  # seed of everything
    eta: float = 0.0  # noise of the sampler (equation 4); 0 is the ODE
    sampler_steps: int = 200  # steps of the sampler
    num_samples: int = 20_000  # samples of each kind
    training_steps: int = 5_000  # Adam steps of the network, on 1,024 samples each
    hidden: int = 48  # width of the network's two hidden layers
    figure: pathlib.Path = pathlib.Path("runs/signed_measures.png")  # where to draw the picture


# ------------------------------------------ closed form ------------------------------------------
class SignedMixture(NamedTuple):
    """pi_old = sum_k p_k N(m_k, s_k^2), and the weights w_k of its components."""

    probs: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]  # sum_k p_k w_k = 1


CASE_1 = SignedMixture((0.7, 0.3), (0.0, 0.2), (0.5, 0.2), (1.7, -0.6333))
CASE_2 = SignedMixture((0.4, 0.3, 0.3), (-0.7, 0.0, 0.7), (0.2, 0.15, 0.2), (1.45, -0.4, 1.8))
CASES = {"Case I": CASE_1, "Case II around 0": CASE_2}


def log_densities(mix: SignedMixture, x, t) -> jax.Array:
    """log of p_k N(x_t; (1 - t) m_k, (1 - t)^2 s_k^2 + t^2): (..., K), at x_t (...) and t (...)."""
    x, t = jnp.broadcast_arrays(jnp.asarray(x), jnp.asarray(t))
    x, t = x[..., None], t[..., None]
    mean = (1 - t) * jnp.array(mix.means)
    std = jnp.sqrt(((1 - t) * jnp.array(mix.stds)) ** 2 + t**2)
    return jnp.log(jnp.array(mix.probs)) + jax.scipy.stats.norm.logpdf(x, mean, std)


def posterior(mix: SignedMixture, x, t) -> jax.Array:
    """P(component k | x_t) (..., K), also where all densities are too small for float32."""
    return jax.nn.softmax(log_densities(mix, x, t))


def mean_weight(mix: SignedMixture, x, t) -> jax.Array:
    """E[w | x_t] (...); Case II is where it is not positive."""
    return jnp.sum(jnp.array(mix.weights) * posterior(mix, x, t), axis=-1)


@partial(jax.jit, static_argnames="mix")
def closed_form_velocity(mix: SignedMixture, x, t) -> jax.Array:
    """E[w v | x_t] / E[w | x_t] (...) (Theorem D.2), at x_t (...) and t (...).

    Given x_t and the component, x_0 and eps are Gaussian with the means x_0_hat and eps_hat.
    """
    signed = jnp.array(mix.weights) * posterior(mix, x, t)
    x, t = jnp.broadcast_arrays(jnp.asarray(x), jnp.asarray(t))
    x, t = x[..., None], t[..., None]
    means, stds = jnp.array(mix.means), jnp.array(mix.stds)
    residual = x - (1 - t) * means
    variance = ((1 - t) * stds) ** 2 + t**2
    eps_hat = t / variance * residual
    x_0_hat = means + (1 - t) * stds**2 / variance * residual
    return jnp.sum(signed * (eps_hat - x_0_hat), axis=-1) / jnp.sum(signed, axis=-1)


def target_density(mix: SignedMixture, x) -> np.ndarray:
    """w pi_old (...) at x (...), which may be negative."""
    return np.exp(log_densities(mix, x, 0.0)) @ np.array(mix.weights)


def draw_mixture(mix: SignedMixture, key, n: int) -> tuple[jax.Array, jax.Array]:
    """n samples of pi_old (n,) and their weights w_k / n (n,)."""
    component_key, key = jax.random.split(key)
    k = jax.random.choice(component_key, len(mix.probs), (n,), p=jnp.array(mix.probs))
    x_0 = jnp.array(mix.means)[k] + jnp.array(mix.stds)[k] * jax.random.normal(key, (n,))
    return x_0, jnp.array(mix.weights)[k] / n


# -------------------------------------------- learning -------------------------------------------
LOSS_CLIP = 100.0  # of a squared error: Case II has no lower bound without, Case I never comes near


@partial(jax.jit, static_argnames=("args", "mix"))
def learn_velocity(args: Args, mix: SignedMixture, key):
    """Parameters of a VelocityNet after reweighted flow matching on samples of pi_old."""
    net = bandit.VelocityNet(args.hidden)
    init_key, fit_key = jax.random.split(key)
    params = net.init(init_key, jnp.zeros(1), jnp.zeros(1))

    def loss_fn(params, key):
        draw_key, loss_key = jax.random.split(key)
        x_0, weights = draw_mixture(mix, draw_key, 1024)
        errors = bandit.matching_errors(partial(net.apply, params), x_0, loss_key)
        return bandit.flow_loss(jnp.minimum(errors, LOSS_CLIP), weights)

    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, args.training_steps))
    keys = jax.random.split(fit_key, args.training_steps)
    params, _, _ = bandit.fit(loss_fn, optimizer, params, optimizer.init(params), keys)
    return params


# -------------------------------------------- results --------------------------------------------
class Result(NamedTuple):
    """A case: its mixture, the learned velocity field, and samples (num_samples,) of each kind."""

    mix: SignedMixture
    velocity: partial
    samples: dict[str, np.ndarray]  # "pi_old", "closed form", "learned"


def run_case(args: Args, mix: SignedMixture, key) -> Result:
    fit_key, noise_key, sampler_key, old_key = jax.random.split(key, 4)
    params = learn_velocity(args, mix, fit_key)
    velocity = jax.jit(partial(bandit.VelocityNet(args.hidden).apply, params))
    x_1 = jax.random.normal(noise_key, (args.num_samples,))
    old, _ = draw_mixture(mix, old_key, args.num_samples)
    samples = {"pi_old": np.asarray(old)}
    fields = {"closed form": partial(closed_form_velocity, mix), "learned": velocity}
    for name, field in fields.items():
        x_0 = bandit.sample_actions(field, x_1, sampler_key, args.sampler_steps, args.eta)
        samples[name] = np.asarray(x_0)
    return Result(mix, velocity, samples)


def negative_share(mix: SignedMixture, samples) -> float:
    """The share of the samples that lie where w pi_old is not positive."""
    return float(np.mean(np.asarray(mean_weight(mix, samples, 0.0)) <= 0))


def distance_to_target(mix: SignedMixture, samples) -> float:
    """Wasserstein-1 distance to the positive part of w pi_old: no sample can be negative."""
    grid = np.linspace(-3, 3, 3001)
    positive_part = np.maximum(target_density(mix, grid), 0)
    return stats.wasserstein_distance(samples, grid, None, positive_part)


def print_table(results: dict[str, Result]) -> None:
    print(f"{'':32}{'share where w pi_old <= 0':28}W1 to the positive part of w pi_old")
    for name, result in results.items():
        for kind, samples in result.samples.items():
            share = negative_share(result.mix, samples)
            distance = distance_to_target(result.mix, samples)
            print(f"{name + ', ' + kind:32}{share:<28.4f}{distance:.4f}")


def shade_case_two(axes, grid, weight) -> None:
    """Red where E[w | x_t], `weight` (len(grid),), is not positive."""
    is_negative = np.asarray(weight) <= 0
    if is_negative.any():
        low, high = axes.get_ylim()
        label = "$E[w|x_t] \\leq 0$"
        axes.fill_between(grid, low, high, is_negative, color="red", alpha=0.15, label=label)


def draw_densities(axes, name: str, result: Result, grid) -> None:
    """pi_old, the signed target, and histograms of what the two fields generate."""
    bins = np.linspace(grid[0], grid[-1], 65)
    learned, exact = result.samples["learned"], result.samples["closed form"]
    axes.hist(learned, bins, density=True, color="C1", alpha=0.5, label="samples of learned v")
    label = "samples of closed form"
    axes.hist(exact, bins, density=True, histtype="step", color="C2", label=label)
    axes.plot(grid, target_density(result.mix, grid), "k", label="signed target $w\\,\\pi_{old}$")
    old_density = jnp.exp(log_densities(result.mix, grid, 0.0)).sum(axis=-1)
    axes.plot(grid, old_density, "C0--", label="$\\pi_{old}$")
    axes.set(xlabel="action", ylabel="density", title=name, ylim=(-0.6, 2.3))
    shade_case_two(axes, grid, mean_weight(result.mix, grid, 0.0))
    axes.legend(fontsize="small", ncols=2, loc="upper right")


def draw_velocities(axes, result: Result, grid) -> None:
    """The closed form and the learned field at t = 0.1."""
    weight = np.asarray(mean_weight(result.mix, grid, 0.1))
    limit = 1.5 if weight.min() > 0 else 8
    exact = np.asarray(closed_form_velocity(result.mix, grid, 0.1))
    exact = np.where(np.abs(exact) < 1.2 * limit, exact, np.nan)  # no line across a pole
    axes.plot(grid, exact, "k", label="closed form")
    axes.plot(grid, result.velocity(jnp.asarray(grid), 0.1), "C1--", label="learned")
    axes.set(xlabel="$x_t$", ylabel="velocity", ylim=(-limit, limit))
    axes.set_title("velocity at t = 0.1 (Theorem D.2)")
    shade_case_two(axes, grid, weight)
    axes.legend(fontsize="small", loc="lower left")


def draw_paths(axes, result: Result, grid) -> None:
    """E[w | x_t] over t and x_t, and paths of the learned ODE from 24 quantiles of the noise."""
    times = np.linspace(0, 1, 201)
    weight = np.asarray(mean_weight(result.mix, *np.meshgrid(grid, times))).T
    extent = (0, 1, grid[0], grid[-1])
    style = {"origin": "lower", "aspect": "auto", "cmap": "RdBu", "vmin": -2, "vmax": 2}
    image = axes.imshow(weight, extent=extent, **style)
    axes.figure.colorbar(image, ax=axes, label="$E[w|x_t]$ (inside the red line: Case II)")
    if weight.min() < 0:
        axes.contour(times, grid, weight, levels=[0.0], colors="red")
    x = jnp.asarray(stats.norm.ppf((np.arange(24) + 0.5) / 24))
    paths = [x]
    for t in np.linspace(1, 0.01, 100):  # Euler's steps, which are those of sample_actions
        x = x - 0.01 * result.velocity(x, t)
        paths.append(x)
    axes.plot(np.linspace(1, 0, 101), np.stack(paths), "k", linewidth=0.6)
    axes.set(xlabel="t (1: noise, 0: action)", ylabel="$x_t$", ylim=(grid[0], grid[-1]))
    axes.set_title("paths of the learned ODE")


def draw_figure(results: dict[str, Result]) -> Figure:
    """A row for each case."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    grid = np.linspace(-1.6, 1.6, 401)
    panels = figure.subplots(len(results), 3)
    for (left, middle, right), (name, result) in zip(panels, results.items(), strict=True):
        draw_densities(left, name, result, grid)
        draw_velocities(middle, result, grid)
        draw_paths(right, result, grid)
    return figure


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for flag in ("sampler_steps", "num_samples", "training_steps", "hidden"):
        bandit.require(args, flag, getattr(args, flag) >= 1, "a whole number, at least 1")
    bandit.require(args, "seed", 0 <= args.seed < 2**31, "at least 0 and below 2^31")
    bandit.require(args, "eta", 0 <= args.eta <= 10, "a number from 0 to 10")


def main(args: Args) -> None:
    check_args(args)
    results = {}
    for i, (name, mix) in enumerate(CASES.items()):
        results[name] = run_case(args, mix, jax.random.fold_in(jax.random.key(args.seed), i))
    print_table(results)
    try:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_figure(results).savefig(args.figure, dpi=75)
    except (OSError, ValueError) as error:
        bandit.require(args, "figure", False, f"a picture's file that can be written ({error})")
    print(args.figure)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
