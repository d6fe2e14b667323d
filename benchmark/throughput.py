"""Where a training step's time goes, and how far the update is from its matrix products.

    python benchmark/throughput.py --script gempo_linear
    python benchmark/throughput.py --script gempo_neg --env-id Humanoid-v5 --num-particles 32 --json
    python benchmark/throughput.py --script baselines/td3 --num-envs 4

All other flags are the script's own. For the GeMPO scripts the update's FLOPs are counted from the
shapes of its matrix products; the rate they could run at is that of the best product of (particles,
hidden_dim) x (hidden_dim, hidden_dim) measured in the same run; FLOPs over rate is the floor.
"""

import contextlib
import json
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.sweep import (  # noqa: E402 (the line above finds it)
    describe_commit,
    describe_machine,
    find_script,
    is_training_script,
    load_script,
)

GEMPO = ("gempo_exp", "gempo_linear", "gempo_square", "gempo_neg")


@dataclass(frozen=True)
class Args:
    script: str = "gempo_linear"  # name (baselines/td3) or path of the script to measure
    seconds: float = 20.0
    """about how long the end-to-end part trains, but not less than about 100 environment steps"""
    repeats: int = 10  # timed calls of each part; the median counts
    json: bool = False  # print one JSON object instead of the table


# =========================================== THE FLOOR ===========================================
def count_update_flops(obs_dim: int, action_dim: int, args) -> dict[str, float]:
    """FLOPs of the matrix products of one update of GeMPO, by part, two for a multiply-add.

    `args` are the script's. A layer's backward pass costs a product for the weights and, unless its
    input is data, one for the input.
    """
    batch, hidden, steps = args.batch_size, args.hidden_dim, args.diffusion_steps
    time_dim, state_dim = 64, 128
    # Once a state.
    state = obs_dim * state_dim + state_dim**2 + state_dim * hidden
    # Once a diffusion step in sampling, once a particle in training.
    times = 2 * time_dim**2 + time_dim * hidden
    # Every particle at every step.
    token = action_dim * hidden + 2 * hidden**2 + hidden * action_dim
    critic_state, critic_token = obs_dim * hidden, action_dim * hidden + hidden**2 + hidden

    def sampling(samples):
        return steps * (batch * samples * token + times) + batch * state

    def values(samples):
        return 2 * batch * (critic_state + samples * critic_token)

    td_values = values(1)
    if args.td_best_of > 1:
        td_values += values(args.td_best_of)  # the critics choose
    tokens = batch * args.num_particles
    train_tokens = tokens * (3 * (token + times) - action_dim * hidden)
    parts = {
        "sampling of particles": sampling(args.num_particles),
        "actor's gradient": train_tokens + batch * (3 * state - obs_dim * state_dim),
        "particles' Q": values(args.num_particles),
        "TD targets": sampling(args.td_best_of) + td_values,
        "critics' gradient": 3 * values(1) - 2 * batch * (critic_state + action_dim * hidden),
    }
    return {name: 2.0 * multiply_adds for name, multiply_adds in parts.items()}


def measure_matmul_gflops(tokens: int, hidden: int, repeats: int) -> float:
    """The best rate of a product (tokens, hidden) x (hidden, hidden), 10^9 operations a second."""
    x = jnp.ones((tokens, hidden))
    w = jnp.full((hidden, hidden), 1.0 / hidden)

    # Ten products in a chain in one call, as in the sampler: the cost of a call does not count.
    @jax.jit
    def chain(x, w):
        return jax.lax.fori_loop(0, 10, lambda _, x: x @ w, x)

    jax.block_until_ready(chain(x, w))
    times = [median_ms(partial(chain, x, w), 1) for _ in range(max(repeats, 5))]
    operations = 10 * 2 * tokens * hidden**2
    return operations / (min(times) * 1e-3) / 1e9


def measure_floor(obs_dim: int, action_dim: int, args, repeats: int) -> dict[str, float]:
    """How long the matrix products of an update of GeMPO would take at the best rate."""
    update_gflop = sum(count_update_flops(obs_dim, action_dim, args).values()) / 1e9
    tokens = args.batch_size * args.num_particles
    matmul_gflops = measure_matmul_gflops(tokens, args.hidden_dim, repeats)
    return {
        "update_gflop": update_gflop,
        "matmul_gflops": matmul_gflops,
        "floor_ms": update_gflop / matmul_gflops * 1e3,
    }


# =========================================== THE TIMES ===========================================
def median_ms(function, repeats: int) -> float:
    """Median milliseconds of `function`, which returns device values, each call waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def measure_environment(env) -> float:
    """Milliseconds of an environment step, random actions."""
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(1000)]
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return (time.perf_counter() - start) / len(actions) * 1e3


class Parts:
    """The two calls of a training step, compiled, on random transitions."""

    def __init__(self, script: ModuleType, args, obs_dim: int, action_dim: int):
        rng = np.random.default_rng(0)
        rows = []
        for shape in ((obs_dim,), (action_dim,), (), (obs_dim,), ()):
            rows.append(np.float32(rng.normal(size=(args.num_envs, *shape))))
        self.transitions = script.Transition(*rows)
        self.key = jax.random.key(0)
        self.agent = script.create_agent(args, obs_dim, action_dim, self.key)
        self.buffer = script.create_buffer(args.buffer_size, obs_dim, action_dim)
        start = time.perf_counter()
        what = (self.agent, self.buffer, self.transitions, self.key, 0)
        self.compiled_step = script.train_step.lower(*what).compile()
        what = (self.agent, self.transitions.obs, self.key, 0)
        self.compiled_act = script.act.lower(*what, training=True).compile()
        self.compile_s = time.perf_counter() - start

    def update(self):
        what = (self.agent, self.buffer, self.transitions, self.key, 0)
        self.agent, self.buffer, metrics = self.compiled_step(*what)
        return metrics

    def act(self):
        return self.compiled_act(self.agent, self.transitions.obs, self.key, 0)


def short_run(script: ModuleType, args, steps: int):
    """The script's flags for a run that learns for `steps`, or for as many as its log needs.

    These bring its speed into the log once: the script leaves out the first rounds of learning,
    since one of them compiles, and logs every LOG_FREQUENCY steps.
    """
    starts = max(args.batch_size, 100)
    steps = max(steps, 4 * args.num_envs + script.LOG_FREQUENCY)
    return replace(
        args,
        total_timesteps=starts + steps,
        learning_starts=starts,
        eval_frequency=0,
        checkpoint_frequency=0,
        save_model=False,
    )


def measure_sps(script: ModuleType, args) -> float:
    """Environment steps per second, which the script itself logs, of a run with these flags."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            script.main(args)
        (run,) = pathlib.Path("runs").iterdir()
        events = EventAccumulator(str(run)).Reload()
    return events.Scalars("charts/SPS")[-1].value


def measure(script: ModuleType, args, repeats: int, seconds: float) -> dict:
    """All figures of a script with its own `args`."""
    script.check_args(args)
    env = script.make_env(args.env_id)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    env_ms = measure_environment(env)

    parts = Parts(script, args, *dims)
    parts.update()  # the first call does not count
    parts.act()
    floors = []
    if script.__name__ in GEMPO:
        floors.append(measure_floor(*dims, args, repeats))
    step_ms = median_ms(parts.update, repeats)
    if script.__name__ in GEMPO:  # once more: the machine's speed may have drifted
        floors.append(measure_floor(*dims, args, repeats))
    act_ms = median_ms(parts.act, 10 * repeats)
    compile_s = parts.compile_s
    del parts  # the script below makes its own agent and buffer

    update_ms = step_ms / (args.num_envs * args.updates_per_step)
    loop_ms = act_ms + max(step_ms, env_ms * args.num_envs)  # updates run beside the environments
    steps = int(seconds * 1e3 / loop_ms) * args.num_envs
    run_args = short_run(script, args, steps)
    steps = run_args.total_timesteps - run_args.learning_starts
    run_seconds = steps / args.num_envs * loop_ms / 1e3
    # Beside the figures, since another program may read those.
    print(f"training for {steps} steps, about {run_seconds:.0f} s", file=sys.stderr)
    kind = jax.devices()[0].device_kind
    machine = describe_machine()
    figures = {
        "device": machine if kind == "cpu" else f"{kind}, {machine}",
        "jax": f"{jax.__version__}, Python {platform.python_version()}",
        "commit": describe_commit(),
        "compile_s": compile_s,
        "update_ms": update_ms,
        "act_ms": act_ms,
        "env_ms": env_ms,
        "sps": measure_sps(script, run_args),
        "peak_memory_mb": peak_memory() / 2**20,
    }
    if floors:
        floor = min(floors, key=lambda floor: floor["floor_ms"])
        figures |= floor
        figures["update_over_floor"] = update_ms / floor["floor_ms"]
    return figures


def peak_memory() -> int:
    """Bytes: of the accelerator if it tells, else of this process."""
    memory = jax.devices()[0].memory_stats()
    if memory:
        return memory["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(args: Args, words: list[str]) -> None:
    """Measure the script with its own flags, `words`, and print."""
    if args.repeats < 1:
        raise SystemExit(f"--repeats must be a whole number, at least 1, got {args.repeats}")
    if not 0 < args.seconds < float("inf"):
        raise SystemExit(f"--seconds must be a finite number above 0, got {args.seconds}")
    path = find_script(args.script)
    if path is None or not is_training_script(path):
        allowed = f"{', '.join(GEMPO)}, baselines/td3 or another that trains in an environment"
        raise SystemExit(f"--script must be {allowed}, or a path of one, got {args.script}")
    script = load_script(path)
    script_args = tyro.cli(script.Args, args=words)
    for flag in ("resume", "track", "capture_video"):
        if getattr(script_args, flag):
            raise SystemExit(f"--{flag.replace('_', '-')} must be left out: it is not measured")
    figures = measure(script, script_args, args.repeats, args.seconds)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{args.script} on {script_args.env_id}")
    for name, value in figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:18} {shown}")


if __name__ == "__main__":
    own_args, other_words = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    main(own_args, other_words)
