"""Where a training step's time goes, and how far the update is from the floor that its matrix products set.

    python benchmark/throughput.py --script gempo_linear --env-id HalfCheetah-v5
    python benchmark/throughput.py --script gempo_neg --env-id Humanoid-v5 --num-particles 32 --json
    python benchmark/throughput.py --script dna_finetune      # at its defaults; sequences a second

The update's FLOPs are counted from the shapes of its matrix products; the rate they could run at is that of the best
product of (particles, hidden_dim) x (hidden_dim, hidden_dim) measured in the same run; FLOPs over rate is the floor.
"""

import contextlib
import importlib
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    # the script to measure; dna_finetune looks at --repeats and --json alone
    script: Literal["gempo_exp", "gempo_linear", "gempo_square", "gempo_neg", "dna_finetune"] = "gempo_linear"
    env_id: str = "HalfCheetah-v5"  # gymnasium id
    num_envs: int = 1  # environments stepped side by side
    updates_per_step: int = 1  # updates per environment step
    batch_size: int = 256  # states per update
    hidden_dim: int = 256  # width of the hidden layers
    num_particles: int = 64  # particles per state
    diffusion_steps: int = 20  # denoising steps
    buffer_size: int = 1_000_000  # capacity of the replay buffer
    seconds: float = 20.0  # about how long the end-to-end part trains
    repeats: int = 10  # timed calls of each part; the median counts
    json: bool = False  # print one JSON object instead of the table


def count_update_flops(obs_dim: int, action_dim: int, args: Args, td_best_of: int = 1) -> dict[str, float]:
    """Floating-point operations of the matrix products of one update, by part, two for a multiply-add.

    A layer's backward pass costs a product for the weights and, unless its input is data, one for the input.
    """
    batch, hidden, steps = args.batch_size, args.hidden_dim, args.diffusion_steps
    time_dim, state_dim = 64, 128
    state = obs_dim * state_dim + state_dim**2 + state_dim * hidden  # once a state
    times = 2 * time_dim**2 + time_dim * hidden  # once a diffusion step in sampling, once a particle in training
    token = action_dim * hidden + 2 * hidden**2 + hidden * action_dim  # every particle at every step
    critic_state, critic_token = obs_dim * hidden, action_dim * hidden + hidden**2 + hidden

    def sampling(samples):
        return steps * (batch * samples * token + times) + batch * state

    def values(samples):
        return 2 * batch * (critic_state + samples * critic_token)

    tokens = batch * args.num_particles
    train_tokens = tokens * (3 * (token + times) - action_dim * hidden - time_dim**2)
    parts = {
        "sampling of particles": sampling(args.num_particles),
        "actor's gradient": train_tokens + batch * (3 * state - obs_dim * state_dim),
        "particles' Q": values(args.num_particles),
        "TD targets": sampling(td_best_of) + values(td_best_of),
        "critics' gradient": 3 * values(1) - 2 * batch * (critic_state + action_dim * hidden),
    }
    return {name: 2.0 * multiply_adds for name, multiply_adds in parts.items()}


def median_ms(function, repeats: int) -> float:
    """Median milliseconds of `function`, which returns device values, each call waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def measure_matmul_gflops(tokens: int, hidden: int, repeats: int) -> float:
    """The best rate of a product (tokens, hidden) x (hidden, hidden), 10^9 operations a second."""
    x, w = jnp.ones((tokens, hidden)), jnp.full((hidden, hidden), 1.0 / hidden)
    # Ten products in a chain in one call, as in the sampler, so that the cost of a call does not count.
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, 10, lambda _, x: x @ w, x))
    jax.block_until_ready(chain(x, w))
    best = min(median_ms(lambda: chain(x, w), 1) for _ in range(max(repeats, 5)))
    return 10 * 2 * tokens * hidden**2 / (best * 1e-3) / 1e9


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    info = pathlib.Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and info.exists():
        return next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return jax.devices()[0].device_kind


def measure(args: Args) -> dict:
    """All figures for `args`."""
    script = importlib.import_module(args.script)
    own = {name: getattr(args, name) for name in ("env_id", "num_envs", "updates_per_step", "batch_size", "hidden_dim",
                                                  "num_particles", "diffusion_steps", "buffer_size")}  # fmt: skip
    run_args = script.check_args(script.Args(**own))

    # An environment step, random actions.
    env = script.make_env(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(1000)]
    start = time.perf_counter()
    for action in actions:
        *_, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    env_ms = (time.perf_counter() - start) / len(actions) * 1e3

    # The update (one call of train_step, over the updates it makes) and acting.
    key = jax.random.key(0)
    agent = script.create_agent(run_args, obs_dim, action_dim, key)
    buffer = script.create_buffer(args.buffer_size, obs_dim, action_dim)
    rng = np.random.default_rng(0)
    sizes = ((obs_dim,), (action_dim,), (), (obs_dim,), ())
    transitions = script.Transition(*(np.float32(rng.normal(size=(args.num_envs, *size))) for size in sizes))
    start = time.perf_counter()
    train_step = script.train_step.lower(agent, buffer, transitions, key, 0, run_args).compile()
    act = script.act.lower(agent, transitions.obs, key, 0, 1, args.diffusion_steps).compile()
    compile_s = time.perf_counter() - start

    def update():
        nonlocal agent, buffer
        agent, buffer, metrics = train_step(agent, buffer, transitions, key, 0)
        return metrics

    update(), act(agent, transitions.obs, key, 0)
    tokens = args.batch_size * args.num_particles
    matmul_gflops = measure_matmul_gflops(tokens, args.hidden_dim, args.repeats)
    num_updates = args.num_envs * args.updates_per_step
    update_ms = median_ms(update, args.repeats) / num_updates
    # The rate once more: the machine's speed may have drifted.
    matmul_gflops = max(matmul_gflops, measure_matmul_gflops(tokens, args.hidden_dim, args.repeats))
    act_ms = median_ms(partial(act, agent, transitions.obs, key, 0), 10 * args.repeats)
    agent = buffer = None  # frees them: the script below makes its own

    # End to end: the script itself, evaluation off; it leaves random steps and compiling out of its SPS.
    step_ms = args.num_envs * (act_ms / args.num_envs + max(update_ms * num_updates, env_ms * args.num_envs))
    steps = int(args.seconds * 1e3 / step_ms * args.num_envs) // 100 * 100 + 200
    starts = max(args.batch_size, 100)
    run_args = replace(run_args, total_timesteps=starts + steps, learning_starts=starts, eval_frequency=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null):
            script.main(run_args)
        events = EventAccumulator(next(pathlib.Path("runs").iterdir()).as_posix())
        sps = events.Reload().Scalars("charts/SPS")[-1].value

    memory = jax.devices()[0].memory_stats()
    peak = memory["peak_bytes_in_use"] if memory else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    update_gflop = sum(count_update_flops(obs_dim, action_dim, args, run_args.td_best_of).values()) / 1e9
    floor_ms = update_gflop / matmul_gflops * 1e3
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": f"{device_name()}, {os.cpu_count()} CPU cores",
        "jax": f"{jax.__version__}, Python {platform.python_version()}",
        "commit": commit.stdout.strip() or "unknown",
        "compile_s": compile_s,
        "update_ms": update_ms,
        "act_ms": act_ms,
        "env_ms": env_ms,
        "sps": sps,
        "peak_memory_mb": peak / 2**20,
        "update_gflop": update_gflop,
        "matmul_gflops": matmul_gflops,
        "floor_ms": floor_ms,
        "update_over_floor": update_ms / floor_ms,
    }


def measure_dna(args: Args) -> dict:
    """One update of dna_finetune.py at its defaults, sampling and gradient; the floor is that of its convolutions."""
    dna = importlib.import_module("dna_finetune")
    sizes = dna.check_args(dna.Args())
    hidden, length, batch = sizes.hidden_dim, sizes.sequence_length, sizes.num_groups * sizes.group_size
    model, key = dna.Denoiser(hidden, sizes.num_layers), jax.random.key(0)
    params = model.init(key, jnp.zeros((1, length), jnp.uint8))
    oracle = dna.Oracle(sizes.oracle_dim)
    oracle = {"params": oracle.init(key, jnp.zeros((1, length, 4))), "mean": jnp.zeros(()), "std": jnp.ones(())}
    state = {"params": {"model": params, "log_lambda": jnp.zeros(())}}
    state["opt_state"] = dna.make_optimizer("finetuning", sizes).init(state["params"])

    def sample():
        return dna.sample_model(state["params"]["model"], key, model, sizes)

    def update():
        nonlocal state
        tokens = sample()
        batch = (tokens, dna.predict(oracle, tokens))
        state, scalars = dna.train_step(state, key, batch, "finetuning", model, sizes)
        return scalars

    start = time.perf_counter()
    jax.block_until_ready(update())
    compile_s = time.perf_counter() - start
    # Ten convolutions in a chain, of the shape of a residual layer's.
    x, w = jnp.ones((batch, length, hidden)), jnp.full((9, hidden, hidden), 1.0 / (9 * hidden))
    dims = dict(padding="SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    conv = partial(jax.lax.conv_general_dilated, rhs=w, window_strides=(1,), **dims)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, x: conv(x), x))
    jax.block_until_ready(chain(x))
    best = min(median_ms(lambda: chain(x), 1) for _ in range(max(args.repeats, 5)))
    layer = 2.0 * batch * length * 9 * hidden**2
    gflops = 10 * layer / best / 1e6
    forward = layer * sizes.num_layers + 2.0 * batch * length * (45 * hidden + hidden**2 + 5 * hidden)
    flop = forward * (sizes.sample_steps + 1 + 3 * sizes.times_per_sample)
    update_ms, sample_ms = median_ms(update, args.repeats), median_ms(sample, args.repeats)
    floor_ms = flop / gflops / 1e6
    return {
        "device": f"{device_name()}, {os.cpu_count()} CPU cores",
        "jax": f"{jax.__version__}, Python {platform.python_version()}",
        "compile_s": compile_s,
        "update_ms": update_ms,
        "sample_ms": sample_ms,
        "sequences_per_second": batch / update_ms * 1e3,
        "sampled_sequences_per_second": batch / sample_ms * 1e3,
        "update_gflop": flop / 1e9,
        "conv_gflops": gflops,
        "floor_ms": floor_ms,
        "update_over_floor": update_ms / floor_ms,
    }


def main(args: Args) -> None:
    """Measure and print."""
    if args.repeats < 1 or not args.seconds > 0:
        raise SystemExit(f"--repeats must be at least 1 and --seconds above 0, got {args.repeats} and {args.seconds}")
    figures = measure_dna(args) if args.script == "dna_finetune" else measure(args)
    if args.json:
        print(json.dumps(figures))
        return
    print(args.script if args.script == "dna_finetune" else f"{args.script} on {args.env_id}")
    for name, value in figures.items():
        print(f"{name:18} {value:.4g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main(tyro.cli(Args))
