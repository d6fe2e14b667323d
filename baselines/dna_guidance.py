"""The baselines of the paper's Table 3 that need no other pretrained model, on the set-up of dna_finetune.py.

    best_of_n  the best of n samples by the fine-tuning oracle
    cg         classifier guidance: p(x_0 | x_t) is tilted by the oracle's gradient at the expected letters
    smc        sequential Monte Carlo: the pretrained sampler, particles resampled by the oracle at the expected letters
    tds        twisted diffusion sampler (Wu et al. 2023): smc whose proposal is cg, weighted by the ratio of both
    drakes     DRAKES (Wang et al. 2024): backpropagation of the oracle through the last steps of a Gumbel-softmax
               sampler into the denoiser, with a KL term of weight --kl-weight (0: without)

Usage: `python baselines/dna_guidance.py --method tds`; the other flags are those of dna_finetune.py.
"""

import logging
import pathlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dna_finetune as dna  # noqa: E402 (after the path it lies on)
from dna_finetune import MASK, Count, Positive  # noqa: E402

NonNegative = dna.Annotated[float, "a finite number, at least 0", lambda v: 0 <= v < dna.math.inf]


@dataclass(frozen=True)
class Args(dna.Args):
    exp_name: str = pathlib.Path(__file__).stem  # name of this experiment
    method: Literal["cg", "smc", "tds", "best_of_n", "drakes"] = "tds"  # see the top of the file
    num_candidates: Count = 32  # best_of_n: samples of which the best is kept (n)
    guidance_scale: Positive = 10.0  # cg, tds: factor of the oracle's gradient
    alpha: Positive = 0.2  # smc, tds: temperature of the particles' weights, in units of the reward
    truncation: Count = 5  # drakes: last steps of the sampler that are differentiated
    gumbel_temperature: Positive = 1.0  # drakes: of the relaxed letters
    kl_weight: NonNegative = 0.0  # drakes: weight of the KL to the pretrained model, summed over the steps and letters


def expected_letters(x: jax.Array, probs: jax.Array) -> jax.Array:
    """Letters (B, L, 4): one-hot where x (B, L) is not masked, else p(x_0 | x_t)."""
    return jnp.where((x == MASK)[..., None], probs, jax.nn.one_hot(x, 4))


def guided_sample(key, setup: dna.Setup, args: Args) -> jax.Array:
    """Tokens (G n, L) by cg, smc or tds; smc and tds resample within each of G groups of n particles."""
    size, groups = args.num_groups * args.group_size, (args.num_groups, args.group_size)
    chances = dna.mask_chance(jnp.linspace(1.0, dna.T_MIN, args.sample_steps + 1))
    value = partial(dna.predict, setup.oracle)

    def denoise(carry, step):
        x, twist = carry  # twist (B,): the value that the particles' last weights were given
        lifted, key = step
        draw_key, resample_key = jax.random.split(key)
        log_p = nn.log_softmax(setup.model.apply(setup.pretrained, x))
        letters = expected_letters(x, jnp.exp(log_p))
        if args.method == "smc":
            log_q, now = log_p, value(letters)
        else:
            now, gradient = jax.vjp(value, letters)
            log_q = nn.log_softmax(log_p + args.guidance_scale * gradient(jnp.ones_like(now))[0])
        if args.method != "cg":  # resample by how much the value has risen, then move
            log_w = ((now - twist) / args.alpha).reshape(groups)
            rows = jax.vmap(partial(jax.random.categorical, shape=(args.group_size,)))(
                jax.random.split(resample_key, args.num_groups), log_w
            )
            rows = (rows + args.group_size * jnp.arange(args.num_groups)[:, None]).ravel()
            x, log_p, log_q, now = x[rows], log_p[rows], log_q[rows], now[rows]
        u = jax.random.uniform(draw_key, x.shape)
        drawn = jnp.sum(u[..., None] > lifted * jnp.cumsum(jnp.exp(log_q), -1), axis=-1, dtype=x.dtype)
        moved = (x == MASK) & (drawn != MASK)
        ratio = jnp.take_along_axis(log_p - log_q, jnp.minimum(drawn, 3)[..., None].astype(int), -1)[..., 0]
        correction = jnp.sum(jnp.where(moved, ratio, 0.0), axis=-1)  # of the proposal, in nats; 0 for smc
        return (jnp.where(x == MASK, drawn, x), now - args.alpha * correction), None

    x, steps = jnp.full((size, args.sequence_length), MASK, jnp.uint8), jax.random.split(key, args.sample_steps)
    (x, _), _ = jax.lax.scan(denoise, (x, jnp.zeros(size)), (1 - chances[1:] / chances[:-1], steps))
    return jnp.where(x == MASK, setup.model.apply(setup.pretrained, x).argmax(-1), x).astype(jnp.uint8)


def drakes_loss(params, key, batch, model: dna.Denoiser, args: Args):
    """-(mean reward) + kl_weight KL of relaxed samples; batch: the pretrained parameters and the oracle.

    The first steps draw letters without a gradient. In the last ones, letters are Gumbel-softmax: one-hot forward,
    with the relaxed letters' gradient (straight through).
    """
    (pretrained, oracle), params = batch, params["model"]
    chances = dna.mask_chance(jnp.linspace(1.0, dna.T_MIN, args.sample_steps + 1))
    size, steps = args.num_groups * args.group_size, min(args.truncation, args.sample_steps)
    first_key, key = jax.random.split(key)
    x = jax.nn.one_hot(jnp.full((size, args.sequence_length), MASK), 5)

    def denoise(x, step):
        lifted, key = step
        logits, is_masked = model.apply(params, x), x[..., MASK:]
        log_p = nn.log_softmax(logits)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - nn.log_softmax(model.apply(pretrained, x))), axis=-1)
        gumbel_key, lift_key = jax.random.split(key)
        relaxed = nn.softmax((log_p + jax.random.gumbel(gumbel_key, log_p.shape)) / args.gumbel_temperature)
        hard = jax.nn.one_hot(relaxed.argmax(-1), 4)
        letters = relaxed + jax.lax.stop_gradient(hard - relaxed)
        is_lifted = is_masked * (jax.random.uniform(lift_key, is_masked.shape) < lifted)
        x = x * (1 - is_lifted) + is_lifted * jnp.pad(letters, ((0, 0), (0, 0), (0, 1)))
        return x, jnp.sum(lifted * is_masked[..., 0] * kl, axis=-1)

    rates = jnp.append(1 - chances[1:] / chances[:-1], 1.0)  # at the end all masks are lifted
    keys = jax.random.split(key, args.sample_steps + 1)
    start = args.sample_steps + 1 - steps
    x, _ = jax.lax.scan(denoise, x, (rates[:start], keys[:start]))
    last = rates[start:], keys[start:]  # unrolled: in a loop, their gradient takes 18 times as long on a CPU
    x, kl = jax.lax.scan(jax.checkpoint(denoise), jax.lax.stop_gradient(x), last, unroll=True)
    rewards, kl = dna.predict(oracle, x[..., :MASK]), kl.sum(0)
    scalars = {"charts/reward": jnp.median(rewards), "charts/kl": kl.mean()}
    return -rewards.mean() + args.kl_weight * kl.mean(), scalars


def drakes(setup: dna.Setup, run: pathlib.Path, args: Args) -> dict:
    """The denoiser's parameters after `num_updates` updates by the gradient of the oracle."""
    params = jax.tree.map(jnp.copy, {"model": setup.pretrained, "log_lambda": jnp.zeros(())})
    key, batch = jax.random.fold_in(jax.random.key(args.seed), 1), (setup.pretrained, setup.oracle)
    dna.LOSSES["drakes"] = drakes_loss
    return dna.run_stage("drakes", params, args.num_updates, run, key, setup.model, batch, args, every=1)["model"]


def sample_method(setup: dna.Setup, run: pathlib.Path, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L) by `args.method`."""
    if args.method == "drakes":
        return dna.draw(drakes(setup, run, args), setup, args)
    if args.method == "best_of_n":
        many = dna.replace(args, eval_samples=args.eval_samples * args.num_candidates)
        tokens = dna.draw(setup.pretrained, setup, many)
        rewards = dna.in_batches(setup.reward, tokens).reshape(args.eval_samples, -1)
        return tokens.reshape(*rewards.shape, -1)[np.arange(args.eval_samples), rewards.argmax(1)]
    sample = jax.jit(lambda key: guided_sample(key, setup, args))
    keys = jax.random.split(jax.random.key(args.seed), -(-args.eval_samples // (args.num_groups * args.group_size)))
    return np.concatenate([sample(key) for key in keys])[: args.eval_samples]


def main(args: Args) -> dict:
    """Run the method, write everything to runs/{run} and return the metrics before and after."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    if args.reward and args.method != "best_of_n":
        raise SystemExit(f"--reward must be left out with --method {args.method}, which needs the oracle's gradient")
    run, args = dna.open_run(args, args.method, "dna_guidance")
    setup = dna.prepare(run, args)
    before = dna.draw(setup.pretrained, setup, args)
    start = dna.time.perf_counter()
    after = sample_method(setup, run, args)
    print(f"{dna.time.perf_counter() - start:.0f} s for {args.method}", flush=True)
    return dna.report(run, before, after, setup, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
