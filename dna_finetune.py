# /// script
# requires-python = ">=3.11"
# dependencies = ["flax", "jax>=0.5", "optax", "scipy", "tensorboard", "tqdm", "tyro>=0.9"]
# ///
"""GeMPO on DNA: fine-tune a masked diffusion model of regulatory sequences toward high activity.

Paper: "GeMPO: Generalized Measure Matching for Online Diffusion Reinforcement Learning", Ma, Gao,
Chen, Li and Dai, 2026, arXiv 2603.10250, section 5.3. An update (`finetune`) draws groups of n
sequences from the current model, values them by an oracle, r = oracle(x), and takes one step of Adam
down the gradient of

    sum_b w_b loss(x_b),   loss(x) = E_t 1/t sum_{i masked} -log p(x_i | x_t)

averaged over the groups and divided by the number of letters. This is equation 8 with the loss of
masked diffusion in the place of the squared error. x_b is one of the n sequences of a group, w_b its
weight, which rises with r_b: exp; linear and square, which are 0 for the worse ones; neg, which is
linear with a floor ell <= 0, so that the model is pushed away from bad sequences; or wd1 (Tang et al.
2025), a baseline.

Before that, `prepare` trains two oracles of the activity of DNA, and pretrains the denoiser on the
same sequences. Each oracle learns from one half of the data: one is the reward, the other one only
evaluates. All three wait in runs/cache for later runs with the same data, the same flags of these
models and the same code that trains them.

Usage: `python dna_finetune.py --weighting neg --ell -0.3`, or `--help`. Your own
- data: --data-path FILE.tsv.gz, and flags for its columns and the length of its sequences; without
  it, sequences are generated whose activity is known exactly
- reward: edit `compute_reward`, from tokens (B, L) to B numbers
- weights w_b: a branch in `compute_weights`, for simplex in `simplex_weights`, too, and its name in
  `Args.weighting`
- pretrained denoiser: --denoiser-path, a file runs/cache/denoiser-* or one that
  baselines/convert_drakes.py makes of a checkpoint of DRAKES (Wang et al. 2024)

A run that was stopped
- while it trained the oracles or the denoiser: give its command again. The models that were done
  are in the cache; the one that was in training begins anew
- before the first checkpoint of the fine-tuning (one every --checkpoint-frequency updates and one
  after the last): likewise, and the new run has a new folder
- after that, also in the evaluation: `--resume runs/{run}`, with the folder that was printed when the
  fine-tuning began, goes on from the last checkpoint. It ends bitwise as if it had never stopped, on
  the same machine with as many threads, as long as this file (the reward!) and the files that its
  flags name have not changed. Give it in the folder where the run was started, since --cache-path
  and other paths among its flags may be relative

A run cannot be made longer, but a new one with --denoiser-path runs/{run}/finetuned.model goes on
from its model, with a new optimizer.

Shapes: B sequences, or G groups of n; N sequences of data; L letters of a sequence; M motifs.
"""

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
from collections.abc import Callable
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
    seed: int = 1  # seed of fine-tuning and evaluation; on a CPU a run repeats exactly
    data_seed: int = 0  # seed of generated data, of the data's halves, of pretraining and oracles
    preset: Literal["small", "hour", "paper"] = "small"  # sizes; other flags override a preset's
    resume: str | None = None  # runs/{run} to go on from, with its flags; call where it was started
    checkpoint_frequency: int = 20  # updates of the fine-tuning between two checkpoints
    cache_path: str = "runs/cache"  # folder where denoiser and oracles wait for the next run
    data_path: str | None = None  # CSV or TSV file, plain or .gz, with a header; None: generated
    sequence_column: str = "seq"  # data_path: its column of sequences
    activity_column: str = "hepg2"  # data_path: its column of activities (of HepG2 cells)
    split_column: str | None = None  # data_path: rows with the same entry here are in one half
    sequence_length: int = 200  # letters of a sequence (L); longer and shorter ones are left out
    data_size: int = 40_000  # sequences to generate; without --data-path only
    denoiser_path: str | None = None  # start from it; its size and pretrain_* go unused
    hidden_dim: int = 48  # channels of the denoiser
    num_layers: int = 4  # residual layers of the denoiser
    pretrain_steps: int = 6_000  # updates of the pretraining
    pretrain_batch_size: int = 128  # sequences per update of the pretraining
    pretrain_lr: float = 4e-3  # its learning rate (Adam)
    pretrain_warmup: int = 50  # updates over which the rate rises from 0
    pretrain_decay: bool = True  # whether the rate then falls to 0, as a cosine; else it stays
    oracle_dim: int = 64  # channels of the reward oracle; the evaluating one has 1.5 times as many
    oracle_steps: int = 1_500  # updates of each oracle, on 128 sequences
    weighting: Literal["exp", "linear", "square", "neg", "wd1"] = "neg"  # weights inside a group
    normalizer: Literal["zscore", "simplex"] = "zscore"  # authors' code, or theory: sum 1
    ell: float = -0.3  # floor of neg, <= 0; zscore: in std of rewards; simplex: in units of 1/n
    exp_temperature: float = 0.1  # temperature of exp in units of the reward; zscore only
    target_kl: float = 1.5  # KL of the weights from uniform, in nats; simplex only
    num_updates: int = 200  # updates of the fine-tuning
    num_groups: int = 4  # groups per update (G)
    group_size: int = 32  # sequences per group, weighted against each other (n)
    times_per_sample: int = 4  # random times t at which an update denoises each sequence
    sample_steps: int = 40  # denoising steps of the sampler (T)
    learning_rate: float = 1e-3  # learning rate of the fine-tuning (Adam)
    eval_samples: int = 640  # sequences of an evaluation


PRESETS = {
    "small": {},  # for two CPU cores
    "hour": dict(sample_steps=128),  # for an hour of fine-tuning on a CPU core: a finer sampler
    "paper": dict(  # the authors' sizes but for the oracles', for a GPU; not run yet
        data_size=700_000,  # without --data-path
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
LOWEST = {  # of the flags that are whole numbers
    "seed": 0,
    "data_seed": 0,
    "checkpoint_frequency": 1,
    "sequence_length": 40,  # room for sites
    "data_size": 1_000,  # `compute_metrics` compares with the top 1%, ten sequences then
    "hidden_dim": 1,
    "num_layers": 1,
    "pretrain_steps": 1,
    "pretrain_batch_size": 1,
    "pretrain_warmup": 0,
    "oracle_dim": 1,
    "oracle_steps": 1,
    "num_updates": 1,
    "num_groups": 1,
    "group_size": 2,
    "times_per_sample": 1,
    "sample_steps": 1,
    "eval_samples": 2,
}
POSITIVES = ("pretrain_lr", "exp_temperature", "target_kl", "learning_rate")
NAMES = ("cache_path", "data_path", "denoiser_path")
NAMES += ("sequence_column", "activity_column", "split_column")


def require(args: Args, flag: str, is_allowed: bool, allowed: str) -> None:
    """Exit with one line that names the flag and what it may be, unless `is_allowed`."""
    if not is_allowed:
        name = flag.replace("_", "-")
        raise SystemExit(f"--{name} must be {allowed}, got {getattr(args, flag)}")


def check_args(args: Args) -> None:
    """Exit with one line if a flag is out of its range."""
    for flag, lowest in LOWEST.items():
        require(args, flag, getattr(args, flag) >= lowest, f"a whole number, at least {lowest}")
    for flag in ("seed", "data_seed"):
        require(args, flag, getattr(args, flag) < 2**32, "below 2**32")
    is_file_name = not set(args.exp_name) & set("/\\:")
    require(args, "exp_name", is_file_name, "a part of a file's name, without / \\ :")
    for flag in NAMES:  # such as --data-path "$FILE" without a FILE
        require(args, flag, getattr(args, flag) != "", "a name, or left out")
    for flag in POSITIVES:
        require(args, flag, 0 < getattr(args, flag) < math.inf, "a finite number above 0")
    require(args, "ell", -math.inf < args.ell <= 0, "finite and at most 0")
    # The default of ell cannot be told from one that is not given.
    has_no_floor = args.weighting in ("exp", "linear", "square", "wd1")
    is_allowed = args.ell == Args.ell or not has_no_floor
    without = f"left out with --weighting {args.weighting}, which has no floor"
    require(args, "ell", is_allowed, without)
    if args.normalizer == "simplex":
        log_n = math.log(args.group_size)  # the KL divergence from uniform is never above it
        below = f"below log(group_size) = {log_n:.3f}"
        require(args, "target_kl", args.target_kl < log_n, below)
        has_sum = args.weighting != "wd1"
        require(args, "weighting", has_sum, "another one, since wd1's weights sum to zero")
    is_alone = args.resume is None or args == Args(resume=args.resume)
    require(args, "resume", is_alone, "the only flag, since a run keeps its flags")


# ============================================= DATA ==============================================
LETTERS = np.frombuffer(b"ACGT", np.uint8)  # tokens 0 to 3, so that 3 - x is the complement of x
MASK = 4  # the token of a masked letter
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Data(NamedTuple):
    """Sequences with their measured activity: log2 of RNA per DNA in the paper's data."""

    tokens: np.ndarray  # (N, L) uint8
    activity: np.ndarray  # (N,) float32
    is_eval_half: np.ndarray  # (N,) bool: whether for the evaluation oracle, not the reward's


def encode(sequences: list[str]) -> np.ndarray:
    """Tokens (B, L), uint8, of B equally long sequences of A, C, G and T."""
    letters = np.frombuffer("".join(sequences).encode(), np.uint8)
    return np.searchsorted(LETTERS, letters).astype(np.uint8).reshape(len(sequences), -1)


def decode(tokens) -> list[str]:
    """B sequences of letters, of tokens (B, L)."""
    return [row.tobytes().decode() for row in LETTERS[np.asarray(tokens)]]


def in_batches(function: Callable, tokens: np.ndarray, size: int = 1024) -> np.ndarray:
    """`function` of tokens (N, L), called on batches of one size, so that it compiles once."""
    num_missing = -len(tokens) % size  # in the last batch
    padding = np.repeat(tokens[:1], num_missing, axis=0)
    padded = np.concatenate([tokens, padding])
    starts = range(0, len(padded), size)
    parts = [np.asarray(function(padded[start : start + size])) for start in starts]
    return np.concatenate(parts)[: len(tokens)]


def read_data(args: Args) -> Data:
    """The sequences of the CSV or TSV file --data-path; prints how many, and how many are left out.

    Rows with the same entry in --split-column, or without one a sequence and its reverse
    complement, are in the same half, which is drawn; rows with an empty entry there count as one
    group. Without --split-column, mutants of one sequence could come into both halves. Exits with one
    line if the file is of no use.
    """
    path = pathlib.Path(args.data_path)
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=delimiter, restval=""))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise SystemExit(f"--data-path {path}: {one_line(error)}") from None
    for column in (args.sequence_column, args.activity_column, args.split_column):
        if column is not None and rows and column not in rows[0]:
            found = list(rows[0])
            raise SystemExit(f"--data-path {path}: it has no column {column!r}, only {found}")
    sequences, activities, groups = [], [], []
    for row in rows:
        sequence = row[args.sequence_column].strip().upper()
        activity = parse_number(row[args.activity_column])
        is_dna = len(sequence) == args.sequence_length and set(sequence) <= set("ACGT")
        if is_dna and abs(activity) <= FLOAT32_MAX:  # False for NaN
            other_strand = sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1]
            either_strand = min(sequence, other_strand)  # the same whichever of the two is given
            group = either_strand if args.split_column is None else row[args.split_column]
            sequences.append(sequence)
            activities.append(activity)
            groups.append(group)
    rule = f"{args.sequence_length} letters A, C, G or T, and a number as the activity"
    print(f"{path}: {len(sequences)} of {len(rows)} rows have {rule}", flush=True)
    names, group_numbers = np.unique(groups, return_inverse=True)
    places = np.random.default_rng(args.data_seed).permutation(len(names))
    is_eval_group = places % 2 == 1  # every other one, in an order that is drawn
    is_eval_half = is_eval_group[group_numbers]
    sizes = len(sequences) - is_eval_half.sum(), is_eval_half.sum()
    if min(sizes) < 100:
        found = f"its halves (groups: {len(names)}) have {sizes[0]} and {sizes[1]} rows"
        raise SystemExit(f"--data-path {path}: 100 such rows in each half are needed; {found}")
    return Data(encode(sequences), np.float32(activities), is_eval_half)


def parse_number(text: str) -> float:
    """The number that `text` is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# =========================================== NETWORKS ============================================
class Denoiser(nn.Module):
    """Logits of p(x_0 | x_t), (..., L, 4), at tokens x_t (..., L).

    baselines/dna_guidance.py gives it one-hot tokens (..., L, 5), which have gradients.

    The network of DRAKES (Wang et al. 2024), so that their checkpoints can be converted. Theirs has
    an embedding of the time, but is told time 0 always: what that adds to layer i is bias_i here.
    """

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.nn.one_hot(x, 5)
        h = nn.relu(nn.Conv(self.hidden_dim, (9,), name="conv_in")(x))
        for i in range(self.num_layers):
            # Five equal blocks, as in DRAKES' 20 layers; of 4 layers, one each with 1, 1, 4 and 16.
            dilation = (1, 1, 4, 16, 64)[5 * i // self.num_layers]
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.hidden_dim,))
            y = nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(h + bias)
            y = nn.Conv(self.hidden_dim, (9,), kernel_dilation=dilation, name=f"conv_{i}")(y)
            h = h + nn.relu(y)
        h = nn.relu(nn.Dense(self.hidden_dim, name="head_0")(h))
        logits = nn.Dense(5, name="head_1")(h)  # 5, as in DRAKES' checkpoints
        return logits[..., :MASK]  # the mask never gets probability


class Oracle(nn.Module):
    """Activity (B,) in the data's units, at tokens (B, L).

    baselines/dna_guidance.py gives it chances of the letters (B, L, 4), which have gradients.
    """

    width: int
    mean: float = 0.0  # of the data; the network learns (activity - mean) / std
    std: float = 1.0

    @nn.compact
    def __call__(self, x, training: bool = False):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.nn.one_hot(x, 4)
        x = nn.relu(nn.Conv(self.width, (15,))(x - 0.25))  # centred
        x = nn.max_pool(x**2, (8,), (8,))  # squared, it learns motifs in half the steps
        x = x + nn.relu(nn.Conv(self.width, (5,))(x))
        x = jnp.concatenate([x.max(axis=-2), x.mean(axis=-2)], axis=-1)
        x = nn.Dropout(0.1, deterministic=not training)(x)
        x = nn.relu(nn.Dense(self.width)(x))
        return self.mean + self.std * nn.Dense(1)(x)[..., 0]


class Model(struct.PyTreeNode):
    """A network with its parameters, called like a function.

    To JAX it is the tree of its parameters: jax.grad by a model gives their gradient.
    """

    params: Any
    network: nn.Module = struct.field(pytree_node=False)

    def __call__(self, x, **options):
        return self.network.apply(self.params, x, **options)


@jax.jit
def predict(oracle: Model, tokens: jax.Array) -> jax.Array:
    """Activity (B,) of tokens (B, L) by an oracle."""
    return oracle(tokens)


# =========================================== DIFFUSION ===========================================
# The smallest time, above 0 since the loss has 1/t. It is where the authors' sampler ends. Their
# training ends at 1e-3; here it goes down as far as the sampler does.
T_MIN = 1e-5


def mask_chance(t: jax.Array) -> jax.Array:
    """(1 - 1e-3) t, the chance that a letter is masked at time t in [0, 1].

    MDLM's log-linear noise (Sahoo et al. 2024).
    """
    return (1 - 1e-3) * t


def denoising_loss(denoiser: Model, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """loss(x) (..., n), an estimate of a bound on -log p(x) in nats, of tokens (..., n, L).

    Each sequence is masked at one time. The n times (next to last axis) are stratified: one lies in
    each n-th of (0, 1), which makes their mean less noisy than n independent ones. The factor 1/t
    is MDLM's sigma'(t) / (exp(sigma) - 1) with mask_chance(t) = 1 - exp(-sigma(t)).
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
        # One uniform number u decides whether a mask is lifted and which letter is under it. With
        # the chances p of the letters, (0, 1) is cut into pieces of lengths lift_chance * p[0], ...,
        # lift_chance * p[3] and 1 - lift_chance; the number of the piece that u is in, which is the
        # number of limits below u, is the letter's token, or 4, MASK: not lifted.
        limits = lift_chance * jnp.cumsum(nn.softmax(denoiser(x)), axis=-1)
        u = jax.random.uniform(key, x.shape)
        drawn = jnp.sum(u[..., None] > limits, axis=-1, dtype=x.dtype)
        return jnp.where(x == MASK, drawn, x), None

    x = jnp.full((num_samples, length), MASK, jnp.uint8)
    steps = (lift_chances, jax.random.split(key, num_steps))
    x, _ = jax.lax.scan(denoising_step, x, steps)
    return jnp.where(x == MASK, denoiser(x).argmax(axis=-1), x).astype(jnp.uint8)


# ====================================== PRETRAINING, ORACLES =====================================
class FitSettings(NamedTuple):
    """How `fit` trains a model."""

    num_steps: int
    batch_size: int
    lr: float
    seed: int
    warmup: int = 50  # steps over which the learning rate rises to lr
    decay: bool = True  # whether it then falls to 0, as a cosine; else it stays


def make_schedule(settings: FitSettings) -> optax.Schedule:
    """The learning rate of `fit` at each step."""
    peak, warmup = settings.lr, settings.warmup
    if settings.decay:
        last_step = max(settings.num_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last_step)
    if warmup == 0:
        return optax.constant_schedule(peak)
    return optax.warmup_constant_schedule(0.0, peak, warmup)


def fit(name: str, model: Model, loss: Callable, data, settings: FitSettings) -> Model:
    """The model after steps of Adam on loss(model, batch, key), a batch being rows of `data`.

    The gradient is clipped to a norm of 1. Exits with one line if the model is not finite then.
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
        key = jax.random.fold_in(jax.random.key(settings.seed), i)
        model, opt_state, value = step(model, opt_state, data, key)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)):
        raise SystemExit(f"{name} diverged: its parameters are not finite, its loss is {value}")
    return model


def pretraining_loss(denoiser: Model, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """Denoising loss per letter of tokens (B, L)."""
    return denoising_loss(denoiser, tokens, key).mean() / tokens.shape[-1]


def oracle_loss(oracle: Model, batch: tuple, key: jax.Array) -> jax.Array:
    """Squared error, in variances of the data, on a batch of tokens (B, L) and activity (B,)."""
    tokens, activity = batch
    predicted = oracle(tokens, training=True, rngs={"dropout": key})
    return jnp.mean((predicted - activity) ** 2) / oracle.network.std**2


# The code that makes the denoiser and the oracles, as text: a part of their names in the cache, so
# that an edit of it trains them anew. It is read at import: `inspect` reads the file as it is when
# asked, and someone may edit it while they are trained.
FITTED_BY = (Denoiser, Oracle, Model, make_schedule, fit, mask_chance, denoising_loss)
FITTED_BY += (pretraining_loss, oracle_loss)
try:
    CACHED_SOURCE = "".join(inspect.getsource(part) for part in FITTED_BY)
except (OSError, TypeError):  # pasted into an interpreter: there is no file
    CACHED_SOURCE = str(time.time())  # no later run has the same, and finds a model of this one


def fit_or_load(
    args: Args, name: str, network: nn.Module, loss: Callable, data, settings: FitSettings
) -> Model:
    """A new model after `fit`, or what that gave an earlier run, from a file in --cache-path.

    The earlier run had the same network, data, settings and CACHED_SOURCE (of which an edit of a
    comment counts, too). A change of `create_model`, of a constant or of a library is not noticed:
    empty the folder then.
    """
    digest = hashlib.sha256(repr((network, settings)).encode() + CACHED_SOURCE.encode())
    for array in jax.tree.leaves(data):
        digest.update(array.tobytes())
    path = pathlib.Path(args.cache_path, f"{name}-{digest.hexdigest()[:16]}")
    if path.exists():
        return Model(jax.device_put(read_pickle(path)), network)
    model = fit(name, create_model(network, args, settings.seed), loss, data, settings)
    write_pickle(path, model.params)
    return model


def create_model(network: nn.Module, args: Args, seed: int) -> Model:
    """An untrained model."""
    tokens = jnp.zeros((1, args.sequence_length), jnp.uint8)
    return Model(jax.jit(network.init)(jax.random.key(seed), tokens), network)


def pretrain_denoiser(data: Data, args: Args) -> Model:
    """A denoiser of the data's sequences."""
    network = Denoiser(args.hidden_dim, args.num_layers)
    settings = FitSettings(
        num_steps=args.pretrain_steps,
        batch_size=args.pretrain_batch_size,
        lr=args.pretrain_lr,
        seed=args.data_seed,
        warmup=args.pretrain_warmup,
        decay=args.pretrain_decay,
    )
    return fit_or_load(args, "denoiser", network, pretraining_loss, data.tokens, settings)


def load_denoiser(path: str) -> Model:
    """The denoiser of a file; exits with one line if it holds none.

    A run's finetuned.model is such a file, too: starting from it stacks one fine-tuning on another,
    and "pretrained" in the results is then that model. It is unpickled: load only what you trust.
    """
    params = read_pickle(pathlib.Path(path))
    try:
        layers = params["params"]
        num_layers = sum(name.startswith("norm_") for name in layers)
        network = Denoiser(len(layers["conv_in"]["bias"]), num_layers)
        tokens = jnp.zeros((1, 8), jnp.uint8)
        expected = jax.eval_shape(network.init, jax.random.key(0), tokens)
        if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
            raise ValueError("its layers have other shapes")
    except Exception:  # of any kind: the file may hold anything
        raise SystemExit(f"{path} cannot be used: it holds no denoiser of this script") from None
    return Model(jax.device_put(params), network)


def train_oracle(data: Data, args: Args, for_evaluation: bool) -> Model:
    """An oracle of its half of the data. Prints how well it predicts the other half."""
    is_own_half = data.is_eval_half == for_evaluation
    tokens, activity = data.tokens[is_own_half], data.activity[is_own_half]
    name = "evaluation-oracle" if for_evaluation else "reward-oracle"
    width = 3 * args.oracle_dim // 2 if for_evaluation else args.oracle_dim
    seed = args.data_seed + int(for_evaluation)
    network = Oracle(width, float(activity.mean()), float(activity.std()) + 1e-6)
    settings = FitSettings(args.oracle_steps, batch_size=128, lr=3e-3, seed=seed)
    oracle = fit_or_load(args, name, network, oracle_loss, (tokens, activity), settings)
    predicted = in_batches(partial(predict, oracle), data.tokens[~is_own_half])
    correlation = stats.spearmanr(predicted, data.activity[~is_own_half]).statistic
    print(f"{name}: Spearman correlation {correlation:.3f} on the other half", flush=True)
    return oracle


class Setup(NamedTuple):
    """What the fine-tuning and the guidance methods of baselines/dna_guidance.py start from."""

    data: Data
    denoiser: Model  # the pretrained one (in the trial of the reward, one that is not trained yet)
    reward_oracle: Model
    eval_oracle: Model


def prepare(args: Args) -> Setup:
    """Data, pretrained denoiser and oracles."""
    # What cannot be made or read ends the run here, not after minutes of training.
    for folder in ("runs", args.cache_path):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    if args.denoiser_path is None:  # untrained as yet
        denoiser = create_model(Denoiser(args.hidden_dim, args.num_layers), args, args.data_seed)
    else:
        denoiser = load_denoiser(args.denoiser_path)
    if args.data_path is None:
        data = generate_data(args.data_size, args.sequence_length, args.data_seed)
    else:
        data = read_data(args)
    reward_oracle = train_oracle(data, args, for_evaluation=False)
    eval_oracle = train_oracle(data, args, for_evaluation=True)
    setup = Setup(data, denoiser, reward_oracle, eval_oracle)
    # A reward or weights that fail do so before the pretraining.
    checked_reward(data.tokens[:2], setup)
    compute_weights(jnp.zeros((1, args.group_size)), jnp.ones(()), args)
    if args.denoiser_path is None:
        setup = setup._replace(denoiser=pretrain_denoiser(data, args))
    return setup


# ============================================ REWARD =============================================
def compute_reward(tokens: jax.Array, setup: Setup) -> jax.Array:
    """The reward (B,) of tokens (B, L), which fine-tuning maximizes: the reward oracle's activity.

    Put your own here: any Python that returns B finite numbers (B varies from call to call); no
    gradient is taken of it. Before the pretraining it is tried on two sequences of the data, with a
    denoiser that is not trained yet. The scale of the rewards matters to exp, wd1 and simplex, whose
    lambda starts at 1.
    `decode(tokens)` gives the sequences as strings. Both oracles are still trained, on measured
    activities, and predicted_activity stays what the evaluation oracle says.
    """
    return predict(setup.reward_oracle, tokens)


def checked_reward(tokens, setup: Setup) -> jax.Array:
    """`compute_reward` of tokens (B, L); exits with one line if it gives no B finite numbers."""
    try:
        rewards = jnp.asarray(compute_reward(jnp.asarray(tokens), setup), jnp.float32)
    except OSError as error:  # which the end of this file takes for a full disk, told in one line
        raise RuntimeError("compute_reward failed") from error
    if rewards.shape != (len(tokens),) or not np.isfinite(rewards).all():
        raise SystemExit(f"compute_reward must give {len(tokens)} finite numbers")
    return rewards


# ========================================== REWEIGHTING ==========================================
# A weighting gives the samples of a group weights that rise with their rewards r. The weights are
# constants in the loss: no gradient flows through them. Two normalizers scale them.
#
#              zscore                         simplex
#     linear   clip(z, 0, 3)                  max(y, 0)
#     square   max(z, 0)^2                    max(y, 0)^2
#     neg      clip(z, ell, 3)                max(y, ell / n)
#     exp      softmax(r / exp_temperature)   exp(y)
#     wd1      softmax(r) - softmax(-r)
#
# zscore is what the authors' code for DNA does, with z = (r - mean) / std inside the group; exp and
# wd1, in spite of the name, take the rewards as they are (the paper has z in wd1). The authors cap
# linear and neg at 3, and not square.
#
# simplex is what the paper's theory (Appendix E) and the RL scripts, gempo_*.py, do: weights that
# sum to one over the group, with y = (r - nu) / lambda, and nu such that they do. Its exp is
# zscore's, with lambda in the place of exp_temperature.
#
# Which of the two: zscore for the paper's DNA results, or (not exp and wd1) for rewards whose scale
# you do not know; simplex to set how sharp the weights are (--target-kl), or for what the theory says
# of them.
#
# lambda has the unit of the rewards; a larger one makes the weights more equal. One lambda serves
# all groups, and an update moves it by one step toward a mean KL divergence from uniform weights of
# --target-kl (Appendix F). With 1.5 nats they are as far from uniform as equal weights on e^-1.5,
# 22%, of the group and 0 on all others.
#
# ell bounds a weight from below. Its unit depends on the normalizer. In zscore it is in standard
# deviations of the reward: for normal rewards and ell = -0.3 the mean weight is 0.27, so that the
# lowest is -1.1 mean weights. In simplex it is in mean weights, 1/n, as in the RL scripts: at -0.3 the
# lowest is -0.3 of them. So the same number is a milder floor in simplex, where -1.1 is as low as
# zscore's -0.3. In both, ell = 0 gives linear. The default, -0.3 (zscore), is the best in the paper;
# in our smaller runs of -0.05 to -0.5 it was -0.5 (zscore; benchmark/DNA.md).
#
# A negative weight pushes the model away from a sequence: its denoising loss is raised. The weighted
# loss then has no lower bound, and no KL term holds the model near the pretrained one; what
# restrains it is the floor on the weights, the learning rate and the small number of updates.


def compute_weights(rewards: jax.Array, simplex_lambda: jax.Array, args: Args) -> jax.Array:
    """Weights (G, n) of rewards (G, n).

    Add your own as a branch here and, for --normalizer simplex, in `simplex_weights`.
    """
    if args.normalizer == "simplex":
        return simplex_weights(rewards, simplex_lambda, args)
    mean = rewards.mean(axis=-1, keepdims=True)
    std = rewards.std(axis=-1, keepdims=True)
    z = (rewards - mean) / (std + 1e-6)
    if args.weighting == "linear":
        return jnp.clip(z, 0.0, 3.0)
    if args.weighting == "square":
        return jnp.maximum(z, 0.0) ** 2
    if args.weighting == "neg":
        return jnp.clip(z, args.ell, 3.0)
    if args.weighting == "exp":
        return nn.softmax(rewards / args.exp_temperature)
    if args.weighting == "wd1":
        return nn.softmax(rewards) - nn.softmax(-rewards)
    raise ValueError(f"compute_weights does not know {args.weighting}")


def simplex_weights(rewards: jax.Array, simplex_lambda: jax.Array, args: Args) -> jax.Array:
    """Weights (G, n) that sum to one over n. neg is linear at ell = 0."""
    if args.weighting == "exp":
        return reweight_exp(rewards, simplex_lambda)
    if args.weighting == "linear":
        return reweight_neg(rewards, simplex_lambda, 0.0)
    if args.weighting == "square":
        return reweight_square(rewards, simplex_lambda)
    if args.weighting == "neg":
        return reweight_neg(rewards, simplex_lambda, args.ell)
    raise ValueError(f"simplex_weights does not know {args.weighting}")


# The functions of simplex are the same in the RL scripts, gempo_{exp,square,neg}.py, where q are
# action values. Here q are the rewards, temp is lambda, kappa --target-kl, and N, B are n, G; their x
# and z are not those above.
#
# In solve_normalizer_*, ranks go down from the best reward, and k is the number of active samples,
# those above the floor. To test sample k, let nu be such that its weight is the floor; then all lower
# ones are on the floor, too. It is active if the weights then sum to at most one. For that, with
# x_1 >= x_2 >= ... the sorted rewards:
#
#     neg     excess_k = sum_{i<=k} (x_i - x_k)          is at most lambda (1 - ell)
#     square  excess_k = sum_{i<=k} (z_i - z_k)^2        is at most 1, with z = x / lambda
#
# excess_k rises with k, so k is the number of ranks that pass. Then the sum over the k active ones is
# solved for nu: it is linear in nu (neg) or quadratic (square; its D_k are the sums of squared
# deviations of the top k from their mean).


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
# The optimizer of simplex's log lambda. Adam moves it by about the rate, 0.03, an update: from
# lambda = 1 a hundred updates reach 0.05 to 20, which suits rewards whose std in a group is near 1.
LAMBDA_OPTIMIZER = optax.adam(0.03)


class State(NamedTuple):
    """All that fine-tuning changes: a checkpoint is one of these, and the flags.

    Everything else is made anew when a run is resumed: random keys from the seed and the number of
    the update; data, pretrained denoiser and oracles from the flags.
    """

    update: int  # updates made
    denoiser: Model
    opt_state: Any
    log_lambda: jax.Array  # logarithm of simplex's lambda; zscore has none and leaves it at 0
    lambda_opt_state: Any


def create_state(args: Args, denoiser: Model) -> State:
    """The beginning of a fine-tuning: the pretrained denoiser and lambda = 1."""
    log_lambda = jnp.zeros(())
    opt_state = make_optimizer(args).init(denoiser)
    return State(0, denoiser, opt_state, log_lambda, LAMBDA_OPTIMIZER.init(log_lambda))


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on a clipped gradient (the authors' clip).

    Adam does not see a constant scale of the weights, but the clip does. It may act in large groups:
    zscore's linear, square and neg have weights whose sum grows with n; all others' is one or less.
    """
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(args.learning_rate))


def weighted_loss(denoiser: Model, tokens, weights, key, args: Args) -> jax.Array:
    """Reweighted denoising (equation 8) per letter of tokens (G, n, L) with weights (G, n).

    A sum over the n of a group, not divided by the sum of the weights, and a mean over groups.
    """
    # (times, G, n, L): the times of `denoising_loss` are stratified over the n of a group.
    repeated = jnp.broadcast_to(tokens, (args.times_per_sample, *tokens.shape))
    nats = denoising_loss(denoiser, repeated, key).mean(axis=0)  # (G, n)
    return jnp.mean(jnp.sum(weights * nats, axis=-1)) / tokens.shape[-1]


@partial(jax.jit, static_argnames="args")
def learn(state: State, tokens: jax.Array, weights: jax.Array, key, args: Args):
    """The state after one gradient step on tokens (G, n, L) with weights (G, n); scalars to log."""
    loss, grads = jax.value_and_grad(weighted_loss)(state.denoiser, tokens, weights, key, args)
    optimizer = make_optimizer(args)  # a pair of functions without state, made anew when compiled
    updates, opt_state = optimizer.update(grads, state.opt_state)
    denoiser = optax.apply_updates(state.denoiser, updates)
    metrics = {
        "losses/weighted_loss": loss,
        "losses/gradient_norm": optax.tree.norm(grads),
        "weights/min": weights.min(),
        "weights/mean": weights.mean(),
        "weights/max": weights.max(),
        "weights/negative_share": jnp.mean(weights < 0),
    }
    state = state._replace(denoiser=denoiser, opt_state=opt_state)
    if args.normalizer == "simplex":  # one step of log lambda toward the KL budget
        metrics["charts/lambda"] = jnp.exp(state.log_lambda)
        gradient = jax.grad(temperature_loss, has_aux=True)
        grad, metrics["charts/kl"] = gradient(state.log_lambda, weights, args.target_kl)
        change, lambda_opt_state = LAMBDA_OPTIMIZER.update(grad, state.lambda_opt_state)
        log_lambda = state.log_lambda + change
        state = state._replace(log_lambda=log_lambda, lambda_opt_state=lambda_opt_state)
    return state, metrics


def split_seed(args: Args) -> jax.Array:
    """Two random keys: of the fine-tuning, and of the evaluation's samples."""
    return jax.random.split(jax.random.key(args.seed))


def finetune(args: Args, setup: Setup, state: State, run: "RunFolder") -> Model:
    """The denoiser after updates, each of which samples, rewards, weighs, steps and logs."""
    groups = args.num_groups, args.group_size  # (G, n)
    num_samples = args.num_groups * args.group_size
    finetune_key, _ = split_seed(args)
    bar = progress_bar("fine-tuning", state.update, args.num_updates)
    for update in bar:
        sample_key, loss_key = jax.random.split(jax.random.fold_in(finetune_key, update))

        # 1. Sample groups of sequences from the current model: every update has its own.
        tokens = sample_sequences(
            state.denoiser, sample_key, num_samples, args.sample_steps, args.sequence_length
        )  # (G n, L)

        # 2. Reward each sequence.
        rewards = checked_reward(tokens, setup)  # (G n,)

        # 3. Weigh the sequences of a group against each other.
        simplex_lambda = jnp.exp(state.log_lambda)
        weights = compute_weights(rewards.reshape(groups), simplex_lambda, args)  # (G, n)

        # 4. Step: one gradient of the weighted denoising loss, and one of lambda.
        grouped = tokens.reshape(*groups, -1)  # (G, n, L)
        state, metrics = learn(state, grouped, weights, loss_key, args)
        state = state._replace(update=update + 1)

        # 5. Log medians over the samples, and once in a while save.
        metrics["charts/reward"] = jnp.median(rewards)
        metrics["charts/predicted_activity"] = jnp.median(predict(setup.eval_oracle, tokens))
        if args.data_path is None:
            metrics["charts/true_activity"] = jnp.median(true_activity(tokens))
        run.log(state.update, metrics)
        bar.set_postfix({"reward": f"{metrics['charts/reward']:.2f}"}, refresh=False)
        is_last = state.update == args.num_updates
        if is_last or state.update % args.checkpoint_frequency == 0:
            run.save(state)
    return state.denoiser


# ========================================== EVALUATION ===========================================
def draw_samples(denoiser: Model, args: Args) -> np.ndarray:
    """Tokens (eval_samples, L), in batches of the fine-tuning's size: it is compiled for that."""
    size = args.num_groups * args.group_size
    _, eval_key = split_seed(args)
    keys = jax.random.split(eval_key, math.ceil(args.eval_samples / size))
    sizes = size, args.sample_steps, args.sequence_length
    samples = [sample_sequences(denoiser, key, *sizes) for key in keys]
    return np.concatenate(samples)[: args.eval_samples]


@jax.jit
def log_likelihood(denoiser: Model, key, tokens: jax.Array) -> jax.Array:
    """Estimates of a lower bound of log p(x) (B,), tokens (B, L), in nats, at 8 random t each."""
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
    """Metrics of samples, tokens (B, L).

    "The top" are the most active 0.1% of the data (1% of fewer than 100,000 sequences: two of 200).
    Motifs are the sites in MOTIFS, for data of your own, too; the paper counts those of JASPAR. Its
    accessibility accuracy, which needs one more classifier, is not here.
    """
    data = setup.data
    share = 0.001 if len(data.activity) >= 100_000 else 0.01
    top = data.tokens[data.activity >= np.quantile(data.activity, 1 - share)]
    metrics = {}

    # Median activity by the oracle that fine-tuning has not seen: what the paper's Table 3 reports.
    predicted = in_batches(partial(predict, setup.eval_oracle), tokens)
    metrics["predicted_activity"] = np.median(predicted)
    # Median of what fine-tuning maximizes. If it is an oracle's, far above predicted_activity means
    # that this oracle is being fooled.
    metrics["reward"] = np.median(checked_reward(tokens, setup))
    # Median of the truth, which only generated data have.
    if args.data_path is None:
        metrics["true_activity"] = np.median(in_batches(true_activity, tokens))
    # Whether words of three letters are as frequent as in the top, and motifs in the same order.
    metrics["kmer_pearson"] = correlate(count_kmers(tokens), count_kmers(top))
    motif_ranks = [stats.rankdata(count_motifs(x)) for x in (tokens, top)]
    metrics["motif_spearman"] = correlate(*motif_ranks)
    # How natural they are: median of estimates of the bound of log p(x), in nats, under the
    # PRETRAINED denoiser.
    likelihood = partial(log_likelihood, setup.denoiser, jax.random.key(0))
    metrics["log_likelihood_bound"] = np.median(in_batches(likelihood, tokens, size=128))
    # Share of distinct sequences.
    metrics["unique_fraction"] = len(np.unique(tokens, axis=0)) / len(tokens)
    # In how many letters two samples differ on average. Two draws from the letters of a place, with
    # shares p, differ with the chance 1 - sum p^2; B / (B - 1) leaves out a sample with itself.
    letter_shares = np.mean(tokens[..., None] == np.arange(4), axis=0)  # (L, 4)
    differing = tokens.shape[1] - np.sum(letter_shares**2)
    metrics["hamming_distance"] = differing * (len(tokens) / (len(tokens) - 1))
    # Share of G and C among the letters; the generated data have .46.
    metrics["gc"] = np.mean((tokens == 1) | (tokens == 2))
    return {name: float(value) for name, value in metrics.items()}


def report(path: pathlib.Path, before, after, setup: Setup, args: Args) -> dict:
    """Write metrics and sequences, of tokens (B, L) before and after, into a run's folder `path`.

    Prints the metrics and returns them. Draws pictures if benchmark/plot_dna.py is there.
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
        from benchmark import plot_dna
    except ImportError as error:  # this file was copied elsewhere, or there is no matplotlib
        print(f"no pictures: {error}")
        return metrics
    plot_dna.draw(path)
    return metrics


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
# median, 99% and 99.9% quantiles, 0.1, 4.9 and 6.1, are near those of the paper's data (.2, 4.6,
# 6.2).
SILENT, RISE, HALF_SATURATION, POWER = -1.0, 12.8, 6.5, 2.37
SITE_SATURATION = 1.5  # how fast further sites of a motif stop counting
MEASUREMENT_STD = 0.3


def site_filters() -> np.ndarray:
    """Filters (WIDTH, 4, 2, M), which count a site's letters on either strand; N counts nothing."""
    filters = np.zeros((WIDTH, 4, 2, len(SITES)), np.float32)
    for k, site in enumerate(SITES):
        for i, letter in enumerate(site):
            if letter != "N":
                tokens = np.array(IUPAC[letter])
                filters[i, tokens, 0, k] = 1
                filters[len(site) - 1 - i, 3 - tokens, 1, k] = 1  # its reverse complement
    return filters


@jax.jit
def find_sites(tokens: jax.Array) -> jax.Array:
    """Strength (B, L, M) of the site of each motif that starts at each position of tokens (B, L).

    1 for a site, WEAK_SITE with one letter of at least 8 wrong, else 0; the better strand counts.
    """
    filters = site_filters()
    num_letters = filters[:, :, 0].any(axis=1).sum(axis=0)  # (M,), without N
    x = jax.nn.one_hot(tokens, 4)
    x = jnp.pad(x, ((0, 0), (0, WIDTH - 1), (0, 0)))  # a site may start at any position
    layout = ("NWC", "WIO", "NWC")
    matches = jax.lax.conv_general_dilated(
        x, filters.reshape(WIDTH, 4, -1), (1,), "VALID", dimension_numbers=layout
    )
    matches = matches.reshape(*tokens.shape, 2, -1)  # (B, L, strand, M)
    missing = num_letters - matches.max(axis=-2)  # (B, L, M)
    is_weak = (missing == 1) & (num_letters >= 8)
    strength = jnp.where(missing == 0, 1.0, jnp.where(is_weak, WEAK_SITE, 0.0))
    ends = jnp.arange(tokens.shape[1])[:, None] + np.array([len(site) for site in SITES])
    return jnp.where(ends <= tokens.shape[1], strength, 0.0)  # none hangs over the end


@jax.jit
def true_activity(tokens: jax.Array) -> jax.Array:
    """The activity (B,) of tokens (B, L) in log2 units, without the error of measurement.

    A Hill function of activation / (1 + repression), both sums of effects e_m (1 - exp(-1.5 o_m)),
    o_m the sum of the strengths of a motif's sites: the second site of a motif adds less than the
    first.
    """
    bound = 1 - jnp.exp(-SITE_SATURATION * find_sites(tokens).sum(axis=1))  # (B, M)
    activation = bound @ np.maximum(EFFECTS, 0)
    repression = bound @ np.maximum(-EFFECTS, 0)
    x = (activation / (1 + repression)) ** POWER
    return SILENT + RISE * x / (HALF_SATURATION**POWER + x)


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
    return Data(tokens, activity, is_eval_half=rng.random(size) < 0.5)


# ============================================= MAIN ==============================================
def main(args: Args) -> dict:
    """Fine-tune, write everything to runs/{run}, and return the metrics."""
    check_args(args)
    saved_leaves = None
    if args.resume is not None:
        args, saved_leaves = load_checkpoint(args.resume)
    setup = prepare(args)
    state = create_state(args, setup.denoiser)
    if saved_leaves is not None:
        leaves, structure = jax.tree.flatten(state)
        if [np.shape(leaf) for leaf in saved_leaves] != [np.shape(leaf) for leaf in leaves]:
            raise SystemExit(f"{args.resume}/checkpoint cannot be used: it is of another denoiser")
        state = jax.tree.unflatten(structure, saved_leaves)
    run = RunFolder(args, args.weighting, state.update)
    before = draw_samples(setup.denoiser, args)  # from the same random numbers as those after
    denoiser = finetune(args, setup, state, run)
    write_pickle(run.path / "finetuned.model", denoiser.params)
    after = draw_samples(denoiser, args)
    return report(run.path, before, after, setup, args)


# ========================================== RUN FOLDER ===========================================
# Nothing below is needed to understand the method: log, checkpoints, files, errors.


class RunFolder:
    """The folder of a run, with its flags, TensorBoard log and last checkpoint."""

    def __init__(self, args: Args, method: str, update: int = 0):
        """`method` begins the folder's name; the log goes on after `update`."""
        self.args = args
        if args.resume is None:
            self.path = create_folder(f"{method}__{args.exp_name}__{args.seed}")
        else:
            self.path = pathlib.Path(args.resume)
        (self.path / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        self.writer = EventFileWriter(str(self.path))
        # TensorBoard drops what a run that was stopped has logged of this step and later ones.
        start = SessionLog(status=SessionLog.START)
        self.writer.add_event(Event(wall_time=time.time(), step=update + 1, session_log=start))
        device = jax.devices()[0].device_kind
        print(f"{method} on {device}: tensorboard --logdir {self.path}", flush=True)

    def log(self, update: int, scalars: dict[str, jax.Array]) -> None:
        """Write an update's scalars to TensorBoard; exits with one line if one is not finite."""
        scalars = {tag: float(value) for tag, value in scalars.items()}
        for tag, value in scalars.items():
            if not math.isfinite(value):
                raise SystemExit(f"{self.path} stopped: {tag} is {value} in update {update}")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        summary = Summary(value=values)
        self.writer.add_event(Event(wall_time=time.time(), step=update, summary=summary))
        self.writer.flush()  # the log is never behind a checkpoint

    def save(self, state: State) -> None:
        """Write the file `checkpoint`, in the place of the one before it."""
        content = {"args": asdict(self.args), "leaves": jax.tree.leaves(state)}
        write_pickle(self.path / "checkpoint", content)


def create_folder(name: str) -> pathlib.Path:
    """A new folder runs/{name}__{seconds since 1970}; the next second if another run has taken it."""
    pathlib.Path("runs").mkdir(exist_ok=True)
    second = int(time.time())
    while True:
        path = pathlib.Path(f"runs/{name}__{second}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            second += 1


def load_checkpoint(resume: str) -> tuple[Args, list]:
    """Flags and leaves of the `State` of a run's checkpoint; exits with one line if it has none."""
    path = pathlib.Path(resume, "checkpoint")
    content = read_pickle(path)
    try:
        return replace(Args(**content["args"]), resume=resume), content["leaves"]
    except (KeyError, TypeError) as error:  # such as a flag of another version
        raise SystemExit(f"{path} is no checkpoint of this script: {one_line(error)}") from None


def write_samples(path: pathlib.Path, tokens: np.ndarray, setup: Setup, args: Args) -> None:
    """A FASTA file of tokens (B, L); each header has the activities and the whole sites.

    A site from letter `start` to before letter `end`, counted from 0, is name:start-end.
    """
    predicted = in_batches(partial(predict, setup.eval_oracle), tokens)
    is_site = in_batches(find_sites, tokens) == 1  # (B, L, M)
    names = list(MOTIFS)
    if args.data_path is None:
        truth = in_batches(true_activity, tokens)
    lines = []
    for i, sequence in enumerate(decode(tokens)):
        header = f">{i} predicted_activity={predicted[i]:.3f}"
        if args.data_path is None:
            header += f" true_activity={truth[i]:.3f}"
        places = np.argwhere(is_site[i])
        sites = [f"{names[k]}:{start}-{start + len(SITES[k])}" for start, k in places]
        lines += [f"{header} sites={','.join(sites)}", sequence]
    path.write_text("\n".join(lines) + "\n")


def progress_bar(name: str, first: int, total: int) -> tqdm:
    """range(first, total), shown as a bar; where there is no terminal, only every 30 seconds."""
    seconds = 0.1 if sys.stdout.isatty() else 30.0
    steps = range(first, total)
    return tqdm(steps, name, total, initial=first, mininterval=seconds, file=sys.stdout)


def write_pickle(path: pathlib.Path, content) -> None:
    """Write a tree of plain data and arrays, whole or not at all: it is renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same file
    try:
        with open(temporary, "wb") as file:
            pickle.dump(jax.device_get(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if the disk was full


def read_pickle(path: pathlib.Path) -> Any:
    """What `write_pickle` wrote; exits with one line if the file cannot be used."""
    try:
        return pickle.loads(path.read_bytes())
    except Exception as error:  # of any kind: the file may hold anything
        raise SystemExit(f"{path} cannot be used: {one_line(error)}") from None


def one_line(error) -> str:
    """An error's text without line breaks; its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_args(args_class: type = Args) -> Args:
    """The flags of the command line, on top of those of --preset.

    baselines/dna_guidance.py imports this file, and has a class of flags of its own.
    """
    # Parsed twice: for --preset, and with its sizes as the defaults.
    known, _ = tyro.cli(args_class, add_help=False, return_unknown_args=True)
    # `check_args` cannot tell a flag with its default value from one that is not given.
    flags = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    is_alone = flags <= {"--resume"} or known.resume is None
    require(known, "resume", is_alone, "the only flag, since a run keeps its flags")
    preset = known.preset
    return tyro.cli(args_class, default=args_class(preset=preset, **PRESETS[preset]))


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on if the run's folder has a file `checkpoint`")
        sys.stdout.flush()
        os._exit(130)  # JAX, interrupted in a call, often crashes while Python closes down
    except OSError as error:  # a folder that cannot be written, or a full disk
        raise SystemExit(one_line(error)) from None
