# /// script
# requires-python = ">=3.11"
# dependencies = ["flax", "jax>=0.5", "optax", "orbax-checkpoint", "scipy", "tensorboardX", "tqdm", "tyro>=0.9"]
# ///
"""GeMPO on DNA: fine-tune a masked diffusion model of regulatory sequences toward high enhancer activity.

Paper: "GeMPO: Generalized Measure Matching for Online Diffusion Reinforcement Learning", Ma, Gao, Chen, Li and Dai,
2026, arXiv 2603.10250, section 5.3. A denoiser p(x_0 | x_t) is pretrained on 200-bp sequences; two oracles, each of one
half of the chromosomes, learn their activity. Each update draws groups of fresh sequences from the current model,
values them by the first oracle, and descends the weighted denoising loss

    sum_b w_b l(x_b),   l(x) = 1/t sum_{i masked} -log p(x_i | x_t),   w_b = g(z_b),   z = (r - mean) / std    (eq. 8)

g is exp, linear, square, or neg: linear with a floor ell < 0, which pushes the model away from bad sequences. The other
oracle gives the paper's Pred-Activity. Without a data file, sequences are made by a grammar of real motifs whose
activity is known exactly, so that true_activity shows where the oracles are fooled.
Usage: `python dna_finetune.py --weighting neg --ell -0.3`, or `--help`; baselines: baselines/dna_guidance.py.
"""

import fcntl
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import pathlib
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

# =================================================== ARGUMENTS ===================================================
Count = Annotated[int, "a whole number, at least 1", lambda v: v >= 1]
Several = Annotated[int, "a whole number, at least 2", lambda v: v >= 2]
Natural = Annotated[int, "a whole number, at least 0", lambda v: v >= 0]
Positive = Annotated[float, "a finite number above 0", lambda v: 0 < v < math.inf]


@dataclass(frozen=True)
class Args:
    exp_name: str = pathlib.Path(__file__).stem  # name of this experiment
    seed: Natural = 1  # seed of fine-tuning and evaluation; a run repeats exactly on the same machine
    preset: Literal["small", "paper"] = "small"  # sizes for two CPU cores, or the paper's; other flags override it
    resume: str | None = None  # go on with this run (runs/<run>) at its last checkpoint; it keeps its own flags
    checkpoint_frequency: Natural = 20  # updates between two checkpoints of the fine-tuning; 0 turns them off
    cache_path: str = "runs/cache"  # folder in which pretrained model and oracles wait for the next run
    distributed: bool = False  # whether to call jax.distributed.initialize, for one run on several hosts
    data_path: str | None = None  # CSV or TSV file, plain or gzipped, with a header; None: generated data
    sequence_column: str = "seq"  # its column of sequences
    activity_column: str = "hepg2"  # its column of activities
    split_column: str | None = None  # its column of chromosomes or elements; None: a sequence with its complement
    sequence_length: Several = 200  # length of the sequences (L)
    data_size: Count = 40_000  # number of sequences to generate
    data_seed: Natural = 0  # seed of generated data, pretraining and oracles
    hidden_dim: Count = 48  # channels of the denoiser
    num_layers: Count = 4  # residual layers of the denoiser
    pretrain_steps: Count = 2_000  # updates of the pretraining
    pretrain_batch_size: Count = 128  # sequences per update of the pretraining
    pretrain_lr: Positive = 4e-3  # its learning rate (AdamW)
    pretrain_warmup: Natural = 50  # updates over which that rises from 0
    denoiser_checkpoint: str | None = None  # DRAKES checkpoint (PyTorch Lightning) instead of the pretraining
    trust_checkpoint: bool = False  # whether to read one that torch's weights_only refuses; it may run any code
    oracle_dim: Count = 64  # channels of the oracle of the fine-tuning; that of the evaluation has 1.5 times as many
    oracle_steps: Count = 1_500  # updates of each oracle, 128 sequences each
    reward: str | None = None  # `module:function`, a list of sequences -> rewards, instead of the first oracle
    weighting: Literal["exp", "linear", "square", "neg", "wd1"] = "neg"  # the weights of a group's samples
    ell: Annotated[float, "finite and at most 0", lambda v: -math.inf < v <= 0] = -0.3  # floor of neg
    normalizer: Literal["zscore", "simplex"] = "zscore"  # the authors' z-scores, or Appendix E's: they sum to one
    exp_temperature: Positive = 0.1  # zscore: temperature of exp, in units of the reward
    target_kl: Positive = 1.5  # simplex: KL budget of the weights in nats (kappa), below log(group_size)
    temperature_lr: Positive = 0.03  # simplex: learning rate of log lambda
    num_updates: Count = 100  # updates of the fine-tuning
    num_groups: Count = 4  # groups per update
    group_size: Several = 32  # samples per group, which are weighted against each other
    times_per_sample: Count = 4  # noise levels at which an update denoises each sample (the authors: 1)
    sample_steps: Count = 40  # denoising steps of the sampler (T)
    learning_rate: Positive = 1e-3  # learning rate of the fine-tuning (Adam)
    grad_clip: Positive = 10.0  # largest norm of the fine-tuning's gradient
    eval_samples: Several = 640  # samples of an evaluation


PAPER = dict(preset="paper", data_size=700_000, hidden_dim=128, num_layers=20, pretrain_steps=131_500, num_updates=500,
             pretrain_batch_size=512, pretrain_lr=3e-4, pretrain_warmup=2_500, oracle_dim=256, oracle_steps=20_000,
             group_size=128, sample_steps=128, learning_rate=1e-4, checkpoint_frequency=100)  # fmt: skip


def check_args(args: Args) -> Args:
    """Return `args`, or exit with one line that names a flag out of its range."""
    devices, log_n, zscore = jax.device_count(), math.log(max(args.group_size, 2)), args.normalizer == "zscore"
    rules = [(name, *get_args(kind)[1:]) for name, hint in get_type_hints(type(args), include_extras=True).items()
             for kind in (hint, *get_args(hint)) if get_origin(kind) is Annotated]  # fmt: skip
    rules += [
        ("hidden_dim", "an even number", lambda v: v % 2 == 0),
        ("sequence_length", "at least 40", lambda v: v >= 40),
        ("data_size", "at least 1000", lambda v: v >= 1000),
        ("group_size", f"so that all divide by {devices} devices", lambda v: v * args.num_groups % devices == 0),
        ("pretrain_batch_size", f"a multiple of {devices} devices", lambda v: v % devices == 0),
        ("target_kl", f"below log(group_size), {log_n:.3f}", lambda v: v < log_n or zscore),
        ("weighting", "one with a positive sum under --normalizer simplex", lambda v: v != "wd1" or zscore),
        ("exp_name", "a name without slashes", lambda v: v and "/" not in v),
    ]
    for name, allowed, is_allowed in rules:
        if not is_allowed(value := getattr(args, name)):
            raise SystemExit(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    return args


# ==================================================== SEQUENCES ==================================================
LETTERS, MASK = np.frombuffer(b"ACGT", np.uint8), 4  # tokens 0 to 3, so that 3 - x is the complement, and the mask


class Data(NamedTuple):
    """Sequences, their measured activity in log2 units, and which oracle learns from them (True: the evaluation's)."""

    tokens: np.ndarray  # (N, L) uint8
    activity: np.ndarray  # (N,) float32
    half: np.ndarray  # (N,) bool


def in_batches(function, tokens: np.ndarray, size: int = 1024) -> np.ndarray:
    """The rows (N, ...) of `function` of tokens (N, L), called on batches of one size, so that it compiles once."""
    padded = np.concatenate([tokens, np.repeat(tokens[:1], -len(tokens) % size, axis=0)])
    return np.concatenate([function(padded[i : i + size]) for i in range(0, len(padded), size)])[: len(tokens)]


# ================================================= GENERATED DATA ================================================
# Factors in HepG2 cells: site as IUPAC consensus; effect (below 0: represses); share of the planted sites (repressors:
# of sequences); where it acts most (midway, or near the reporter at the 3' end); strength on the other strand.
MOTIFS = {
    "HNF1A": ("GTTAATNATTAAC", 1.7, 0.09, 0.5, 1.0),
    "HNF4A": ("RGGNCAAAGKYCA", 1.6, 0.11, 0.5, 0.85),
    "CEBPA": ("RTTGCGYAAY", 1.3, 0.12, 0.5, 1.0),
    "FOXA": ("TRTTTACWYW", 0.9, 0.13, 0.5, 0.9),
    "ETS": ("MCCGGAAGT", 1.1, 0.13, 0.75, 0.7),
    "AP-1": ("TGASTCA", 1.2, 0.12, 0.5, 1.0),
    "CREB": ("TGACGTMA", 1.2, 0.08, 0.75, 1.0),
    "SP1": ("GGGGCGGGG", 0.7, 0.08, 0.75, 0.8),
    "NFY": ("RRCCAATSR", 0.7, 0.07, 0.75, 0.75),
    "USF": ("RTCACGTGAY", 0.8, 0.07, 0.75, 1.0),
    "SNAI/ZEB": ("CACCTG", -0.5, 0.15, 0.5, 1.0),
    "REST": ("TTCAGCACCNNGGACAGCGCC", -2.0, 0.03, 0.5, 1.0),
    "GFI1": ("WAATCACWGC", -0.8, 0.06, 0.5, 1.0),
}
NAMES, (CONSENSUS, EFFECT, SHARE, CENTER, REVERSE) = list(MOTIFS), map(np.array, zip(*MOTIFS.values(), strict=True))
PAIRS = {("HNF1A", "HNF4A"): 1.0, ("HNF4A", "CEBPA"): 0.9, ("FOXA", "HNF4A"): 0.9, ("CEBPA", "AP-1"): 0.7,
         ("FOXA", "HNF1A"): 0.7, ("ETS", "SP1"): 0.6, ("ETS", "CREB"): 0.6, ("NFY", "USF"): 0.5}  # fmt: skip
PAIR_REACH, WEAK_SITE, NOISE = 35, 0.3, 0.3  # bp between sites that help each other; a mismatch; measurement's std
SILENT, HILL_RISE, HILL_HALF, HILL_POWER = -1.0, 12.8, 8.5, 2.23  # for quantiles .2, 4.6 (99%), 6.2 (99.9%)
IUPAC = dict(A="0", C="1", G="2", T="3", R="02", Y="13", S="12", W="03", K="23", M="01", N="0123")  # tokens of a letter
# Odds of neighbours in the human genome, f(xy) / (f(x) f(y)), x down and y across in the order ACGT: CpG has 0.23.
ODDS = np.array([[1.12, 0.84, 1.17, 0.88], [1.2, 1.24, 0.23, 1.17], [1.02, 1.0, 1.24, 0.84], [0.74, 1.02, 1.2, 1.12]])


def plant(rng: np.random.Generator, tokens: np.ndarray, rows: np.ndarray, k: int, near=None) -> np.ndarray:
    """Write a site of motif k into each of `rows` of `tokens`, in place, on either strand; one in five has a mismatch.

    It lies 12 to 29 bp beside the starts `near` (R,), or anywhere. Returns its starts (R,).
    """
    width, size, last = len(CONSENSUS[k]), len(rows), tokens.shape[1] - len(CONSENSUS[k])
    site = np.stack([rng.choice([int(x) for x in IUPAC[letter]], size) for letter in CONSENSUS[k]], axis=1)
    flawed = np.flatnonzero(rng.random(size) < 0.2)
    site[flawed, rng.integers(width, size=len(flawed))] = rng.integers(4, size=len(flawed))
    site = np.where(rng.random((size, 1)) < 0.5, site, 3 - site[:, ::-1])
    starts, beside = rng.integers(last + 1, size=size), rng.choice([-1, 1], size) * rng.integers(12, 30, size)
    starts = starts if near is None else np.clip(near + beside, 0, last)
    tokens[rows[:, None], starts[:, None] + np.arange(width)] = site
    return starts


def generate_data(size: int, length: int, seed: int) -> Data:
    """`size` sequences of a second-order Markov chain with planted sites; their measured activity; a chromosome's half.

    Sequences differ in GC, as isochores do. Three sites in ten have a partner of PAIRS.
    """
    rng, gc = np.random.default_rng(seed), np.array([0.32, 0.4, 0.5, 0.6, 0.7])
    base = np.stack([1 - gc, gc, gc, 1 - gc], axis=1) / 2  # (5, 4)
    triples = base[:, :, None, None] * base[:, None, :, None] * base[:, None, None] * ODDS[:, :, None] * ODDS
    triples[:, [0, 3], [0, 3], [0, 3]] *= 1.25  # runs of A and of T
    limits = np.cumsum(triples / triples.sum(-1, keepdims=True), axis=-1)[..., :3]
    tokens = rng.integers(4, size=(size, length), dtype=np.uint8)
    isochore = rng.choice(5, size, p=[0.2, 0.3, 0.25, 0.15, 0.1])
    for i in range(2, length):
        tokens[:, i] = (rng.random((size, 1)) > limits[isochore, tokens[:, i - 2], tokens[:, i - 1]]).sum(1)
    activators, num_sites = np.flatnonzero(EFFECT > 0), np.minimum(rng.poisson(rng.gamma(10.0, 0.45, size)), 12)
    partners = {k: [NAMES.index(a if b == NAMES[k] else b) for a, b in PAIRS if NAMES[k] in (a, b)] for k in activators}
    for i in range(num_sites.max()):
        rows = np.flatnonzero(num_sites > i)
        drawn = rng.choice(activators, len(rows), p=SHARE[activators] / SHARE[activators].sum())
        for k in activators:
            starts = plant(rng, tokens, chosen := rows[drawn == k], k)
            partner = np.where(rng.random(len(chosen)) < 0.3, rng.choice(partners[k], len(chosen)), -1)
            for j in partners[k]:
                plant(rng, tokens, chosen[partner == j], j, starts[partner == j])
    for k in np.flatnonzero(EFFECT < 0):
        plant(rng, tokens, np.flatnonzero(rng.random(size) < SHARE[k]), k)
    activity = in_batches(true_activity, tokens) + NOISE * rng.standard_normal(size)
    return Data(tokens, activity.astype(np.float32), rng.integers(1, 23, size) % 2 == 1)


@jax.jit
def find_sites(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Strength (B, L, M) of the site of each motif that starts at each position of tokens (B, L), and its strand.

    Each mismatch is a factor WEAK_SITE; up to 2 are allowed, in a short consensus none. Strand: True for the other.
    """
    width, letters = max(map(len, CONSENSUS)), np.array([len(c) - c.count("N") for c in CONSENSUS.tolist()])[:, None]
    filters = np.zeros((width, 4, len(MOTIFS), 2), np.float32)
    for k, consensus in enumerate(CONSENSUS):
        for i, letter in enumerate(consensus):
            for x in map(int, IUPAC[letter] if letter != "N" else ""):
                filters[i, x, k, 0] = filters[len(consensus) - 1 - i, 3 - x, k, 1] = 1
    x = jnp.pad(jax.nn.one_hot(tokens, 4), ((0, 0), (0, width - 1), (0, 0)))  # no site hangs over the end
    filters = filters.reshape(width, 4, -1)
    matches = jax.lax.conv_general_dilated(x, filters, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    missing = letters - matches.reshape(*tokens.shape, len(MOTIFS), 2)
    strength = jnp.where(missing <= np.clip((letters - 6) // 2, 0, 2), WEAK_SITE**missing, 0.0)
    return strength.max(-1), strength[..., 1] > strength[..., 0]  # a palindrome counts once, forward


@jax.jit
def true_activity(tokens: jax.Array) -> jax.Array:
    """The noiseless activity (B,) of tokens (B, L) in log2 units, the known truth of the generated data.

    A Hill function of x = (sum_m e_m (1 - exp(-1.5 o_m)) + pairs) / (1 + repression), where the occupancy o_m sums the
    sites by strength, place and strand: a second site of a factor adds less than the first.
    """
    (sites, is_reverse), at = find_sites(tokens), np.arange(tokens.shape[1])
    sites = sites * jnp.where(is_reverse, REVERSE, 1.0)  # (B, L, M)
    by_place = 0.5 + 0.5 * np.exp(-0.5 * ((at[:, None] / len(at) - CENTER) / 0.3) ** 2)
    bound = 1 - jnp.exp(-1.5 * jnp.sum(sites * by_place, axis=1))  # (B, M)
    distance = np.abs(at - at[:, None])
    within = np.float32((distance >= 6) & (distance <= PAIR_REACH))  # sites that overlap are not both bound
    first, second = (sites[..., np.array([NAMES.index(pair[i]) for pair in PAIRS])] for i in (0, 1))
    reached = jnp.sum(jnp.einsum("ij,bjp->bip", within, second) * first, axis=1)  # (B, pairs)
    drive = bound @ np.maximum(EFFECT, 0) + (1 - jnp.exp(-1.5 * reached)) @ np.array(list(PAIRS.values()))
    x = (drive / (1 + bound @ np.maximum(-EFFECT, 0))) ** HILL_POWER
    return SILENT + HILL_RISE * x / (HILL_HALF**HILL_POWER + x)


# ==================================================== NETWORKS ===================================================
class Denoiser(nn.Module):
    """Logits of p(x_0 | x_t), (B, L, 4), at tokens x_t (B, L) or at probabilities of tokens (B, L, 5).

    The network of DRAKES (Wang et al. 2024), given the noise level 0 at every t: its time features are constant.
    """

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, x):
        frequencies = self.param("frequencies", nn.initializers.normal(30.0), (self.hidden_dim // 2,))
        angles = 0.0 * frequencies  # 2 pi sigma W
        time = nn.relu(nn.Dense(self.hidden_dim, name="time")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        h = nn.relu(nn.Conv(self.hidden_dim, (9,), name="conv_in")(jax.nn.one_hot(x, 5) if x.ndim == 2 else x))
        for i in range(self.num_layers):
            dilation = (1, 1, 4, 16, 64)[5 * i // self.num_layers]  # 1 in two fifths of the layers
            y = nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(h + nn.Dense(self.hidden_dim, name=f"time_{i}")(time))
            # Flax calls lax.conv_general_dilated: on CPU 3 times as fast as a sum of shifted products.
            h = h + nn.relu(nn.Conv(self.hidden_dim, (9,), kernel_dilation=dilation, name=f"conv_{i}")(y))
        h = nn.relu(nn.Dense(self.hidden_dim, name="head_0")(h))
        return nn.Dense(5, name="head_1")(h)[..., :MASK]  # without the mask's logit: it never gets probability


class Oracle(nn.Module):
    """Activity (B,) in standard deviations, at letters one-hot or probabilities (B, L, 4)."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(self.width, (15,))(x - 0.25)) ** 2  # squared: it learns motifs in half the steps
        x = nn.max_pool(x, (8,), (8,))
        x = x + nn.relu(nn.Conv(self.width, (5,))(x))
        x = nn.Dropout(0.1, deterministic=not train)(jnp.concatenate([x.max(1), x.mean(1)], axis=-1))
        return nn.Dense(1)(nn.relu(nn.Dense(self.width)(x)))[..., 0]


@jax.jit
def predict(oracle: dict, x: jax.Array) -> jax.Array:
    """Activity (B,) in the data's units by an oracle of `train_oracle`, at tokens (B, L) or probabilities (B, L, 4)."""
    model = Oracle(oracle["params"]["params"]["Conv_0"]["bias"].shape[0])
    return oracle["mean"] + oracle["std"] * model.apply(oracle["params"], jax.nn.one_hot(x, 4) if x.ndim == 2 else x)


# =================================================== DIFFUSION ===================================================
T_MIN = 1e-3  # smallest time; also the share of tokens that no mask hides at t = 1


def mask_chance(t: jax.Array) -> jax.Array:
    """1 - exp(-sigma_t) = (1 - 1e-3) t, the chance that a token is masked; (d sigma / dt) / expm1(sigma) is 1 / t."""
    return (1 - T_MIN) * t


def denoising_loss(logits_of, key: jax.Array, tokens: jax.Array) -> jax.Array:
    """l(x) (B,), a bound on -log p(x) in nats, of tokens (B, L), each at one time; the batch's times are antithetic.

    logits_of: x_t (B, L) -> (B, L, 4). A uniform model has the expected loss L log 4 at every t (but for 1e-3 of it).
    """
    t_key, mask_key = jax.random.split(key)
    size = len(tokens)  # one time in each B-th part of (0, 1), neighbours far apart, so that groups have all times
    stride = next(i for i in range(round(0.618 * size), 2 * size) if math.gcd(i, size) == 1)
    t = T_MIN + (1 - T_MIN) * ((jax.random.uniform(t_key) + jnp.arange(size) * stride % size / size) % 1)
    masked = jax.random.uniform(mask_key, tokens.shape) < mask_chance(t)[:, None]
    log_p = nn.log_softmax(logits_of(jnp.where(masked, MASK, tokens)))
    nats = -jnp.take_along_axis(log_p, tokens[..., None].astype(int), axis=-1)[..., 0]
    return jnp.sum(jnp.where(masked, nats, 0.0), axis=-1) / t  # what is not masked is carried over: no loss


def sample_sequences(logits_of, key: jax.Array, num_samples: int, num_steps: int, length: int) -> jax.Array:
    """Draw tokens (num_samples, length), uint8, in `num_steps` steps from all masks, t = 1, to t = 1e-3.

    From t to s a mask is lifted with chance 1 - mask_chance(s) / mask_chance(t); its letter comes from p(x_0 | x_t).
    """
    chances = mask_chance(jnp.linspace(1.0, T_MIN, num_steps + 1))

    def denoise(x, step):
        lifted, key = step  # one uniform number decides whether a mask is lifted and which letter it hides (4: none)
        limits = lifted * jnp.cumsum(nn.softmax(logits_of(x)), axis=-1)
        drawn = jnp.sum(jax.random.uniform(key, x.shape)[..., None] > limits, axis=-1, dtype=x.dtype)
        return jnp.where(x == MASK, drawn, x), None

    x = spread(jnp.full((num_samples, length), MASK, jnp.uint8))
    x, _ = jax.lax.scan(denoise, x, (1 - chances[1:] / chances[:-1], jax.random.split(key, num_steps)))
    return jnp.where(x == MASK, logits_of(x).argmax(-1), x).astype(jnp.uint8)


def on_all(*axes: str) -> NamedSharding:
    """An array's place on all devices of all hosts: copies, or with "batch", a share of its first axis each."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec(*axes))


def spread(x: jax.Array) -> jax.Array:
    """Inside jit: share x out by its first axis, and so what is computed from it."""
    return jax.lax.with_sharding_constraint(x, on_all("batch"))


# ================================================== REWEIGHTING ==================================================
def zscore_weights(r: jax.Array, weighting: str, ell: float, exp_temperature: float) -> jax.Array:
    """The authors' weights of a group's rewards (..., n), by z-scores clipped at 3; wd1's sum to zero (Example 3.4)."""
    if weighting in ("exp", "wd1"):
        return nn.softmax(r / exp_temperature) if weighting == "exp" else nn.softmax(r) - nn.softmax(-r)
    z = (r - r.mean(-1, keepdims=True)) / (r.std(-1, keepdims=True) + 1e-6)
    return jnp.clip(z, ell if weighting == "neg" else 0.0, 3.0) ** (2 if weighting == "square" else 1)


def simplex_weights(r: jax.Array, temp: jax.Array, weighting: str, ell: float) -> jax.Array:
    """Weights (..., n) that sum to one: exp(y), max(y, 0), max(y, 0)^2 or max(y, ell/n), y = (r - nu) / temp (App. E).

    The k largest are above the floor if, with nu at the k-th, they sum to no more than is left; nu solves the equation
    of those k. y is counted from its maximum, so that nothing cancels: above the floor it is in [-1, 0].
    """
    if weighting == "exp":
        return nn.softmax(r / temp)
    y, n, power = (r - r.max(-1, keepdims=True)) / temp, r.shape[-1], 2 if weighting == "square" else 1
    y_sorted, k, floor = jnp.sort(y, descending=True), jnp.arange(1, n + 1), ell / n if weighting == "neg" else 0.0
    mean = jnp.cumsum(y_sorted, axis=-1) / k
    scatter = jnp.cumsum(y_sorted**2, axis=-1) - k * mean**2 if power == 2 else 0.0
    is_active = scatter + k * (mean - y_sorted) ** power <= 1 - n * floor
    rest = (1 - scatter - (n - k) * floor) / k  # to be spread over the k: (mean - nu) ** power
    nu = jnp.take_along_axis(
        mean - jnp.maximum(rest, 0.0) ** (1 / power), is_active.sum(-1, keepdims=True) - 1, axis=-1
    )
    return jnp.maximum(y - nu, floor) ** power


def temperature_loss(log_lambda: jax.Array, weights: jax.Array, target_kl: float) -> jax.Array:
    """lambda (kappa - KL(w || uniform)), averaged over groups (equation 23); negative weights count as 1e-6."""
    p = jnp.maximum(weights, 1e-6) / jnp.maximum(weights, 1e-6).sum(-1, keepdims=True)
    kl = math.log(p.shape[-1]) + jnp.mean(jnp.sum(p * jnp.log(p), axis=-1))
    return jnp.exp(log_lambda) * (target_kl - jax.lax.stop_gradient(kl))


# =================================================== LEARNING ====================================================
def make_optimizer(stage: str, args: Args) -> optax.GradientTransformation:
    """The optimizer of "oracle", "pretraining" or "finetuning" (also of the baseline "drakes")."""
    if stage in ("finetuning", "drakes"):
        model = optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.learning_rate))
        parts = {"model": model, "log_lambda": optax.adam(args.temperature_lr)}
        return optax.multi_transform(parts, {name: name for name in parts})
    peak, warmup, steps = args.pretrain_lr, args.pretrain_warmup, args.pretrain_steps
    if stage == "oracle":
        peak, warmup, steps = 3e-3, 50, args.oracle_steps
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))


def pretraining_loss(params, key, batch, model: Denoiser, args: Args):
    """Denoising loss per token of sequences drawn from batch = tokens (N, L)."""
    row_key, key = jax.random.split(key)
    x = spread(batch[jax.random.randint(row_key, (args.pretrain_batch_size,), 0, len(batch))])
    loss = denoising_loss(partial(model.apply, params), key, x).mean()
    return loss / x.shape[1], {"losses/nats_per_sequence": loss}


def oracle_loss(params, key, batch, model: Oracle, args: Args):
    """Squared error on 128 rows of batch = tokens (N, L), standardized activities (N,)."""
    row_key, key = jax.random.split(key)
    rows = jax.random.randint(row_key, (128,), 0, len(batch[0]))
    predicted = model.apply(params, spread(jax.nn.one_hot(batch[0][rows], 4)), train=True, rngs={"dropout": key})
    loss = jnp.mean((predicted - batch[1][rows]) ** 2)
    return loss, {"losses/squared_error": loss}


def finetuning_loss(params, key, batch, model: Denoiser, args: Args):
    """Weighted denoising loss (equation 8) per token of batch = samples (G n, L), rewards (G n,), in G groups of n."""
    rewards, lambda_loss = batch[1].reshape(args.num_groups, args.group_size), 0.0
    weights = zscore_weights(rewards, args.weighting, args.ell, args.exp_temperature)
    if args.normalizer == "simplex":
        temp = jax.lax.stop_gradient(jnp.exp(params["log_lambda"]))
        weights = simplex_weights(rewards, temp, args.weighting, args.ell)
        lambda_loss = temperature_loss(params["log_lambda"], weights, args.target_kl)
    tokens = spread(jnp.tile(batch[0], (args.times_per_sample, 1)))
    nats = denoising_loss(partial(model.apply, params["model"]), key, tokens).reshape(-1, *rewards.shape).mean(0)
    loss = jnp.mean(jnp.sum(weights * nats, axis=-1)) / tokens.shape[1]
    scalars = {"losses/weighted_loss": loss, "charts/temperature": jnp.exp(params["log_lambda"])}
    scalars |= {"weights/min": weights.min(), "weights/mean": weights.mean(), "weights/max": weights.max()}
    return loss + lambda_loss, scalars | {"weights/negative_share": jnp.mean(weights < 0)}


LOSSES = {"oracle": oracle_loss, "pretraining": pretraining_loss, "finetuning": finetuning_loss}


@partial(jax.jit, static_argnames=("stage", "model", "args"), donate_argnames="state")
def train_step(state: dict, key: jax.Array, batch, stage: str, model: nn.Module, args: Args) -> tuple[dict, dict]:
    """One update by the loss of a stage, and the scalars to log; state: "params" and "opt_state"."""
    grads, scalars = jax.grad(LOSSES[stage], has_aux=True)(state["params"], key, batch, model, args)
    updates, opt_state = make_optimizer(stage, args).update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    scalars["losses/parameter_norm"] = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(params)))
    return {"params": params, "opt_state": opt_state}, scalars


@partial(jax.jit, static_argnames=("model", "args"))
def sample_model(params, key: jax.Array, model: Denoiser, args: Args) -> jax.Array:
    """The samples of one update, tokens (G n, L), the same on every device."""
    size, logits_of = args.num_groups * args.group_size, partial(model.apply, params)
    x = sample_sequences(logits_of, key, size, args.sample_steps, args.sequence_length)
    return jax.lax.with_sharding_constraint(x, on_all())


# ============================================= LOOPS AND CHECKPOINTS =============================================
signals = []  # SIGTERM and SIGINT so far: at the first the update ends and a checkpoint is written


def run_stage(stage: str, params, total: int, folder: pathlib.Path, key, model, batch, args: Args, every: int = 10):
    """The parameters after `total` updates of `train_step`, from the last checkpoint in `folder` on.

    batch: what every update learns from, or a function of parameters and key that returns it and more scalars. Exits
    with one line if a checkpoint is damaged or a scalar not finite, and with 128 + its number after a signal.
    """
    state = jax.device_put({"params": params, "opt_state": make_optimizer(stage, args).init(params)}, on_all())
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    saver = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)
    if first := saver.latest_step() or 0:
        try:
            [array] = saver.restore(first, args=ocp.args.StandardRestore())
            saved = jax.device_put(serialization.from_bytes(state, zlib.decompress(array)), on_all())
            state = jax.tree.map(lambda old, new: new.reshape(old.shape), state, saved)  # fails for another network's
        except Exception as error:  # the files may hold anything
            reason = " ".join(str(error).split())[:150]
            raise SystemExit(f"--resume: checkpoint {folder}/checkpoints/{first} is of no use: {reason}") from None
    frequency, is_writer = args.checkpoint_frequency * every, jax.process_index() == 0
    shown = {"oracle": "losses/squared_error", "pretraining": "losses/nats_per_sequence"}.get(stage, "charts/reward")
    seldom = 0.1 if sys.stderr.isatty() else 20.0  # seconds between two states of the bar: a log file wants few
    bar = tqdm(range(first + 1, total + 1), stage, total, initial=first, mininterval=seldom, disable=not is_writer)
    log = EventsWriter(f"{folder}/events", f".{first}") if is_writer else None
    if is_writer and first:  # what an interrupted run logged after its checkpoint comes again, and counts no more
        log.write_event(Event(wall_time=time.time(), step=first + 1, session_log=SessionLog(status=SessionLog.START)))
    for update in bar:
        update_key = jax.random.fold_in(key, update)
        data, more = batch(state["params"], update_key) if callable(batch) else (batch, {})
        state, scalars = train_step(state, update_key, data, stage, model, args)
        saving = frequency and (update % frequency == 0 or update == total or signals)
        try:
            if saving or update % every == 0 or update == total:
                scalars = {name: float(value) for name, value in jax.device_get(more | scalars).items()}
                if bad := [name for name, value in scalars.items() if not math.isfinite(value)]:
                    last = f"last checkpoint in {folder}: {saver.latest_step() or 'none'}"
                    raise SystemExit(f"{stage} diverged at update {update}: {', '.join(bad)} not finite; {last}")
                bar.set_postfix_str(f"{shown.split('/')[1]} {scalars[shown]:.2f}", refresh=False)
                for tag, value in scalars.items() if is_writer else ():
                    log.write_event(Event(wall_time=time.time(), step=update, summary=summary.scalar(tag, value)))
                    log.flush()
            if saving:
                array = np.frombuffer(zlib.compress(serialization.to_bytes(state), 0), np.uint8)  # with a checksum
                saver.save(update, args=ocp.args.StandardSave([array]), force=True)
        except (OSError, ValueError) as error:  # a full disk, for one; Orbax raises the latter
            raise SystemExit(f"{stage} stopped at update {update}: {error}; earlier checkpoints are kept") from None
        if signals:
            raise SystemExit(128 + signals[0])
    return state["params"]


def from_cache(args: Args, name: str, inputs: tuple, code: tuple, make) -> Any:
    """make(), a tree of arrays, or what it gave an earlier run with the same inputs and the same code."""
    digest = hashlib.sha256("".join(map(inspect.getsource, code)).encode())
    for value in inputs:
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    path = pathlib.Path(args.cache_path, f"{name}-{digest.hexdigest()[:16]}.msgpack")
    try:
        return serialization.msgpack_restore(path.read_bytes())
    except (OSError, ValueError):  # not there, or damaged
        made = jax.device_get(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    (part := path.with_suffix(f".{os.getpid()}")).write_bytes(serialization.msgpack_serialize(made))
    part.replace(path)  # whole or not at all
    return made


def train_oracle(data: Data, half: bool, folder: pathlib.Path, args: Args) -> dict:
    """An oracle of one half of the data: its parameters, scale, and Spearman correlation on the other half."""
    rows, key = data.half == half, jax.random.fold_in(jax.random.key(args.data_seed), int(half) + 1)
    model, activity = Oracle(args.oracle_dim * (3 if half else 2) // 2), data.activity[rows]
    mean, std = activity.mean(), activity.std() + np.float32(1e-6)
    batch = jax.device_put((data.tokens[rows], (activity - mean) / std), on_all())
    params = model.init(key, jnp.zeros((1, args.sequence_length, 4)))
    params = run_stage("oracle", params, args.oracle_steps, folder / f"oracle_{int(half)}", key, model, batch, args, 50)
    oracle = {"params": params, "mean": mean, "std": std}
    predicted = in_batches(partial(predict, oracle), data.tokens[~rows])
    return oracle | {"spearman": np.float32(stats.spearmanr(predicted, data.activity[~rows])[0])}


# =================================================== EVALUATION ==================================================
class Setup(NamedTuple):
    """What every method starts from."""

    data: Data
    model: Denoiser
    pretrained: dict  # its parameters
    oracle: dict  # of the fine-tuning
    judge: dict  # of the evaluation
    reward: Any  # tokens (N, L) -> rewards (N,)


@partial(jax.jit, static_argnames="model")
def log_likelihood(params, key: jax.Array, tokens: jax.Array, model: Denoiser) -> jax.Array:
    """Lower bound of log p(x) (B,) of tokens (B, L) in nats, from 8 times t each (uniform: -L log 4)."""
    keys = jax.random.split(key, 8)
    return -jax.lax.map(lambda key: denoising_loss(partial(model.apply, params), key, tokens), keys).mean(0)


def compute_metrics(tokens: np.ndarray, setup: Setup, args: Args) -> dict[str, float]:
    """Section 5.3's metrics of tokens (N, L). Activities are medians; top: the 0.1% most active, or 1% of few data."""
    data, (size, length) = setup.data, tokens.shape
    share = 0.001 if len(data.activity) >= 100_000 else 0.01
    top = data.tokens[data.activity >= np.quantile(data.activity, 1 - share)]
    both, shares = (tokens, top), (tokens[..., None] == range(4)).mean(0)  # (L, 4)
    count_sites = jax.jit(lambda x: (find_sites(x)[0] == 1).sum(1))  # (B, M)
    kmers = [x[:, :-2] * 16 + x[:, 1:-1] * 4 + x[:, 2:] for x in both]
    likelihood = partial(log_likelihood, setup.pretrained, jax.random.key(0), model=setup.model)

    metrics = {
        "pred_activity": np.median(in_batches(partial(predict, setup.judge), tokens)),
        "train_oracle_activity": np.median(setup.reward(tokens)),
        "true_activity": np.median(in_batches(true_activity, tokens)),
        "kmer_pearson": np.corrcoef(*(np.bincount(x.ravel(), minlength=64) for x in kmers))[0, 1],
        "motif_correlation": np.corrcoef(*(in_batches(count_sites, x).sum(0) for x in both))[0, 1],
        "log_likelihood": in_batches(likelihood, tokens, 128).mean(),
        "unique_fraction": len(np.unique(tokens, axis=0)) / size,
        "hamming_distance": (length - np.sum(shares**2)) * size / (size - 1),  # mean over all pairs
        "gc": np.mean((tokens == 1) | (tokens == 2)),
    }
    kept = (name for name in metrics if name != "true_activity" or not args.data_path)
    return {name: float(np.nan_to_num(metrics[name])) for name in kept}  # without motifs, a correlation is not defined


# ===================================================== MAIN ======================================================
def load_extras():
    """The module of data files, rewards, DRAKES checkpoints and pictures, or None where this file lies alone."""
    spec = importlib.util.find_spec("baselines") and importlib.util.find_spec("baselines.dna_extras")
    return importlib.import_module("baselines.dna_extras") if spec else None


def prepare(run: pathlib.Path, args: Args) -> Setup:
    """Data, denoiser and oracles, those two from the cache if an earlier run has made them."""
    reward, sizes = None, (args.data_seed, args.oracle_dim, args.oracle_steps)
    if args.data_path or args.denoiser_checkpoint or args.reward:
        if not (extras := load_extras()):
            raise SystemExit("--data-path, --denoiser-checkpoint and --reward need baselines/dna_extras.py")
        reward = extras.load_reward(args.reward) if args.reward else None
    generated = (args.data_size, args.sequence_length, args.data_seed)
    data, oracles = extras.read_data(args) if args.data_path else generate_data(*generated), []
    for half in (False, True):
        make = partial(train_oracle, data, half, run, args)
        oracles.append(from_cache(args, "oracle", (*data, half, *sizes), (Oracle, oracle_loss, make_optimizer), make))
    print("Spearman on the other half: " + ", ".join(f"{oracle['spearman']:.3f}" for oracle in oracles), flush=True)
    if args.denoiser_checkpoint:
        model, pretrained = extras.load_drakes(args)
    else:
        model = Denoiser(args.hidden_dim, args.num_layers)
        sizes = (args.data_seed, args.pretrain_steps, args.pretrain_batch_size, args.pretrain_lr, args.pretrain_warmup)
        key, tokens = jax.random.key(args.data_seed), jax.device_put(data.tokens, on_all())
        params, folder, steps = model.init(key, tokens[:1]), run / "pretraining", args.pretrain_steps
        make = partial(run_stage, "pretraining", params, steps, folder, key, model, tokens, args)
        code = (Denoiser, denoising_loss, make_optimizer)
        pretrained = from_cache(args, "denoiser", (data.tokens, model, *sizes), code, make)
    pretrained, *oracles = jax.device_put((pretrained, *oracles), on_all())
    return Setup(data, model, pretrained, *oracles, reward or partial(predict, oracles[0]))


def draw(params, setup: Setup, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L) of a model, in the batches of the fine-tuning, so that no other size is compiled."""
    keys = jax.random.split(jax.random.key(args.seed), -(-args.eval_samples // (args.num_groups * args.group_size)))
    return np.concatenate([sample_model(params, key, setup.model, args) for key in keys])[: args.eval_samples]


def finetune(setup: Setup, run: pathlib.Path, args: Args) -> dict:
    """The denoiser's parameters after fine-tuning, on-policy: every update has fresh samples of the current model."""

    def batch(params, key):
        tokens = sample_model(params["model"], jax.random.fold_in(key, 2), setup.model, args)
        values = {"reward": setup.reward(tokens), "pred_activity": predict(setup.judge, tokens)}
        values |= {} if args.data_path else {"true_activity": true_activity(tokens)}
        return (tokens, values["reward"]), {f"charts/{name}": jnp.median(value) for name, value in values.items()}

    # A copy: train_step reuses the memory of what it is given.
    params = jax.tree.map(jnp.copy, {"model": setup.pretrained, "log_lambda": jnp.zeros(())})
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    return run_stage("finetuning", params, args.num_updates, run, key, setup.model, batch, args, every=1)["model"]


def report(run: pathlib.Path, before: np.ndarray, after: np.ndarray, setup: Setup, args: Args) -> dict:
    """Both samples' metrics, as a table and metrics.json, samples.fasta and, if load_extras finds them, pictures."""
    metrics = {"pretrained": compute_metrics(before, setup, args), "finetuned": compute_metrics(after, setup, args)}
    print(f"{'':24}{'pretrained':>12}{'finetuned':>12}")
    for name, value in metrics["pretrained"].items():
        print(f"{name:24}{value:12.3f}{metrics['finetuned'][name]:12.3f}")
    (run / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    records = zip(itertools.count(), in_batches(partial(predict, setup.judge), after), LETTERS[after])
    records = (f">{i} pred_activity={y:.3f}\n{letters.tobytes().decode()}\n" for i, y, letters in records)
    (run / "samples.fasta").write_text("".join(records))
    if extras := load_extras():
        extras.draw_pictures(run, before, after, setup, args)
    else:
        print("no pictures: they need baselines/dna_extras.py")
    return metrics


def open_run(args: Args, name: str, script: str) -> tuple[pathlib.Path, Args]:
    """A new run's folder, with args.json, or that of --resume and the flags it was started with."""
    if not args.resume:
        run = pathlib.Path("runs", f"{name}__{check_args(args).exp_name}__{args.seed}__{int(time.time())}")
        run.mkdir(parents=True, exist_ok=True)
        (run / "args.json").write_text(json.dumps({"script": script} | asdict(args), indent=2) + "\n")
        return run, args
    try:
        saved = json.loads((pathlib.Path(args.resume) / "args.json").read_text())
        if saved.pop("script") != script or args != replace(type(args)(), resume=args.resume):
            raise ValueError(f"it must be a run of {script}.py, and keeps its own flags: give no other")
        return pathlib.Path(args.resume), check_args(type(args)(**saved))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"--resume {args.resume}: {' '.join(str(error).split())}") from None


def main(args: Args) -> dict:
    """Fine-tune, write everything to runs/{run} and return the metrics."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax is talkative
    if args.distributed:
        jax.distributed.initialize()
    run, args = open_run(args, args.weighting, "dna_finetune")
    for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends the process at once
        signal.signal(number, lambda number, _: os._exit(128 + number) if signals else signals.append(number))
    try:
        lock = open(run / f"lock{jax.process_index()}", "w")  # noqa: SIM115 (it is freed at the end)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SystemExit(f"{run} cannot be written, or another process is writing it: {error}") from None
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}: tensorboard --logdir {run}", flush=True)
    start, setup = time.perf_counter(), prepare(run, args)
    before, ready = draw(setup.pretrained, setup, args), time.perf_counter()
    after = draw(finetune(setup, run, args), setup, args)
    print(f"{ready - start:.0f} s to prepare, {time.perf_counter() - ready:.0f} s to fine-tune", flush=True)
    return report(run, before, after, setup, args) if jax.process_index() == 0 else {}


if __name__ == "__main__":
    args = tyro.cli(Args)
    main(args if args.preset == "small" else tyro.cli(Args, default=Args(**PAPER)))
