"""What the tests share: the four scripts, and their networks and weights in plain NumPy float64."""

import math
from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gempo_exp
import gempo_linear
import gempo_neg
import gempo_square

SCRIPTS = {"exp": gempo_exp, "linear": gempo_linear, "square": gempo_square, "neg": gempo_neg}


@cache
def cached_agent(name, obs_dim, action_dim, flags):
    script = SCRIPTS[name]
    args = script.Args(**{"hidden_dim": 32} | dict(flags))
    return script.create_agent(args, obs_dim, action_dim, jax.random.key(0))


def create_agent(name, obs_dim=3, action_dim=2, **flags):
    """A new agent of small networks, in arrays of its own (training donates them)."""
    agent = cached_agent(name, obs_dim, action_dim, tuple(flags.items()))
    return jax.tree.map(jnp.copy, agent)


def perturbed_agent(name, **flags):
    """An agent that has learned nothing but has all parts differ: biases, and both slow copies."""
    agent = create_agent(name, **flags)
    networks = {}
    for seed, part in enumerate(("actor", "critic")):
        networks[part] = perturb(agent.params[part], seed)
    params = networks | {"log_lambda": np.float32(-0.5)}
    slow_params = perturb(networks, seed=5)
    return agent.replace(params=as_jax(params), slow_params=as_jax(slow_params))


def make_batch(size=8, obs_dim=3, action_dim=2):
    """Random transitions, every third of which ends an episode."""
    rng = np.random.default_rng(0)
    batch = gempo_neg.Transition(
        obs=rng.normal(size=(size, obs_dim)),
        next_obs=rng.normal(size=(size, obs_dim)),
        actions=rng.uniform(-1, 1, (size, action_dim)),
        rewards=rng.normal(size=size),
        terminations=np.arange(size) % 3 == 0,
    )
    return jax.tree.map(np.float32, batch)


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def float64(tree):
    return jax.tree.map(partial(np.asarray, dtype=np.float64), tree)


def perturb(params, seed=0):
    """`params` plus noise, so that the biases, which start at zero, take part."""
    rng = np.random.default_rng(seed)

    def add_noise(x):
        return x + 0.1 * rng.normal(size=np.shape(x)).astype(np.float32)

    return jax.tree.map(add_noise, params)


def mish(x):
    return x * np.tanh(np.logaddexp(0, x))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def concatenate(parts):
    """Arrays (..., n_i) side by side, their leading axes broadcast."""
    leading = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    whole = [np.broadcast_to(part, (*leading, part.shape[-1])) for part in parts]
    return np.concatenate(whole, axis=-1)


def actor(params, x, t, obs):
    """The denoiser on [x, f(t), g(s)] (..., d + 64 + 128), the leading axes broadcast."""
    p = float64(params)["params"]
    x, t, obs = float64((x, t, obs))
    angles = 2 * np.pi * t * p["frequencies"]
    fourier = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    def features(layers, v):
        return mish(dense(layers["layers_2"], mish(dense(layers["layers_0"], v))))

    f, g = features(p["time_features"], fourier), features(p["obs_features"], obs)
    h = mish(concatenate([x, f, g]) @ p["first_kernel"] + p["first_bias"])
    h = mish(dense(p["hidden_1"], h))
    h = mish(dense(p["hidden_2"], h))
    return dense(p["output"], h)


def critics(params, obs, actions):
    """Both Q(s, a) (2, ...) on the concatenated [s, a]."""
    inputs = concatenate([obs, actions])
    q_values = []
    for j in range(2):
        p = jax.tree.map(itemgetter(j), float64(params)["params"])
        h = np.maximum(inputs @ p["first_kernel"] + p["first_bias"], 0)
        h = np.maximum(dense(p["Dense_0"], h), 0)
        q_values.append(dense(p["Dense_1"], h)[..., 0])
    return np.stack(q_values)


def schedule(t):
    """alpha_t and sigma_t by the formula of the paper's code."""
    t = np.asarray(t, np.float64)
    alpha = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    return alpha, np.sqrt(1 - alpha**2)


def root_finder_weights(name, q, temp, ell=0.0):
    """The weights (N,) and nu by Brent's method on sum_i w_i(nu) = 1.

    In units of temp, and shifted by max(q).
    """
    q = np.asarray(q, np.float64)
    z, n = (q - q.max()) / temp, len(q)
    weights_at = {
        "exp": lambda m: np.exp(z - m),
        "linear": lambda m: np.maximum(z - m, 0),
        "square": lambda m: np.maximum(z - m, 0) ** 2,
        "neg": lambda m: np.maximum(z - m, ell / n),
    }[name]
    # The sum is at least 1 at `low` and at most 1 at `high`.
    low, high = (0, math.log(n)) if name == "exp" else (ell - 1, 0)
    m = brentq(lambda m: weights_at(m).sum() - 1, low - 1e-9, high + 1e-9, xtol=1e-14)
    return weights_at(m), q.max() + temp * m


def kl_to_uniform(weights):
    """KL (...) of the weights (..., N), clipped to at least 1e-6 and renormalized, to 1 / N."""
    p = np.maximum(np.asarray(weights, np.float64), 1e-6)
    p /= p.sum(axis=-1, keepdims=True)
    return np.log(p.shape[-1]) + (p * np.log(p)).sum(axis=-1)


# ------------------------------------------ runs ------------------------------------------
def command_line(flags):
    """Flags as a user would type them: --env-id InvertedPendulum-v5, --save-model."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def read_events(run):
    """What TensorBoard reads of a run."""
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def read_scalars(run):
    """{tag: [(step, value)]}."""
    events, scalars = read_events(run), {}
    for tag in events.Tags()["scalars"]:
        scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return scalars
