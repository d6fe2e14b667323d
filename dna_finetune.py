# /// script
# requires-python = ">=3.11"
# dependencies = ["flax", "jax>=0.5", "optax", "scipy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""GeMPO on DNA: fine-tune a masked diffusion model of regulatory sequences toward high activity.

Paper: "GeMPO: Generalized Measure Matching for Online Diffusion Reinforcement Learning", Ma, Gao,
Chen, Li and Dai, 2026, arXiv 2603.10250, section 5.3. An update (`finetune`) draws groups of n
sequences from the current model, values them by an oracle, r = oracle(x), and descends

    sum_b w_b l(x_b),   l(x) = 1/t sum_{i masked} -log p(x_i | x_t),                 (equation 8)

the denoising loss with weights w_b that rise with r_b inside a group: exp, linear, square, or neg,
which is linear with a floor ell < 0, so that the model is pushed away from bad sequences.

Before that, `prepare` pretrains the denoiser on sequences of 200 letters and trains two oracles of
their activity, each on one half of the data: one is the reward, the other one only evaluates.

Usage: `python dna_finetune.py --weighting neg --ell -0.3`, or `--help`. Your own
- data: --data-path FILE.tsv.gz; without it, sequences are generated whose activity is known exactly
- reward: edit `compute_reward`
- weights of the samples: edit `compute_weights`
- pretrained denoiser: --denoiser-path; every run leaves a denoiser.model, and
  baselines/convert_drakes.py makes one of a checkpoint of DRAKES

Shapes: B sequences, or G groups of n; L letters of a sequence; M motifs.
"""

import collections
import csv
import gzip
import hashlib
import inspect
import json
import math
import os
import pathlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from scipy import stats
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

# =========================================== ARGUMENTS ===========================================


@dataclass(frozen=True)
class Args:
    exp_name: str = "dna_finetune"  # name of this experiment
    seed: int = 1  # seed of fine-tuning and evaluation; a run repeats exactly on the same machine
    preset: Literal["small", "hour", "paper"] = "small"  # sizes; other flags override a preset's
    resume: str | None = None  # a run's folder (runs/{run}) to go on from, with its flags
    checkpoint_frequency: int = 20  # updates of the fine-tuning between two checkpoints; 0: none
    cache_path: str = "runs/cache"  # folder where denoiser and oracles wait for the next run
    data_path: str | None = None  # CSV or TSV file, plain or .gz, with a header; None: generated
    sequence_column: str = "seq"  # its column of sequences
    activity_column: str = "hepg2"  # its column of activities
    split_column: str | None = None  # its column whose values (chromosomes, elements) stay together
    sequence_length: int = 200  # letters of a sequence (L); others in the file are left out
    data_size: int = 40_000  # sequences to generate
    data_seed: int = 0  # seed of generated data, pretraining and oracles
    denoiser_path: str | None = None  # a denoiser.model to start from, instead of pretraining one
    hidden_dim: int = 48  # channels of the denoiser
    num_layers: int = 4  # residual layers of the denoiser
    pretrain_steps: int = 2_000  # updates of the pretraining
    pretrain_batch_size: int = 128  # sequences per update of the pretraining
    pretrain_lr: float = 4e-3  # its learning rate (Adam)
    pretrain_warmup: int = 50  # updates over which the rate rises from 0
    pretrain_decay: bool = True  # whether the rate then falls to 0, as a cosine; else it stays
    oracle_dim: int = 64  # channels of the reward oracle; the evaluating one has 1.5 times as many
    oracle_steps: int = 1_500  # updates of each oracle, on 128 sequences
    weighting: Literal["exp", "linear", "square", "neg", "wd1"] = "neg"  # weights inside a group
    ell: float = -0.3  # floor of neg on z-scores; not comparable with the RL scripts' ell
    normalizer: Literal["zscore", "simplex"] = "zscore"  # see REWEIGHTING; simplex: RL scripts' ell
    exp_temperature: float = 0.1  # zscore: temperature of exp, in units of the reward
    target_kl: float = 1.5  # simplex: KL budget of the weights in nats (kappa)
    num_updates: int = 100  # updates of the fine-tuning
    num_groups: int = 4  # groups per update (G)
    group_size: int = 32  # sequences per group, weighted against each other (n)
    times_per_sample: int = 4  # noise levels at which an update denoises each sequence
    sample_steps: int = 40  # denoising steps of the sampler (T)
    learning_rate: float = 1e-3  # learning rate of the fine-tuning (Adam)
    eval_samples: int = 640  # sequences of an evaluation


PRESETS = {
    "small": {},  # for two CPU cores
    "hour": dict(  # larger groups and longer pretraining, for two CPU cores; not run yet
        pretrain_steps=10_000,
        num_updates=200,
        group_size=128,
        times_per_sample=1,
    ),
    "paper": dict(  # the authors' sizes, for a GPU; not run yet
        data_size=700_000,
        hidden_dim=128,
        num_layers=20,
        pretrain_steps=131_500,
        pretrain_batch_size=512,
        pretrain_lr=3e-4,
        pretrain_warmup=2_500,
        pretrain_decay=False,
        oracle_dim=256,
        oracle_steps=20_000,
        num_updates=500,
        group_size=128,
        times_per_sample=1,
        sample_steps=128,
        learning_rate=1e-4,
    ),
}
COUNTS = ("sequence_length", "data_size", "hidden_dim", "num_layers", "pretrain_steps")
COUNTS += ("pretrain_batch_size", "pretrain_warmup", "oracle_dim", "oracle_steps", "num_updates")
COUNTS += ("num_groups", "times_per_sample", "sample_steps")
NATURALS = ("seed", "data_seed", "checkpoint_frequency")
POSITIVES = ("pretrain_lr", "exp_temperature", "target_kl", "learning_rate")


def require(args: Args, flag: str, is_allowed: bool, allowed: str) -> None:
    """Exit with one line that names the flag and what it may be, unless `is_allowed`."""
    if not is_allowed:
        name = flag.replace("_", "-")
        raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, flag)}")


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for flag in COUNTS:
        require(args, flag, getattr(args, flag) >= 1, "a whole number, at least 1")
    for flag in NATURALS:
        require(args, flag, getattr(args, flag) >= 0, "a whole number, at least 0")
    for flag in POSITIVES:
        require(args, flag, 0 < getattr(args, flag) < math.inf, "a finite number above 0")
    for flag in ("group_size", "eval_samples"):
        require(args, flag, getattr(args, flag) >= 2, "a whole number, at least 2")
    require(args, "ell", -math.inf < args.ell <= 0, "finite and at most 0")
    require(args, "sequence_length", args.sequence_length >= 40, "at least 40")
    require(args, "data_size", args.data_size >= 1_000, "at least 1000")
    is_name = args.exp_name != "" and "/" not in args.exp_name
    require(args, "exp_name", is_name, "a name without slashes")
    if args.normalizer == "simplex":
        log_n = math.log(args.group_size)  # weights that sum to one are never further apart
        below = f"below log(group_size) = {log_n:.3f}"
        require(args, "target_kl", args.target_kl < log_n, below)
        has_sum = args.weighting != "wd1"
        require(args, "weighting", has_sum, "another one, since wd1's weights sum to zero")
    alone = args.resume is None or args == replace(type(args)(), resume=args.resume)
    require(args, "resume", alone, "the only flag, since a run keeps its flags")


# ============================================= DATA ==============================================
LETTERS = np.frombuffer(b"ACGT", np.uint8)  # tokens 0 to 3, so that 3 - x is the complement of x
MASK = 4  # the token of a masked letter


class Data(NamedTuple):
    """Sequences with their measured activity in log2 units."""

    tokens: np.ndarray  # (N, L) uint8
    activity: np.ndarray  # (N,) float32
    half: np.ndarray  # (N,) bool: which oracle learns from it; True: the evaluating one


def encode(sequences: list[str]) -> np.ndarray:
    """Tokens (B, L), uint8, of B equally long sequences of A, C, G and T."""
    letters = np.frombuffer("".join(sequences).encode(), np.uint8)
    return np.searchsorted(LETTERS, letters).astype(np.uint8).reshape(len(sequences), -1)


def decode(tokens) -> list[str]:
    """B sequences of letters, of tokens (B, L)."""
    return [row.tobytes().decode() for row in LETTERS[np.asarray(tokens)]]


def read_data(args: Args) -> Data:
    """The sequences of the CSV or TSV file --data-path; prints how many, and what is left out.

    Rows with the same entry in --split-column, or without one a sequence and its reverse
    complement, are in the same half. Exits with one line if the file is of no use.
    """
    path = pathlib.Path(args.data_path)
    sequences, activities, groups = [], [], []
    left_out = collections.Counter()
    try:
        for sequence, value, group in read_rows(path, args):
            if set(sequence) - set("ACGT"):
                left_out["with letters other than A, C, G, T"] += 1
            elif len(sequence) != args.sequence_length:
                left_out[f"not of {args.sequence_length} letters"] += 1
            elif not is_finite_number(value):
                left_out["without a number"] += 1
            else:
                other_strand = sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1]
                sequences.append(sequence)
                activities.append(float(value))
                groups.append(group or min(sequence, other_strand))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise SystemExit(f"--data-path {path}: {one_line(error)}") from None
    counts = [f"{len(sequences)} rows used"]
    counts += [f"{count} left out, {reason}" for reason, count in left_out.items()]
    print(f"{path}: {'; '.join(counts)}", flush=True)
    _, group_numbers = np.unique(groups, return_inverse=True)
    half = group_numbers % 2 == 1
    if len(half) < 200 or not half.any():
        raise SystemExit(f"--data-path {path}: 200 rows in two groups are needed; see above")
    return Data(encode(sequences), np.float32(activities), half)


def read_rows(path: pathlib.Path, args: Args) -> Iterator[tuple[str, str, str]]:
    """Sequence, activity and entry of --split-column (or "") of each row; may be plain or .gz."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, restval="")
        for column in (args.sequence_column, args.activity_column, args.split_column):
            if column and column not in (reader.fieldnames or []):
                raise ValueError(f"it has no column {column}, only {reader.fieldnames}")
        for row in reader:
            group = row[args.split_column] if args.split_column else ""
            yield row[args.sequence_column].strip().upper(), row[args.activity_column], group


def is_finite_number(text: str) -> bool:
    """Whether `text` is one."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def in_batches(function: Callable, tokens: np.ndarray, size: int = 1024) -> np.ndarray:
    """`function` of tokens (N, L), row by row, called on batches of one size: it compiles once."""
    padding = np.repeat(tokens[:1], -len(tokens) % size, axis=0)
    padded = np.concatenate([tokens, padding])
    starts = range(0, len(padded), size)
    parts = [np.asarray(function(padded[start : start + size])) for start in starts]
    return np.concatenate(parts)[: len(tokens)]


# ======================================== GENERATED DATA =========================================
# Made-up data whose activity is known exactly, so that it shows where the oracles are fooled. The
# binding sites are real ones of liver cells (as IUPAC consensus); how they act is made up.


MOTIFS = {  # name: site, and its effect on the activity; below 0 it represses
    "HNF1A": ("GTTAATNATTAAC", 1.7),
    "HNF4A": ("RGGNCAAAGKYCA", 1.6),
    "CEBPA": ("RTTGCGYAAY", 1.3),
    "FOXA": ("TRTTTACWYW", 0.9),
    "ETS": ("MCCGGAAGT", 1.1),
    "AP-1": ("TGASTCA", 1.2),
    "CREB": ("TGACGTMA", 1.2),
    "USF": ("RTCACGTGAY", 0.8),
    "SP1": ("GGGGCGGGG", 0.7),
    "NFY": ("RRCCAATSR", 0.7),
    "SNAI/ZEB": ("CACCTG", -0.5),
    "GFI1": ("WAATCACWGC", -0.8),
}
SITES = [site for site, _ in MOTIFS.values()]
EFFECTS = np.array([effect for _, effect in MOTIFS.values()], np.float32)
IUPAC = {"A": [0], "C": [1], "G": [2], "T": [3], "R": [0, 2], "Y": [1, 3], "S": [1, 2]}
IUPAC |= {"W": [0, 3], "K": [2, 3], "M": [0, 1], "N": [0, 1, 2, 3]}  # tokens of each letter
WIDTH = max(len(site) for site in SITES)
WEAK_SITE = 0.3  # strength of a site with one letter wrong
# The activity is SILENT without sites and RISE above it at most. The constants are such that its
# median, 99% and 99.9% quantiles, 0.1, 4.9 and 6.1, are near those of the paper's data (.2, 4.6, 6.2).
SILENT, RISE, HALF, POWER = -1.0, 12.8, 6.5, 2.37
MEASUREMENT_STD = 0.3


def site_filters() -> np.ndarray:
    """Filters (WIDTH, 4, 2, M), which count a site's letters on either strand; N counts nothing."""
    filters = np.zeros((WIDTH, 4, 2, len(SITES)), np.float32)
    for k, site in enumerate(SITES):
        for i, letter in enumerate(site):
            if letter != "N":
                tokens = np.array(IUPAC[letter])
                filters[i, tokens, 0, k] = 1
                filters[len(site) - 1 - i, 3 - tokens, 1, k] = 1
    return filters


@jax.jit
def find_sites(tokens: jax.Array) -> jax.Array:
    """Strength (B, L, M) of the site of each motif that starts at each position of tokens (B, L).

    1 for a site, WEAK_SITE with one letter of at least 8 wrong, else 0; the better strand counts.
    """
    filters = site_filters()
    num_letters = filters[:, :, 0].any(axis=1).sum(axis=0)  # (M,)
    x = jax.nn.one_hot(tokens, 4)
    x = jnp.pad(x, ((0, 0), (0, WIDTH - 1), (0, 0)))  # no site hangs over the end
    layout = ("NWC", "WIO", "NWC")
    matches = jax.lax.conv_general_dilated(
        x, filters.reshape(WIDTH, 4, -1), (1,), "VALID", dimension_numbers=layout
    )
    missing = num_letters - matches.reshape(*tokens.shape, 2, -1).max(axis=-2)
    is_weak = (missing == 1) & (num_letters >= 8)
    return jnp.where(missing == 0, 1.0, jnp.where(is_weak, WEAK_SITE, 0.0))


@jax.jit
def true_activity(tokens: jax.Array) -> jax.Array:
    """The activity (B,) of tokens (B, L) in log2 units, without the error of measurement.

    A Hill function of activation / (1 + repression), both sums of effects e_m (1 - exp(-1.5 o_m)),
    o_m the sum of a motif's sites: the second site of a motif adds less than the first.
    """
    bound = 1 - jnp.exp(-1.5 * find_sites(tokens).sum(axis=1))  # (B, M)
    activation = bound @ np.maximum(EFFECTS, 0)
    repression = bound @ np.maximum(-EFFECTS, 0)
    x = (activation / (1 + repression)) ** POWER
    return SILENT + RISE * x / (HALF**POWER + x)


def generate_data(size: int, length: int, seed: int) -> Data:
    """`size` sequences of random letters, each with a GC content of its own, with planted sites."""
    rng = np.random.default_rng(seed)
    gc = rng.normal(0.46, 0.1, (size, 1)).clip(0.25, 0.75)
    is_gc = rng.random((size, length)) < gc
    is_second = rng.random((size, length)) < 0.5
    tokens = np.where(is_gc, 1 + is_second, 3 * is_second).astype(np.uint8)
    richness = rng.gamma(4.0, 1 / 4.0, size)  # some sequences have more sites than others
    for site, effect in zip(SITES, EFFECTS, strict=True):
        # Each motif in Poisson-many places, on either strand.
        num_sites = rng.poisson((0.45 if effect > 0 else 0.15) * richness)
        rows = np.repeat(np.arange(size), num_sites)
        letters = np.stack([rng.choice(IUPAC[letter], len(rows)) for letter in site], axis=1)
        is_forward = rng.random((len(rows), 1)) < 0.5
        letters = np.where(is_forward, letters, 3 - letters[:, ::-1])
        starts = rng.integers(length - len(site) + 1, size=(len(rows), 1))
        tokens[rows[:, None], starts + np.arange(len(site))] = letters
    noise = MEASUREMENT_STD * rng.standard_normal(size)
    activity = np.float32(in_batches(true_activity, tokens) + noise)
    return Data(tokens, activity, half=rng.random(size) < 0.5)


# =========================================== NETWORKS ============================================
class Denoiser(nn.Module):
    """Logits of p(x_0 | x_t), (..., L, 4), at tokens x_t (..., L) or their chances (..., L, 5).

    The network of DRAKES (Wang et al. 2024). It is not told the time there either: its features of
    the time are those of t = 0 at every t. What they add to each layer is a bias here.
    """

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.nn.one_hot(x, 5)
        h = nn.relu(nn.Conv(self.hidden_dim, (9,), name="conv_in")(x))
        for i in range(self.num_layers):
            dilation = (1, 1, 4, 16, 64)[5 * i // self.num_layers]  # 1 in two fifths of the layers
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.hidden_dim,))
            y = nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(h + bias)
            y = nn.Conv(self.hidden_dim, (9,), kernel_dilation=dilation, name=f"conv_{i}")(y)
            h = h + nn.relu(y)
        h = nn.relu(nn.Dense(self.hidden_dim, name="head_0")(h))
        return nn.Dense(5, name="head_1")(h)[..., :MASK]  # the mask never gets probability


class Oracle(nn.Module):
    """Activity (B,) in the data's units, at tokens (B, L) or chances of letters (B, L, 4)."""

    width: int
    mean: float = 0.0  # of the data; the network learns what is left in standard deviations
    std: float = 1.0

    @nn.compact
    def __call__(self, x, training: bool = False):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.nn.one_hot(x, 4)
        x = nn.relu(nn.Conv(self.width, (15,))(x - 0.25))
        x = nn.max_pool(x**2, (8,), (8,))  # squared, it learns motifs in half the steps
        x = x + nn.relu(nn.Conv(self.width, (5,))(x))
        x = jnp.concatenate([x.max(axis=-2), x.mean(axis=-2)], axis=-1)
        x = nn.Dropout(0.1, deterministic=not training)(x)
        x = nn.relu(nn.Dense(self.width)(x))
        return self.mean + self.std * nn.Dense(1)(x)[..., 0]


class Model(struct.PyTreeNode):
    """A network with its parameters: a function, of which gradients can be taken."""

    params: Any
    network: nn.Module = struct.field(pytree_node=False)

    def __call__(self, x, **options):
        return self.network.apply(self.params, x, **options)


def create_model(network: nn.Module, args: Args, key: jax.Array) -> Model:
    """A `Model` of new parameters."""
    tokens = jnp.zeros((1, args.sequence_length), jnp.uint8)
    return Model(network.init(key, tokens), network)


@jax.jit
def predict(oracle: Model, tokens: jax.Array) -> jax.Array:
    """Activity (B,) of tokens (B, L) by an oracle."""
    return oracle(tokens)


# =========================================== DIFFUSION ===========================================
T_MIN = 1e-5  # smallest time


def mask_chance(t: jax.Array) -> jax.Array:
    """1 - exp(-sigma_t) = (1 - 1e-3) t, the chance that a letter is masked at t in [0, 1] (MDLM).

    (d sigma / dt) / expm1(sigma), the weight of the denoising loss at t, is then 1 / t.
    """
    return (1 - 1e-3) * t


def denoising_loss(denoiser: Model, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """l(x) (..., n), a bound on -log p(x) in nats, of tokens (..., n, L).

    Each sequence is masked at one time; the n times are antithetic: one in each n-th of (0, 1).
    """
    t_key, mask_key = jax.random.split(key)
    n = tokens.shape[-2]
    u = jax.random.uniform(t_key, (*tokens.shape[:-2], 1))
    t = T_MIN + (1 - T_MIN) * ((u + jnp.arange(n) / n) % 1)
    is_masked = jax.random.uniform(mask_key, tokens.shape) < mask_chance(t)[..., None]
    log_p = nn.log_softmax(denoiser(jnp.where(is_masked, MASK, tokens)))
    letters = tokens[..., None].astype(int)
    nats = -jnp.take_along_axis(log_p, letters, axis=-1)[..., 0]
    # A letter that is not masked is carried over by the sampler: nothing to learn.
    return jnp.sum(jnp.where(is_masked, nats, 0.0), axis=-1) / t


@partial(jax.jit, static_argnames=("num_samples", "num_steps", "length"))
def sample_sequences(denoiser: Model, key, num_samples: int, num_steps: int, length: int):
    """Draw tokens (num_samples, length), uint8, in `num_steps` steps from t = 1, all masks.

    From t to s a mask is lifted with chance 1 - mask_chance(s) / mask_chance(t); its letter is
    drawn from p(x_0 | x_t). What is masked at T_MIN becomes the most probable letter.
    """
    chances = mask_chance(jnp.linspace(1.0, T_MIN, num_steps + 1))
    lift_chances = 1 - chances[1:] / chances[:-1]

    def denoising_step(x, step):
        lift_chance, key = step
        # One uniform number decides whether a mask is lifted and which letter is under it.
        limits = lift_chance * jnp.cumsum(nn.softmax(denoiser(x)), axis=-1)
        u = jax.random.uniform(key, x.shape)
        drawn = jnp.sum(u[..., None] > limits, axis=-1, dtype=x.dtype)  # 4, MASK: not lifted
        return jnp.where(x == MASK, drawn, x), None

    x = jnp.full((num_samples, length), MASK, jnp.uint8)
    steps = (lift_chances, jax.random.split(key, num_steps))
    x, _ = jax.lax.scan(denoising_step, x, steps)
    return jnp.where(x == MASK, denoiser(x).argmax(axis=-1), x).astype(jnp.uint8)


# ==================================== PRETRAINING AND ORACLES ====================================
class FitSettings(NamedTuple):
    """How `fit` trains a model."""

    num_steps: int
    batch_size: int
    lr: float
    warmup: int = 50  # steps over which the learning rate rises to lr
    decay: bool = True  # whether it then falls to 0, as a cosine; else it stays


def make_schedule(settings: FitSettings) -> optax.Schedule:
    """The learning rate of `fit` at each step."""
    peak, warmup = settings.lr, settings.warmup
    if settings.decay:
        last_step = max(settings.num_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last_step)
    return optax.warmup_constant_schedule(0.0, peak, warmup)


def fit(name: str, model: Model, loss: Callable, data, settings: FitSettings, seed: int) -> Model:
    """The model after steps of Adam on loss(model, batch, key), a batch being rows of `data`.

    Exits with one line if the loss is not finite in the end.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(make_schedule(settings)))

    @jax.jit
    def step(model, opt_state, data, key):
        row_key, loss_key = jax.random.split(key)
        num_rows = len(jax.tree.leaves(data)[0])
        rows = jax.random.randint(row_key, (settings.batch_size,), 0, num_rows)
        batch = jax.tree.map(lambda values: values[rows], data)
        value, grads = jax.value_and_grad(loss)(model, batch, loss_key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(model, updates), opt_state, value

    data = jax.device_put(data)
    opt_state = optimizer.init(model)
    for i in progress_bar(name, 0, settings.num_steps):
        key = jax.random.fold_in(jax.random.key(seed), i)
        model, opt_state, value = step(model, opt_state, data, key)
    if not np.isfinite(value):
        raise SystemExit(f"{name} diverged: its loss is {value}")
    return model


def pretraining_loss(denoiser: Model, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """Denoising loss per letter of tokens (B, L)."""
    return denoising_loss(denoiser, tokens, key).mean() / tokens.shape[-1]


def oracle_loss(oracle: Model, batch: tuple, key: jax.Array) -> jax.Array:
    """Squared error, in variances of the data, on a batch of tokens (B, L) and activity (B,)."""
    tokens, activity = batch
    predicted = oracle(tokens, training=True, rngs={"dropout": key})
    return jnp.mean((predicted - activity) ** 2) / oracle.network.std**2


def pretrain_denoiser(data: Data, args: Args) -> Model:
    """A denoiser of the data's sequences."""
    seed = args.data_seed
    model = create_model(Denoiser(args.hidden_dim, args.num_layers), args, jax.random.key(seed))
    rate = args.pretrain_lr, args.pretrain_warmup, args.pretrain_decay
    settings = FitSettings(args.pretrain_steps, args.pretrain_batch_size, *rate)
    return fit_or_load(args, "denoiser", model, pretraining_loss, data.tokens, settings, seed)


def train_oracle(data: Data, half: bool, args: Args) -> Model:
    """An oracle of one half of the data. Prints how well it predicts the other half."""
    is_own = data.half == half
    tokens, activity = data.tokens[is_own], data.activity[is_own]
    name = "evaluation oracle" if half else "reward oracle"
    width = 3 * args.oracle_dim // 2 if half else args.oracle_dim
    seed = args.data_seed + int(half)
    network = Oracle(width, float(activity.mean()), float(activity.std()) + 1e-6)
    model = create_model(network, args, jax.random.key(seed))
    settings = FitSettings(args.oracle_steps, batch_size=128, lr=3e-3)
    oracle = fit_or_load(args, name, model, oracle_loss, (tokens, activity), settings, seed)
    predicted = in_batches(partial(predict, oracle), data.tokens[~is_own])
    correlation = stats.spearmanr(predicted, data.activity[~is_own]).statistic
    print(f"{name}: Spearman correlation {correlation:.3f} on the other half", flush=True)
    return oracle


class Setup(NamedTuple):
    """What every method starts from."""

    data: Data
    denoiser: Model  # the pretrained one
    reward_oracle: Model
    eval_oracle: Model


def prepare(args: Args) -> Setup:
    """Data, pretrained denoiser and oracles."""
    if args.data_path:
        data = read_data(args)
    else:
        data = generate_data(args.data_size, args.sequence_length, args.data_seed)
    reward_oracle = train_oracle(data, False, args)
    eval_oracle = train_oracle(data, True, args)
    if args.denoiser_path:
        return Setup(data, load_denoiser(args.denoiser_path), reward_oracle, eval_oracle)
    return Setup(data, pretrain_denoiser(data, args), reward_oracle, eval_oracle)


# ============================================ REWARD =============================================
def compute_reward(tokens: jax.Array, setup: Setup) -> jax.Array:
    """The reward (B,) of tokens (B, L), which fine-tuning maximizes: the reward oracle's activity.

    Put your own here: any Python that returns B finite numbers; no gradient is taken of it.
    `decode(tokens)` gives the sequences as strings.
    """
    return predict(setup.reward_oracle, tokens)


# ========================================== REWEIGHTING ==========================================
# A weighting gives the samples of a group weights that rise with their rewards. The weights are
# constants in the loss: no gradient flows through them. Two ways to normalize the rewards:
#
# zscore, the authors' code for DNA: z = (r - mean) / std inside the group, and
#     linear  clip(z, 0, 3)         square  z^2 where z > 0        neg  clip(z, ell, 3)
#     exp     softmax(r / exp_temperature), as RL-D2
#     wd1     softmax(r) - softmax(-r) of the rewards as they are, as in the authors' code; the
#             paper's Example 3.4 (and bandit.py) has z in the place of r
#   ell is a floor on z, the lowest weight of a bad sequence: the loss pushes the model away from it.
#   At ell = -0.3 the mean weight of normal rewards is 0.27, so the floor is 1.1 mean weights below 0.
#
# simplex, the paper's theory (Appendix E) and the RL scripts: weights that sum to one,
#     exp(y), max(y, 0), max(y, 0)^2 or max(y, ell / n), with y = (r - nu) / lambda
#   with nu such that they do. lambda is tuned to the KL budget target_kl (Appendix F). ell is a
#   floor on n w, whose mean is 1: at ell = -0.3 it is 0.3 mean weights below 0. The functions are
#   those of gempo_exp.py, gempo_square.py and gempo_neg.py, where their derivations stand; neg is
#   linear at ell = 0.


def compute_weights(rewards: jax.Array, temperature: jax.Array, args: Args) -> jax.Array:
    """Weights (G, n) of rewards (G, n). Add your own weighting here."""
    if args.normalizer == "simplex":
        return simplex_weights(rewards, temperature, args)
    if args.weighting == "exp":
        return nn.softmax(rewards / args.exp_temperature)
    if args.weighting == "wd1":
        return nn.softmax(rewards) - nn.softmax(-rewards)
    mean = rewards.mean(axis=-1, keepdims=True)
    std = rewards.std(axis=-1, keepdims=True)
    z = (rewards - mean) / (std + 1e-6)
    if args.weighting == "square":
        return jnp.maximum(z, 0.0) ** 2
    floor = args.ell if args.weighting == "neg" else 0.0
    return jnp.clip(z, floor, 3.0)


def simplex_weights(rewards: jax.Array, temperature: jax.Array, args: Args) -> jax.Array:
    """Weights (G, n) that sum to one over n."""
    if args.weighting == "exp":
        return reweight_exp(rewards, temperature)
    if args.weighting == "square":
        return reweight_square(rewards, temperature)
    ell = args.ell if args.weighting == "neg" else 0.0
    return reweight_neg(rewards, temperature, ell)


def solve_normalizer_exp(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i exp((q_i - nu) / temp) = 1, for q (..., N) and temp > 0."""
    return temp * jax.nn.logsumexp(q / temp, axis=-1, keepdims=True)


def reweight_exp(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights exp((q_i - nu) / temp) (example 3.1), which sum to one: (..., N), for q (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_exp(q, temp)
    return jnp.exp((q - nu) / temp)


def solve_normalizer_square(q: jax.Array, temp: jax.Array) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, 0)^2 = 1, for q (..., N) and temp > 0."""
    z = jnp.sort(q, axis=-1, descending=True) / temp
    ranks = jnp.arange(1, q.shape[-1] + 1)
    means = jnp.cumsum(z, axis=-1) / ranks
    # D_k grows by (z_k - z-bar_k)^2 k / (k - 1) (Welford); the paper's S_2 and S_1^2 would cancel.
    growth = (z - means) ** 2 * ranks / jnp.maximum(ranks - 1, 1)
    deviations = jnp.cumsum(growth, axis=-1)
    excess = deviations + ranks * (means - z) ** 2
    k = jnp.sum(excess <= 1, axis=-1, keepdims=True)
    active_mean = jnp.take_along_axis(means, k - 1, axis=-1)
    active_deviations = jnp.take_along_axis(deviations, k - 1, axis=-1)
    return temp * (active_mean - jnp.sqrt((1 - active_deviations) / k))


def reweight_square(q: jax.Array, temp: jax.Array) -> jax.Array:
    """Weights max((q_i - nu) / temp, 0)^2 (section 4), which sum to one: (..., N), for q (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_square(q, temp)
    return jnp.maximum((q - nu) / temp, 0.0) ** 2


def solve_normalizer_neg(q: jax.Array, temp: jax.Array, ell: float) -> jax.Array:
    """nu (..., 1) such that sum_i max((q_i - nu) / temp, ell / N) = 1, for q (..., N), ell <= 0."""
    n = q.shape[-1]
    floor = ell / n
    x = jnp.sort(q, axis=-1, descending=True)
    prefix_sums = jnp.cumsum(x, axis=-1)
    excess = prefix_sums - jnp.arange(1, n + 1) * x
    k = jnp.sum(excess <= temp * (1 - n * floor), axis=-1, keepdims=True)
    active_sum = jnp.take_along_axis(prefix_sums, k - 1, axis=-1)
    return (active_sum - temp * (1 - (n - k) * floor)) / k


def reweight_neg(q: jax.Array, temp: jax.Array, ell: float) -> jax.Array:
    """Weights max((q_i - nu) / temp, ell / N) (equation 11), which sum to one: (..., N)."""
    q = q - q.max(axis=-1, keepdims=True)  # changes no weight; float32 is exact enough only near 0
    nu = solve_normalizer_neg(q, temp, ell)
    return jnp.maximum((q - nu) / temp, ell / q.shape[-1])


def temperature_loss(log_lambda, weights: jax.Array, target_kl: float):
    """lambda (kappa - KL(p, uniform)) (equation 23), and the KL.

    p are the weights (B, N), cut off at 1e-6 and made to sum to one again: where some are negative,
    the budget kappa bounds the positive part (released code). Only the gradient by log lambda counts,
    in which p is a constant: weights sharper than the budget raise lambda, which flattens them.
    """
    p = jnp.maximum(weights, 1e-6)
    p = p / p.sum(axis=-1, keepdims=True)
    entropy = -jnp.sum(p * jnp.log(p), axis=-1)
    kl = jnp.mean(math.log(weights.shape[-1]) - entropy)
    return jnp.exp(log_lambda) * (target_kl - kl), kl


# ========================================== FINE-TUNING ==========================================
class State(NamedTuple):
    """All that fine-tuning changes: a checkpoint is one of these, and the flags.

    Resuming is exact because there is nothing else: random keys are made from the seed and the
    number of the update, data and oracles from the flags.
    """

    update: int  # updates made
    params: dict  # "denoiser", a Model, and "log_lambda", the logarithm of the temperature
    opt_state: Any


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, for the denoiser with a clipped gradient (the authors' clip)."""
    clip = optax.clip_by_global_norm(10.0)
    optimizers = {
        "denoiser": optax.chain(clip, optax.adam(args.learning_rate)),
        "log_lambda": optax.adam(0.03),
    }
    return optax.multi_transform(optimizers, {part: part for part in optimizers})


def create_state(args: Args, denoiser: Model) -> State:
    """The beginning of a fine-tuning: the pretrained denoiser and a temperature of 1."""
    params = {"denoiser": denoiser, "log_lambda": jnp.zeros(())}
    return State(0, params, make_optimizer(args).init(params))


def finetuning_loss(params: dict, tokens, weights, key, args: Args) -> tuple[jax.Array, dict]:
    """Reweighted denoising (equation 8) per letter of tokens (G, n, L) with weights (G, n)."""
    repeated = jnp.broadcast_to(tokens, (args.times_per_sample, *tokens.shape))
    nats = denoising_loss(params["denoiser"], repeated, key).mean(axis=0)  # (G, n)
    loss = jnp.mean(jnp.sum(weights * nats, axis=-1)) / tokens.shape[-1]
    lambda_loss, kl = temperature_loss(params["log_lambda"], weights, args.target_kl)
    metrics = {"losses/weighted_loss": loss, "charts/kl": kl}
    if args.normalizer == "zscore":
        return loss, metrics
    return loss + lambda_loss, metrics


@partial(jax.jit, static_argnames="args")
def learn(params: dict, opt_state, tokens: jax.Array, weights: jax.Array, key, args: Args):
    """One gradient step on tokens (G, n, L) with weights (G, n).

    Returns new parameters and state of the optimizer, and scalars to log.
    """
    grad = jax.grad(finetuning_loss, has_aux=True)
    grads, metrics = grad(params, tokens, weights, key, args)
    updates, opt_state = make_optimizer(args).update(grads, opt_state)
    metrics["losses/gradient_norm"] = optax.tree.norm(grads["denoiser"])
    metrics["charts/temperature"] = jnp.exp(params["log_lambda"])
    metrics["weights/min"] = weights.min()
    metrics["weights/mean"] = weights.mean()
    metrics["weights/max"] = weights.max()
    metrics["weights/negative_share"] = jnp.mean(weights < 0)
    return optax.apply_updates(params, updates), opt_state, metrics


def finetune(args: Args, setup: Setup, state: State, run: "RunFolder") -> Model:
    """The denoiser after updates, each of which samples, rewards, weighs, steps and logs."""
    groups = args.num_groups, args.group_size
    sizes = math.prod(groups), args.sample_steps, args.sequence_length
    finetune_key, _ = jax.random.split(jax.random.key(args.seed))  # `draw_samples` uses the other
    bar = progress_bar("fine-tuning", state.update, args.num_updates)
    for update in bar:
        params = state.params
        sample_key, loss_key = jax.random.split(jax.random.fold_in(finetune_key, update))

        # 1. Sample groups of sequences from the current model: every update has its own.
        tokens = sample_sequences(params["denoiser"], sample_key, *sizes)  # (G n, L)

        # 2. Reward each sequence.
        rewards = jnp.asarray(compute_reward(tokens, setup), jnp.float32)  # (G n,)

        # 3. Weigh the sequences of a group against each other.
        temperature = jnp.exp(params["log_lambda"])
        weights = compute_weights(rewards.reshape(groups), temperature, args)  # (G, n)

        # 4. Step: one gradient of the weighted denoising loss.
        grouped = tokens.reshape(*groups, -1)  # (G, n, L)
        params, opt_state, metrics = learn(
            params, state.opt_state, grouped, weights, loss_key, args
        )
        state = State(update + 1, params, opt_state)

        # 5. Log, and once in a while save.
        metrics["charts/reward"] = jnp.median(rewards)
        metrics["charts/predicted_activity"] = jnp.median(predict(setup.eval_oracle, tokens))
        if not args.data_path:
            metrics["charts/true_activity"] = jnp.median(true_activity(tokens))
        run.log(state.update, metrics)
        bar.set_postfix({"reward": f"{metrics['charts/reward']:.2f}"}, refresh=False)
        is_last = state.update == args.num_updates
        if args.checkpoint_frequency and (is_last or state.update % args.checkpoint_frequency == 0):
            run.save(state)
    return state.params["denoiser"]


# ========================================== EVALUATION ===========================================
def draw_samples(denoiser: Model, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L), in batches of the fine-tuning's size: it compiles nothing else."""
    size = args.num_groups * args.group_size
    _, eval_key = jax.random.split(jax.random.key(args.seed))
    keys = jax.random.split(eval_key, math.ceil(args.eval_samples / size))
    sizes = size, args.sample_steps, args.sequence_length
    samples = [sample_sequences(denoiser, key, *sizes) for key in keys]
    return np.concatenate(samples)[: args.eval_samples]


@jax.jit
def log_likelihood(denoiser: Model, key, tokens: jax.Array) -> jax.Array:
    """A lower bound of log p(x) (B,) of tokens (B, L) in nats, of 8 times t each."""
    keys = jax.random.split(key, 8)
    return -jax.lax.map(partial(denoising_loss, denoiser, tokens), keys).mean(axis=0)


def count_kmers(tokens: np.ndarray) -> np.ndarray:
    """How often each of the 64 words of three letters stands in tokens (N, L)."""
    words = tokens[:, :-2] * 16 + tokens[:, 1:-1] * 4 + tokens[:, 2:]
    return np.bincount(words.ravel(), minlength=64)


def count_motifs(tokens: np.ndarray) -> np.ndarray:
    """How many whole sites each motif has in tokens (N, L): (M,)."""
    is_site = in_batches(find_sites, tokens) == 1
    return is_site.sum(axis=(0, 1))


def correlate(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of them is constant, where it is not defined."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return np.corrcoef(x, y)[0, 1]


def compute_metrics(tokens: np.ndarray, setup: Setup, args: Args) -> dict[str, float]:
    """Metrics of samples, tokens (B, L); the paper's Table 3 is the first.

    Correlations are with the most active 0.1% of the data (1% of fewer than 100,000 sequences).
    """
    data, length = setup.data, tokens.shape[1]
    share = 0.001 if len(data.activity) >= 100_000 else 0.01
    top = data.tokens[data.activity >= np.quantile(data.activity, 1 - share)]
    letter_shares = np.mean(tokens[..., None] == np.arange(4), axis=0)  # (L, 4)
    no_self_pairs = len(tokens) / (len(tokens) - 1)  # a sequence is not compared with itself
    likelihood = partial(log_likelihood, setup.denoiser, jax.random.key(0))
    metrics = {
        "predicted_activity": np.median(in_batches(partial(predict, setup.eval_oracle), tokens)),
        "reward": np.median(in_batches(partial(compute_reward, setup=setup), tokens)),
    }
    if not args.data_path:
        metrics["true_activity"] = np.median(in_batches(true_activity, tokens))
    motif_ranks = [stats.rankdata(count_motifs(x)) for x in (tokens, top)]
    metrics |= {
        "kmer_pearson": correlate(count_kmers(tokens), count_kmers(top)),
        "motif_spearman": correlate(*motif_ranks),
        "log_likelihood_bound": np.median(in_batches(likelihood, tokens, size=128)),
        "unique_fraction": len(np.unique(tokens, axis=0)) / len(tokens),
        "hamming_distance": (length - np.sum(letter_shares**2)) * no_self_pairs,
        "gc": np.mean((tokens == 1) | (tokens == 2)),
    }
    return {name: float(value) for name, value in metrics.items()}


def write_samples(path: pathlib.Path, tokens: np.ndarray, setup: Setup, args: Args) -> None:
    """A FASTA file of tokens (B, L); each header has the activities and the whole sites."""
    columns = {"predicted_activity": in_batches(partial(predict, setup.eval_oracle), tokens)}
    if not args.data_path:
        columns["true_activity"] = in_batches(true_activity, tokens)
    is_site = in_batches(find_sites, tokens) == 1
    names = list(MOTIFS)
    lines = []
    for i, sequence in enumerate(decode(tokens)):
        fields = [f"{name}={values[i]:.3f}" for name, values in columns.items()]
        sites = []
        for start, k in np.argwhere(is_site[i]):
            sites.append(f"{names[k]}:{start}-{start + len(SITES[k])}")
        fields.append(f"sites={','.join(sites)}")
        lines += [f">{i} {' '.join(fields)}", sequence]
    path.write_text("\n".join(lines) + "\n")


def report(path: pathlib.Path, before, after, setup: Setup, args: Args) -> dict:
    """Write metrics and sequences of two samples, tokens (B, L), into a run's folder `path`.

    Prints the metrics and returns them.
    """
    samples = {"pretrained": before, "finetuned": after}
    metrics = {}
    for name, tokens in samples.items():
        metrics[name] = compute_metrics(tokens, setup, args)
        write_samples(path / f"{name}.fasta", tokens, setup, args)
    (path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{'':24}{'pretrained':>12}{'finetuned':>12}")
    for name, value in metrics["pretrained"].items():
        print(f"{name:24}{value:12.3f}{metrics['finetuned'][name]:12.3f}")
    try:
        from benchmark import plot_dna  # in the repository, beside this file
    except ImportError as error:
        print(f"no pictures: {one_line(error)}")
    else:
        plot_dna.draw(path)
    return metrics


# ============================================= MAIN ==============================================
def main(args: Args) -> dict:
    """Fine-tune, write everything to runs/{run}, and return the metrics."""
    check_args(args)
    checkpoint = None
    if args.resume:
        args, checkpoint = load_checkpoint(args.resume)
    with RunFolder(args, args.weighting, checkpoint) as run:
        setup = prepare(args)
        before = draw_samples(setup.denoiser, args)
        state = create_state(args, setup.denoiser)
        if checkpoint:
            state = jax.tree.unflatten(jax.tree.structure(state), checkpoint["leaves"])
        denoiser = finetune(args, setup, state, run)
        after = draw_samples(denoiser, args)
        save_params(run.path / "denoiser.model", denoiser)
        return report(run.path, before, after, setup, args)


# ========================================== RUN FOLDER ===========================================
# Nothing below is needed to understand the method: log, checkpoints, files, errors.


class RunFolder:
    """The folder of a run, with its flags, TensorBoard log and checkpoints.

    One process writes a folder at a time. A `with` block ends in one line if the disk is full.
    """

    def __init__(self, args: Args, method: str, checkpoint: dict | None = None):
        self.args = args
        self.saved_update = checkpoint["update"] if checkpoint else None
        name = f"{method}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.path = pathlib.Path(args.resume or f"runs/{name}")
        flags = {"script": type(args).exp_name} | asdict(args)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path)
            (self.path / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
            self.writer = EventFileWriter(str(self.path))
        except OSError as error:
            what = "cannot be written, or another process is writing it"
            raise SystemExit(f"{self.path} {what}: {one_line(error)}") from None
        if checkpoint:
            # TensorBoard drops what earlier files say of this step and later ones.
            start = SessionLog(status=SessionLog.START)
            step = self.saved_update + 1
            self.writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
        device = jax.devices()[0].device_kind
        print(f"{method} on {device}: tensorboard --logdir {self.path}", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        try:
            self.writer.close()
        except OSError as close_error:
            error = error or close_error
        self.lock.close()
        if isinstance(error, OSError):
            self.stop(error)

    def log(self, update: int, scalars: dict[str, jax.Array]) -> None:
        """Write an update's scalars to TensorBoard; exits with one line if one is not finite."""
        scalars = {tag: float(value) for tag, value in scalars.items()}
        for tag, value in scalars.items():
            if not math.isfinite(value):
                self.stop(f"non-finite {tag} in update {update}")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        summary = Summary(value=values)
        self.writer.add_event(Event(wall_time=time.time(), step=update, summary=summary))
        self.writer.flush()  # the log is never behind a checkpoint; a full disk shows here

    def stop(self, reason) -> None:
        """Exit with one line that gives the reason and the last checkpoint."""
        saved = "none" if self.saved_update is None else f"update {self.saved_update}"
        line = f"{self.path} stopped: {one_line(reason)}; last checkpoint: {saved}"
        raise SystemExit(line) from None

    def save(self, state: State) -> None:
        """Write checkpoints/{update}; the one before it is kept, older ones are removed."""
        content = {"script": Args.exp_name, "args": asdict(self.args), "update": state.update}
        content["leaves"] = jax.device_get(jax.tree.leaves(state))
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        write_file(folder / str(state.update), content)
        for old_update in checkpoint_steps(folder)[:-2]:
            (folder / str(old_update)).unlink()
        self.saved_update = state.update


def progress_bar(name: str, first: int, total: int) -> tqdm:
    """range(first, total), shown as a bar; where there is no terminal, only every 30 seconds."""
    seconds = 0.1 if sys.stdout.isatty() else 30.0
    steps = range(first, total)
    return tqdm(steps, name, total, initial=first, mininterval=seconds, file=sys.stdout)


def load_checkpoint(resume: str) -> tuple[Args, dict]:
    """Flags and content of the newest checkpoint of a run; exits with one line if it has none."""
    folder = pathlib.Path(resume, "checkpoints")
    steps = checkpoint_steps(folder)
    if not steps:
        raise SystemExit(f"--resume {resume}: there is no checkpoint in {folder}")
    content = load_content(folder / str(steps[-1]))
    return replace(Args(**content["args"]), resume=resume), content


def checkpoint_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder, in ascending order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def fit_or_load(args: Args, name: str, model: Model, loss: Callable, data, settings, seed) -> Model:
    """`fit`, or what it gave an earlier run with the same arguments and the same code."""
    digest = hashlib.sha256(repr((model.network, settings, seed)).encode())
    for leaf in jax.tree.leaves((model, data)):
        digest.update(np.asarray(leaf).tobytes())
    for code in (type(model.network), loss, denoising_loss, fit):
        digest.update(inspect.getsource(code).encode())
    file_name = f"{name.replace(' ', '-')}-{digest.hexdigest()[:16]}"
    path = pathlib.Path(args.cache_path, file_name)
    if path.exists():
        return model.replace(params=load_params(path))
    model = fit(name, model, loss, data, settings, seed)
    save_params(path, model)
    return model


def load_denoiser(path: str) -> Model:
    """The denoiser of a file by `save_params`; exits with one line if it cannot be used.

    The file is unpickled: load only what you trust.
    """
    params = load_params(pathlib.Path(path))
    layers = params["params"]
    if "conv_in" not in layers:
        raise SystemExit(f"{path} cannot be used: it holds no denoiser")
    num_layers = sum(name.startswith("norm_") for name in layers)
    return Model(params, Denoiser(len(layers["conv_in"]["bias"]), num_layers))


def load_params(path: pathlib.Path) -> dict:
    """The parameters of a file by `save_params`; exits with one line if it cannot be used."""
    content = load_content(path)
    if "params" not in content:
        raise SystemExit(f"{path} cannot be used: it is a checkpoint of a run")
    return jax.device_put(content["params"])


def save_params(path: pathlib.Path, model: Model) -> None:
    """Write a model's parameters; exits with one line if it cannot be done."""
    own_path = path.with_name(f"{path.name}-{os.getpid()}")  # two runs may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(own_path, {"script": Args.exp_name, "params": jax.device_get(model.params)})
        os.replace(own_path, path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written: {one_line(error)}") from None


def load_content(path: pathlib.Path) -> dict:
    """What `write_file` wrote; exits with one line if it is damaged or another script's."""
    try:
        with gzip.open(path) as file:
            content = pickle.loads(file.read())  # read to the end, where the checksum stands
        if content["script"] != Args.exp_name:
            raise ValueError(f"it was written by {content['script']}.py")
    except Exception as error:  # of any kind: the file may hold anything
        raise SystemExit(f"{path} cannot be used: {one_line(error)}") from None
    return content


def write_file(path: pathlib.Path, content: dict) -> None:
    """Write plain data, whole or not at all: the file gets its name once it is on the disk."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        # Level 0 does not compress; gzip is here for its checksum, which `load_content` checks.
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) as gzip_file:
            pickle.dump(content, gzip_file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lock_folder(folder: pathlib.Path):
    """An open file that keeps other processes out of `folder`; OSError if one is in it."""
    file = open(folder / "lock", "w")  # noqa: SIM115 (closed with the run)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except OSError:
        file.close()
        raise
    return file


def one_line(error) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def parse_args(args_class: type = Args) -> Args:
    """The flags of the command line, on top of those of --preset."""
    preset = tyro.cli(args_class).preset
    return tyro.cli(args_class, default=args_class(preset=preset, **PRESETS[preset]))


if __name__ == "__main__":
    main(parse_args())
