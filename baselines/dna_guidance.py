"""Baselines of the paper's Table 3 on the set-up of dna_finetune.py.

    best_of_n  the best of n samples by the reward oracle
    cg         classifier guidance: p(x_0 | x_t) is tilted by the gradient of the reward oracle
    smc        sequential Monte Carlo: the pretrained sampler, whose particles are resampled
    tds        twisted diffusion sampler (Wu et al. 2023): smc with the proposal of cg
    drakes     DRAKES (Wang et al. 2024): the gradient of the oracle through the sampler

None of them is exactly what DRAKES' code, on which the paper's numbers rest, does:

    cg      There, the gradient goes through the denoiser as well, of a batch's mean, times 300,000.
            Here it is taken at the expected letters, times --guidance-scale.
    tds     There: temperature 0.5, scale 1,000, the oracle at the most probable letters, resampled
            after the move, in batches of 64. Here: --alpha, --guidance-scale, the oracle at the
            expected letters, resampled before the move, in groups of --group-size.
    drakes  There: through 50 of 128 steps with soft letters, made one-hot at the end only; rate
            1e-4, 1,000 updates. Here: through the last --truncation steps, one-hot at each; rate
            and updates are dna_finetune.py's.

Usage: `python baselines/dna_guidance.py --method tds`; other flags are those of dna_finetune.py.
"""

import math
import os
import pathlib
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dna_finetune as dna  # noqa: E402 (after the path it lies on)


@dataclass(frozen=True)
class Args(dna.Args):
    exp_name: str = "dna_guidance"  # name of this experiment
    method: Literal["cg", "smc", "tds", "best_of_n", "drakes"] = "tds"  # see the top of the file
    num_candidates: int = 32  # best_of_n: samples of which the best is kept (n)
    guidance_scale: float = 10.0  # cg, tds: factor of the oracle's gradient
    alpha: float = 0.2  # smc, tds: temperature of the particles' weights, in units of the reward
    truncation: int = 5  # drakes: last steps of the sampler through which the gradient goes
    gumbel_temperature: float = 1.0  # drakes: of the soft letters
    kl_weight: float = 0.0  # drakes: weight of the KL to the pretrained model along the sampling


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    dna.require(args, "resume", args.resume is None, "left out: these runs have no checkpoints")
    dna.check_args(args)
    for flag in ("num_candidates", "truncation"):
        dna.require(args, flag, getattr(args, flag) >= 1, "a whole number, at least 1")
    for flag in ("guidance_scale", "alpha", "gumbel_temperature"):
        dna.require(args, flag, 0 < getattr(args, flag) < math.inf, "a finite number above 0")
    dna.require(args, "kl_weight", 0 <= args.kl_weight < math.inf, "a finite number, at least 0")


def lift_chances(args: Args) -> jax.Array:
    """The chance (T,) that a mask is lifted in each step of the sampler, as in sample_sequences."""
    chances = dna.mask_chance(jnp.linspace(1.0, dna.T_MIN, args.sample_steps + 1))
    return 1 - chances[1:] / chances[:-1]


# =========================================== GUIDANCE ============================================
def value_and_gradient(oracle: dna.Model, letters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The oracle's values (B,) of letters (B, L, 4), and each one's gradient (B, L, 4)."""

    def total(letters):
        values = oracle(letters)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(letters)
    return values, gradient


@partial(jax.jit, static_argnames="args")
def guided_sample(key: jax.Array, setup: dna.Setup, args: Args) -> jax.Array:
    """Tokens (G n, L) by cg, smc or tds; the latter two resample inside each of G groups of n."""
    groups = args.num_groups, args.group_size
    size = math.prod(groups)
    denoiser = setup.denoiser
    resample = partial(jax.random.categorical, shape=(args.group_size,))

    def denoising_step(carry, step):
        x, value = carry  # value (B,): what the last resampling took the particles to be worth
        lift_chance, key = step
        draw_key, resample_key = jax.random.split(key)

        # The value of each particle at its expected letters, and the proposal log_q.
        log_p = nn.log_softmax(denoiser(x))
        is_masked = (x == dna.MASK)[..., None]
        letters = jnp.where(is_masked, jnp.exp(log_p), jax.nn.one_hot(x, 4))
        new_value, gradient = value_and_gradient(setup.reward_oracle, letters)
        log_q = log_p
        if args.method != "smc":
            log_q = nn.log_softmax(log_p + args.guidance_scale * gradient)

        # Resample by how much the value has risen.
        if args.method != "cg":
            log_weights = ((new_value - value) / args.alpha).reshape(groups)
            keys = jax.random.split(resample_key, args.num_groups)
            rows = jax.vmap(resample)(keys, log_weights)
            rows = (rows + args.group_size * jnp.arange(args.num_groups)[:, None]).ravel()
            x, log_p, log_q, new_value = x[rows], log_p[rows], log_q[rows], new_value[rows]

        # Move by the proposal; what it was more likely to draw than p is worth less.
        limits = lift_chance * jnp.cumsum(jnp.exp(log_q), axis=-1)
        u = jax.random.uniform(draw_key, x.shape)
        drawn = jnp.sum(u[..., None] > limits, axis=-1, dtype=x.dtype)
        is_lifted = (x == dna.MASK) & (drawn != dna.MASK)
        letter = jnp.minimum(drawn, 3)[..., None].astype(int)
        log_ratio = jnp.take_along_axis(log_p - log_q, letter, axis=-1)[..., 0]
        correction = jnp.sum(jnp.where(is_lifted, log_ratio, 0.0), axis=-1)  # 0 for smc
        x = jnp.where(x == dna.MASK, drawn, x)
        return (x, new_value - args.alpha * correction), None

    x = jnp.full((size, args.sequence_length), dna.MASK, jnp.uint8)
    steps = lift_chances(args), jax.random.split(key, args.sample_steps)
    (x, _), _ = jax.lax.scan(denoising_step, (x, jnp.zeros(size)), steps)
    return jnp.where(x == dna.MASK, denoiser(x).argmax(axis=-1), x).astype(jnp.uint8)


def sample_guided(setup: dna.Setup, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L) of `guided_sample`."""
    size = args.num_groups * args.group_size
    keys = jax.random.split(jax.random.key(args.seed), math.ceil(args.eval_samples / size))
    samples = [guided_sample(key, setup, args) for key in keys]
    return np.concatenate(samples)[: args.eval_samples]


def sample_best_of_n(setup: dna.Setup, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L), each the best of `num_candidates` samples of the pretrained model."""
    shape = args.eval_samples, args.num_candidates
    tokens = dna.draw_samples(setup.denoiser, replace(args, eval_samples=math.prod(shape)))
    parts = np.split(tokens, args.num_candidates)  # the oracle's memory grows with their size
    rewards = np.concatenate([dna.checked_reward(part, setup) for part in parts])
    best = rewards.reshape(shape).argmax(axis=1)
    return tokens.reshape(*shape, -1)[np.arange(args.eval_samples), best]


# ============================================ DRAKES =============================================
def drakes_loss(denoiser: dna.Model, _, key, setup: dna.Setup, args: Args) -> jax.Array:
    """-(mean reward) + kl_weight KL of sequences drawn from the denoiser.

    Without a gradient up to the last `truncation` steps. In those, the letters are one-hot but have
    the gradient of soft ones (Gumbel-softmax, straight through).
    """
    size = args.num_groups * args.group_size
    num_steps = min(args.truncation, args.sample_steps)
    first_key, key = jax.random.split(key)

    def denoising_step(x, step):  # x (B, L, 5)
        lift_chance, key = step
        gumbel_key, lift_key = jax.random.split(key)
        log_p = nn.log_softmax(denoiser(x))
        log_pretrained = nn.log_softmax(setup.denoiser(x))
        is_masked = x[..., dna.MASK]
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_pretrained), axis=-1)
        noisy = log_p + jax.random.gumbel(gumbel_key, log_p.shape)
        soft = nn.softmax(noisy / args.gumbel_temperature)
        hard = jax.nn.one_hot(soft.argmax(axis=-1), 4)
        letters = soft + jax.lax.stop_gradient(hard - soft)
        drawn = jnp.pad(letters, ((0, 0), (0, 0), (0, 1)))
        is_lifted = is_masked * (jax.random.uniform(lift_key, is_masked.shape) < lift_chance)
        x = jnp.where(is_lifted[..., None] > 0, drawn, x)
        return x, jnp.sum(lift_chance * is_masked * kl, axis=-1)

    chances = jnp.append(lift_chances(args), 1.0)  # at the end all masks are lifted
    keys = jax.random.split(key, len(chances))
    masks = jnp.full((size, args.sequence_length), dna.MASK, jnp.uint8)
    first = chances[:-num_steps], keys[:-num_steps]
    x, _ = jax.lax.scan(denoising_step, jax.nn.one_hot(masks, 5), first)
    x = jax.lax.stop_gradient(x)
    # Unrolled: on a CPU, the gradient of a loop takes 18 times as long.
    last = chances[-num_steps:], keys[-num_steps:]
    x, kl = jax.lax.scan(jax.checkpoint(denoising_step), x, last, unroll=True)
    reward = setup.reward_oracle(x[..., : dna.MASK])
    return args.kl_weight * kl.sum(axis=0).mean() - reward.mean()


def finetune_drakes(setup: dna.Setup, args: Args) -> dna.Model:
    """The denoiser after `num_updates` updates by the gradient of the oracle."""
    loss = partial(drakes_loss, setup=setup, args=args)
    settings = dna.FitSettings(
        args.num_updates, batch_size=1, lr=args.learning_rate, seed=args.seed, warmup=0, decay=False
    )
    no_data = np.zeros(1)
    return dna.fit("drakes", setup.denoiser, loss, no_data, settings)


def sample_method(setup: dna.Setup, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L) by `args.method`."""
    if args.method == "drakes":
        return dna.draw_samples(finetune_drakes(setup, args), args)
    if args.method == "best_of_n":
        return sample_best_of_n(setup, args)
    return sample_guided(setup, args)


def main(args: Args) -> dict:
    """Run the method, write everything to runs/{run} and return the metrics before and after."""
    check_args(args)
    setup = dna.prepare(args)
    run = dna.RunFolder(args, args.method)
    before = dna.draw_samples(setup.denoiser, args)
    start = time.perf_counter()
    after = sample_method(setup, args)
    print(f"{time.perf_counter() - start:.0f} s for {args.method}", flush=True)
    return dna.report(run.path, before, after, setup, args)


if __name__ == "__main__":
    try:
        main(dna.parse_args(Args))
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
        os._exit(130)  # JAX, interrupted in a call, often crashes while Python closes down
    except OSError as error:  # a folder that cannot be written, or a full disk
        raise SystemExit(dna.one_line(error)) from None
