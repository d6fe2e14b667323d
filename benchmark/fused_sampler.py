"""An experiment: the sampler of the particles as one fused kernel, in Pallas.

    python benchmark/fused_sampler.py  # compiles for an H100 that is not there, and estimates

The scripts' `sample_actions` is some seven kernels a step on a GPU, and most of their time is
activations that travel to memory and back. Here one kernel takes the N particles of a state through
all T steps: only weights, noise and the result touch memory, and the weights stay in its cache.

No GPU has run this: tests/test_fused_sampler.py compares it with `sample_actions` in Pallas'
interpret mode. Only where a GPU has shown that it pays has it a place in the scripts. Needs what
gpu_compile.py needs. Shapes: B states, N particles, T steps, d action dimensions.
"""

import pathlib
import sys
from dataclasses import replace
from functools import partial

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import gpu_compile  # noqa: E402 (the line above finds it)

if __name__ == "__main__":  # before JAX is imported
    gpu_compile.require_plugin()
    gpu_compile.set_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import triton  # noqa: E402

import gempo_linear  # noqa: E402
from gempo_linear import mish, noise_schedule  # noqa: E402

LANES = 16  # action dimensions are padded to this: the least that a tensor core's product takes


def denoise_kernel(
    coefficients, time_embedding, obs_embedding, noise, first, hidden_1, hidden_2, output, actions
):
    """All steps of the particles of one state, that of this program's number.

    The arguments are references to whole arrays: coefficients (T, 5), time_embedding (T, hidden_dim),
    obs_embedding (B, hidden_dim), noise (T + 1, B, N, LANES), weights, and the result (B, N, LANES).
    """
    state = pl.program_id(0)
    num_steps = coefficients.shape[0]
    obs_features = obs_embedding[state]

    def product(x, weights):
        return jnp.dot(x.astype(weights.dtype), weights, preferred_element_type=jnp.float32)

    def layer(x, weights_and_bias):
        weights, bias = weights_and_bias
        return product(x, weights[...]) + bias[...]

    def step(count, x):
        i = num_steps - 1 - count
        alpha, sigma = coefficients[i, 0], coefficients[i, 1]
        x_0_weight, x_weight = coefficients[i, 2], coefficients[i, 3]
        h = mish(product(x, first[...]) + (time_embedding[i] + obs_features))
        h = mish(layer(h, hidden_1))
        h = mish(layer(h, hidden_2))
        x_0 = jnp.clip((x - sigma * layer(h, output)) / alpha, -1.0, 1.0)
        x = x_0_weight * x_0 + x_weight * x + coefficients[i, 4] * noise[i + 1, state]
        # Written in every step, or Triton would load all weights before the loop, and they do not
        # fit into a core's shared memory at once.
        actions[state] = x
        return x

    x = jax.lax.fori_loop(0, num_steps, step, noise[0, state])
    actions[state] = jnp.clip(x, -1.0, 1.0)


def schedule(num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Times (T, 1), and (T, 5) coefficients as `sample_actions` derives them: see DenoisingStep."""
    times = jnp.linspace(gempo_linear.T_MIN, gempo_linear.T_MAX, num_steps + 1)
    alpha, sigma = noise_schedule(times)
    a = alpha[1:] / alpha[:-1]
    beta = 1 - a**2
    x_0_weight = alpha[:-1] * beta / sigma[1:] ** 2
    x_weight = a * sigma[:-1] ** 2 / sigma[1:] ** 2
    noise_std = jnp.sqrt(beta).at[0].set(0.0)
    columns = [alpha[1:], sigma[1:], x_0_weight, x_weight, noise_std]
    return times[1:, None], jnp.stack(columns, axis=1)


def sample_actions(
    actor, params, obs, key, num_samples: int, num_steps: int, dtype=jnp.bfloat16, interpret=False
) -> jax.Array:
    """What the scripts' `sample_actions` draws, by one kernel whose products take `dtype`.

    num_samples and hidden_dim must be powers of two, of at least 16 (Triton's tiles).
    """
    num_states, d = obs.shape[0], actor.action_dim
    padding = LANES - d
    times, coefficients = schedule(num_steps)
    noise = jax.random.normal(key, (num_steps + 1, num_states, num_samples, d))
    weights = params["params"]

    def layer(name):
        return weights[name]["kernel"].astype(dtype), weights[name]["bias"]

    output, output_bias = layer("output")
    kernel = pl.pallas_call(
        denoise_kernel,
        grid=num_states,
        out_shape=jax.ShapeDtypeStruct((num_states, num_samples, LANES), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="fused_sampler",
    )
    actions = kernel(
        coefficients,
        actor.apply(params, times, method="embed_time"),
        actor.apply(params, obs, method="embed_obs"),
        jnp.pad(noise, [(0, 0), (0, 0), (0, 0), (0, padding)]),
        jnp.pad(weights["first_kernel"][:d], [(0, padding), (0, 0)]).astype(dtype),
        layer("hidden_1"),
        layer("hidden_2"),
        (jnp.pad(output, [(0, 0), (0, padding)]), jnp.pad(output_bias, (0, padding))),
    )
    return actions[..., :d]


# =========================================== ESTIMATE ============================================
def compile_for(gpu: gpu_compile.GPU, sampler) -> list[gpu_compile.Kernel]:
    """The kernels of `sampler(actor, params, obs, key, N, T)` at the default sizes, HalfCheetah's."""
    args = gempo_linear.Args()
    actor = gempo_linear.Actor(6, args.hidden_dim)
    on_gpu = gpu_compile.describe_gpu(gpu)

    def describe(function, *inputs):
        shapes = jax.eval_shape(function, *inputs)
        return jax.tree.map(lambda x: x.update(sharding=on_gpu), shapes)

    key = describe(lambda: jax.random.key(0))
    obs = describe(lambda: jnp.zeros((args.batch_size, 17)))
    params = describe(actor.init, key, jnp.zeros((1, 6)), jnp.zeros((1, 1)), jnp.zeros((1, 17)))
    sizes = dict(num_samples=args.num_particles, num_steps=args.diffusion_steps)
    program = jax.jit(partial(sampler, actor, **sizes)).lower(params, obs, key)
    return gpu_compile.count_kernels(program.compile().as_text())


def add_flops(kernel: gpu_compile.Kernel) -> gpu_compile.Kernel:
    """The fused kernel with the FLOPs of its products, which HLO does not show."""
    if kernel.name != "pallas_call":
        return kernel
    args = gempo_linear.Args()
    tokens = args.batch_size * args.num_particles * args.diffusion_steps
    multiply_adds = 2 * LANES * args.hidden_dim + 2 * args.hidden_dim**2
    return replace(kernel, flops={"bf16": 2.0 * tokens * multiply_adds})


def sample_as_the_scripts(actor, params, obs, key, num_samples, num_steps):
    """The scripts' own sampler, as it draws the particles."""
    actor = actor.clone(dot=gempo_linear.bfloat16_dot)
    return gempo_linear.sample_actions(actor, params, obs, key, num_samples, num_steps)


def main() -> None:
    """Compile both samplers and print the tables."""
    gpu = gpu_compile.GPUS["h100"]
    print(f"drawing the particles on {gpu.name}, an estimate")
    print(f"{'':14}{'kernels':>9}{'GB':>9}{'GFLOP':>9}{'ms':>9}")
    for name, sampler in (("the scripts'", sample_as_the_scripts), ("fused", sample_actions)):
        kernels = [add_flops(kernel) for kernel in compile_for(gpu, sampler)]
        gpu_compile.print_row(name, gpu_compile.summarize(kernels, gpu))
        (costliest, *_) = gpu_compile.costliest(kernels, gpu, 1)
        gpu_compile.print_row("  costliest", costliest, f"  {costliest['name']}")


if __name__ == "__main__":
    main()
