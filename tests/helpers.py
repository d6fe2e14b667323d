"""What the tests share: the four scripts, and their networks and weights in plain NumPy float64."""

import math
from functools import cache

import jax
import numpy as np
from scipy.optimize import brentq

import gempo_exp
import gempo_linear
import gempo_neg
import gempo_square

SCRIPTS = {"exp": gempo_exp, "linear": gempo_linear, "square": gempo_square, "neg": gempo_neg}


@cache
def create_agent(name, obs_dim=3, action_dim=2, **flags):
    """A new agent of small networks. Not jitted: on two cores XLA deadlocked in several QR decompositions at once."""
    script = SCRIPTS[name]
    args = script.Args(**{"hidden_dim": 32} | flags)
    return script.create_agent(args, obs_dim, action_dim, jax.random.key(0))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def perturb(params, seed=0):
    """`params` plus noise, so that the biases, which start at zero, take part."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=np.shape(x)).astype(np.float32), params)


def mish(x):
    return x * np.tanh(np.logaddexp(0, x))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def actor(params, x, t, obs):
    """The denoiser on the concatenated [x, f(t), g(s)] (..., d + 64 + 128), leading axes broadcast."""
    p = float64(params)["params"]
    x, t, obs = (np.asarray(v, np.float64) for v in (x, t, obs))
    angles = 2 * np.pi * t * p["frequencies"]
    f = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    def features(layers, v):
        return mish(dense(layers["layers_2"], mish(dense(layers["layers_0"], v))))

    v = [x, features(p["embed_features"], f), features(p["embed_obs"], obs)]
    leading = np.broadcast_shapes(*(part.shape[:-1] for part in v))
    inputs = np.concatenate([np.broadcast_to(part, (*leading, part.shape[-1])) for part in v], axis=-1)
    kernels = p["embed_x"], p["embed_features"]["layers_4"], p["embed_obs"]["layers_4"]
    h = mish(inputs @ np.concatenate([part["kernel"] for part in kernels]) + p["embed_features"]["layers_4"]["bias"])
    for name in ("layers_1", "layers_3"):
        h = mish(dense(p["layers"][name], h))
    return dense(p["layers"]["layers_5"], h)


def critics(params, obs, actions):
    """Both Q(s, a) (2, ...) on the concatenated [s, a]."""
    p = float64(params)["params"]
    leading = np.broadcast_shapes(obs.shape[:-1], actions.shape[:-1])
    inputs = np.concatenate([np.broadcast_to(v, (*leading, v.shape[-1])) for v in (obs, actions)], axis=-1)
    q_values = []
    for j in range(2):
        of_obs, of_actions, hidden, output = (jax.tree.map(lambda v, j=j: v[j], p[f"Dense_{i}"]) for i in range(4))
        kernel = np.concatenate([of_obs["kernel"], of_actions["kernel"]])
        h = np.maximum(inputs @ kernel + of_obs["bias"], 0)
        q_values.append(dense(output, np.maximum(dense(hidden, h), 0))[..., 0])
    return np.stack(q_values)


def schedule(t):
    """alpha_t and sigma_t by the formula of the paper's code."""
    t = np.asarray(t, np.float64)
    alpha = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    return alpha, np.sqrt(1 - alpha**2)


def root_finder_weights(name, q, temp, ell=0.0):
    """The weights (N,) and nu by Brent's method on sum_i w_i(nu) = 1, in units of temp and shifted by max(q)."""
    q = np.asarray(q, np.float64)
    z, n = (q - q.max()) / temp, len(q)
    weights_at = {
        "exp": lambda m: np.exp(z - m),
        "linear": lambda m: np.maximum(z - m, 0),
        "square": lambda m: np.maximum(z - m, 0) ** 2,
        "neg": lambda m: np.maximum(z - m, ell / n),
    }[name]
    low, high = (0, math.log(n)) if name == "exp" else (ell - 1, 0)  # the sum is at least 1 at `low`, at most at `high`
    m = brentq(lambda m: weights_at(m).sum() - 1, low - 1e-9, high + 1e-9, xtol=1e-14)
    return weights_at(m), q.max() + temp * m


def kl_to_uniform(weights):
    """KL of the weights (..., N), clipped to at least 1e-6 and renormalized, to the uniform distribution."""
    p = np.maximum(np.asarray(weights, np.float64), 1e-6)
    p /= p.sum(axis=-1, keepdims=True)
    return np.log(p.shape[-1]) + (p * np.log(p)).sum(axis=-1)
