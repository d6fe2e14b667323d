"""What dna_finetune.py can do without: data files, rewards of your own, DRAKES checkpoints, and the pictures of a run.

Used by the flags --data-path, --reward and --denoiser-checkpoint (which needs PyTorch: `pip install -e ".[torch]"`).
"""

import csv
import gzip
import importlib
import itertools
import math
import os
import pathlib
import re
import sys
import zlib
from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dna_finetune import (
    CONSENSUS,
    EFFECT,
    LETTERS,
    NAMES,
    Args,
    Data,
    Denoiser,
    Setup,
    find_sites,
    in_batches,
    predict,
    true_activity,
)

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(E[-+]?\d+)?")


def decode(tokens: np.ndarray) -> list[str]:
    """N sequences of letters from tokens (N, L)."""
    return [row.tobytes().decode() for row in LETTERS[np.asarray(tokens)]]


def encode(sequences: list[str]) -> np.ndarray:
    """Tokens (N, L), uint8, of N equally long sequences of A, C, G and T."""
    letters = np.frombuffer("".join(sequences).encode(), np.uint8).reshape(len(sequences), -1)
    return np.searchsorted(LETTERS, letters).astype(np.uint8)


def split_in_halves(groups: np.ndarray) -> np.ndarray:
    """Halves (N,), bool: every other group of the sorted ones, with all its rows."""
    return np.unique(groups, return_inverse=True)[1] % 2 == 1


def read_data(args: Args) -> Data:
    """Rows of a CSV or TSV file; exits with one line that names the file and, where one is bad, the row (header: 1).

    Lower case becomes upper case. Rows of another length, with N or without a value are left out, and equal sequences
    merged into their mean; one line says how many, and where the first is. Anything else is refused.
    """
    path, left_out, rows = pathlib.Path(args.data_path), defaultdict(list), {}  # rows: sequence -> (activities, group)
    names = [name for name in (args.sequence_column, args.activity_column, args.split_column) if name]
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            reader = csv.DictReader(itertools.chain([header], file), delimiter="\t" if "\t" in header else ",")
            if missing := [name for name in names if name not in (reader.fieldnames or ())]:
                raise ValueError(f"there is no column {missing[0]}, only {', '.join(reader.fieldnames or ['none'])}")
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    raise ValueError(f"row {number} does not have {len(reader.fieldnames)} fields")
                sequence, value, *group = (row[name].strip().upper() for name in names)
                if strange := set(sequence) - set("ACGTN"):
                    raise ValueError(f"row {number} has {min(strange)!r} in its sequence")
                if not sequence or value in ("", "NA", "NAN", "NONE", "NULL") or group == [""]:
                    left_out["without a value"].append(number)
                elif "N" in sequence or len(sequence) != args.sequence_length:
                    left_out["with N" if "N" in sequence else f"not {args.sequence_length} long"].append(number)
                elif not NUMBER.fullmatch(value) or not math.isfinite(float(value)):
                    raise ValueError(f"row {number} has the activity {value}, no finite number")
                else:
                    if sequence in rows:
                        left_out["merged with an equal one"].append(number)
                    strands = min(sequence, sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1])
                    rows.setdefault(sequence, ([], (group or [strands])[0]))[0].append(float(value))
        notes = "; ".join(f"{len(at)} {why} (first: row {at[0]})" for why, at in left_out.items()) or "all rows used"
        if len(rows) < 200 or len({group for _, group in rows.values()}) < 2:
            raise ValueError(
                f"{len(rows)} sequences, of which 200 and two different --split-column are needed; {notes}"
            )
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise SystemExit(f"--data-path {path}: {error}") from None
    print(f"{path}: {len(rows)} sequences; {notes}", flush=True)
    values, groups = zip(*rows.values(), strict=True)
    return Data(encode(list(rows)), np.float32([np.mean(v) for v in values]), split_in_halves(np.array(groups)))


def load_reward(name: str):
    """The function `module:function`, made one of tokens (N, L); exits with one line if there is none."""
    sys.path.insert(0, os.getcwd())
    try:
        module, function = name.split(":")
        function = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module may fail in any way
        raise SystemExit(f"--reward {name} must be module:function: {' '.join(str(error).split())}") from None

    def reward(tokens):
        values = np.asarray(function(decode(tokens)), np.float32)
        if values.shape != (len(tokens),) or not np.isfinite(values).all():
            raise SystemExit(f"--reward {name} must return {len(tokens)} finite numbers, got shape {values.shape}")
        return values

    return reward


def key_map(num_layers: int) -> dict[tuple[str, ...], str]:
    """From the path of a parameter of `Denoiser` to its key in a DRAKES state dict."""
    modules = {"time": "time_embedder.1", "conv_in": "linear", "head_0": "final_conv.0", "head_1": "final_conv.2"}
    for i in range(num_layers):
        modules |= {f"time_{i}": f"time_layers.{i}.dense", f"conv_{i}": f"convs.{i}", f"norm_{i}": f"norms.{i}"}
    keys = {("frequencies",): "backbone.time_embedder.0.W"}
    for module, key in modules.items():
        keys[module, "scale" if module.startswith("norm") else "kernel"] = f"backbone.{key}.weight"
        keys[module, "bias"] = f"backbone.{key}.bias"
    return keys


def convert(state: dict[str, np.ndarray]) -> tuple[Denoiser, dict]:
    """Our denoiser and its parameters from a state dict of arrays, whose weights are (out, in) or (out, in, width).

    Raises ValueError, which names a key that is missing or has another shape than the network needs.
    """
    num_layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("backbone.convs.")), default=-1)
    if not num_layers or "backbone.linear.bias" not in state:
        raise ValueError("it has no keys backbone.linear.bias and backbone.convs.*")
    model, params = Denoiser(len(state["backbone.linear.bias"]), num_layers), {}
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int))["params"]
    for path, key in key_map(num_layers).items():
        if key not in state:
            raise ValueError(f"the key {key} is missing")
        value, shape = np.asarray(state[key], np.float32), shapes[path[0]]
        if path[-1] == "kernel":
            value = value.T  # of a convolution: (out, in, width) -> (width, in, out)
            value = value[0] if path[0].startswith("head") and value.ndim == 3 and len(value) == 1 else value
        for name in path[1:]:
            shape = shape[name]
        if value.shape != shape.shape:
            raise ValueError(f"the key {key} has the shape {np.shape(state[key])}")
        if len(path) == 1:
            params[path[0]] = value
        else:
            params.setdefault(path[0], {})[path[1]] = value
    return model, {"params": params}


def load_drakes(args: Args) -> tuple[Denoiser, dict]:
    """`convert` of the checkpoint file `args.denoiser_checkpoint`; exits with one line if it cannot be used."""
    try:
        import torch
    except ImportError:
        raise SystemExit('--denoiser-checkpoint needs PyTorch: pip install -e ".[torch]"') from None
    path = args.denoiser_checkpoint
    try:
        saved = torch.load(path, map_location="cpu", weights_only=not args.trust_checkpoint)
        state = saved.get("state_dict", saved)
        return convert({key: value.numpy() for key, value in state.items() if isinstance(value, torch.Tensor)})
    except Exception as error:  # what is in a file may fail in any way
        hint = "" if args.trust_checkpoint else " (if it holds more than tensors: --trust-checkpoint)"
        raise SystemExit(f"--denoiser-checkpoint {path}: {' '.join(str(error).split())[:150]}{hint}") from None


def draw_pictures(run: pathlib.Path, before: np.ndarray, after: np.ndarray, setup: Setup, args: Args) -> None:
    """activities.png, learning.png and motifs.png: distributions, curves, and the sites along the best samples."""
    functions = {"the evaluation oracle": partial(predict, setup.judge), "the truth": true_activity}
    figures = [Figure((10, size), layout="constrained") for size in (3.5, 3.5, 6)]
    for axes, (name, function) in zip(figures[0].subplots(1, 2), functions.items(), strict=True):
        for label, tokens in (("pretrained", before), ("fine-tuned", after)):
            axes.hist(in_batches(function, tokens), 40, alpha=0.6, label=label)
        axes.set(xlabel=f"activity by {name}", ylabel="samples", visible=name != "the truth" or not args.data_path)
        axes.legend()
    log = EventAccumulator(str(run)).Reload()
    for name in log.Tags()["scalars"]:  # none of a method without training
        if "activity" in name or "reward" in name or "_share" in name:
            axes = figures[1].axes or figures[1].subplots(1, 2)
            updates, values = zip(*((event.step, event.value) for event in log.Scalars(name)), strict=True)
            axes[int("weights" in name)].plot(updates, values, label=name.split("/")[1])
    for axes in figures[1].axes:
        axes.set(xlabel="update")
        axes.legend()
    axes, best = figures[2].subplots(), after[np.argsort(-in_batches(functions["the evaluation oracle"], after))[:30]]
    for k, consensus in enumerate(CONSENSUS):
        rows, starts = np.nonzero(np.asarray(find_sites(best)[0])[..., k] == 1)
        if len(rows):  # the legend would give an absent motif the first one's color
            hatch = "///" if EFFECT[k] < 0 else None
            axes.barh(rows, len(consensus), left=starts, color=f"C{k % 10}", label=NAMES[k], hatch=hatch)
    axes.set(xlabel="position", ylabel="rank by predicted activity", xlim=(0, after.shape[1]), ylim=(30, -1))
    if axes.get_legend_handles_labels()[0]:
        figures[2].legend(loc="outside right upper")
    for figure, name in zip(figures, ("activities", "learning", "motifs"), strict=True):
        figure.savefig(run / f"{name}.png", dpi=120)
