"""Convert a denoiser of DRAKES (Wang et al. 2024, PyTorch Lightning) for dna_finetune.py.

    pip install -e ".[torch]"
    python baselines/convert_drakes.py last.ckpt drakes.model
    python dna_finetune.py --preset paper --denoiser-path drakes.model

DRAKES shows its network the noise level 0 at every t, so that what its features of the time add to
a layer is a constant: a bias of that layer here.
"""

import pathlib
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dna_finetune as dna  # noqa: E402 (after the path it lies on)


@dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[pathlib.Path]  # the file of DRAKES
    output: tyro.conf.Positional[pathlib.Path]  # the file to write
    trust: bool = False  # whether to read a file of more than tensors, which may run any code


def get(state: dict[str, np.ndarray], name: str) -> np.ndarray:
    """backbone.{name} as float32; ValueError if it is not there."""
    key = f"backbone.{name}"
    if key not in state:
        raise ValueError(f"the key {key} is missing")
    return np.asarray(state[key], np.float32)


def convert_layer(state: dict[str, np.ndarray], name: str, weight_name: str = "kernel") -> dict:
    """A layer's weight and bias; PyTorch's order (out, in, width) becomes (width, in, out)."""
    return {weight_name: get(state, f"{name}.weight").T, "bias": get(state, f"{name}.bias")}


def convert_head(state: dict[str, np.ndarray], name: str) -> dict:
    """A convolution of width 1 as a dense layer."""
    layer = convert_layer(state, name)
    return {"kernel": layer["kernel"][0], "bias": layer["bias"]}


def time_features(state: dict[str, np.ndarray]) -> np.ndarray:
    """DRAKES' features of the time (hidden_dim,) at the noise level 0."""
    num_frequencies = len(get(state, "time_embedder.0.W"))
    fourier = np.concatenate([np.zeros(num_frequencies), np.ones(num_frequencies)])  # sin 0, cos 0
    layer = convert_layer(state, "time_embedder.1")
    return np.maximum(fourier @ layer["kernel"] + layer["bias"], 0.0)


def convert(state: dict[str, np.ndarray]) -> dna.Model:
    """The denoiser of a state dict of arrays.

    Raises ValueError, which names what is missing or has other shapes than the network needs.
    """
    num_layers = sum(key.startswith("backbone.norms.") for key in state) // 2
    time = time_features(state)
    layers = {
        "conv_in": convert_layer(state, "linear"),
        "head_0": convert_head(state, "final_conv.0"),
        "head_1": convert_head(state, "final_conv.2"),
    }
    for i in range(num_layers):
        dense = convert_layer(state, f"time_layers.{i}.dense")
        layers[f"bias_{i}"] = np.float32(time @ dense["kernel"] + dense["bias"])
        layers[f"norm_{i}"] = convert_layer(state, f"norms.{i}", "scale")
        layers[f"conv_{i}"] = convert_layer(state, f"convs.{i}")
    network = dna.Denoiser(len(layers["conv_in"]["bias"]), num_layers)
    tokens = jnp.zeros((1, 8), jnp.uint8)
    expected = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    for name, layer in layers.items():
        shapes = jax.tree.map(np.shape, layer)
        if shapes != jax.tree.map(np.shape, expected[name]):
            raise ValueError(f"{name} has the shapes {shapes}")
    return dna.Model({"params": layers}, network)


def main(args: Args) -> None:
    """Convert; exits with one line if the file cannot be used."""
    try:
        import torch
    except ImportError:
        raise SystemExit('convert_drakes.py needs PyTorch: pip install -e ".[torch]"') from None
    try:
        saved = torch.load(args.checkpoint, map_location="cpu", weights_only=not args.trust)
        state = saved.get("state_dict", saved)
        is_tensor = {key: isinstance(value, torch.Tensor) for key, value in state.items()}
        model = convert({key: state[key].numpy() for key in state if is_tensor[key]})
    except Exception as error:  # of any kind: the file may hold anything
        hint = "" if args.trust else " (if it holds more than tensors: --trust)"
        reason = dna.one_line(error)[:200]
        raise SystemExit(f"{args.checkpoint} cannot be used: {reason}{hint}") from None
    try:
        dna.write_pickle(args.output, model.params)
    except OSError as error:
        raise SystemExit(f"{args.output} cannot be written: {dna.one_line(error)}") from None
    network = model.network
    print(f"{args.output}: {network.num_layers} layers of {network.hidden_dim} channels")


if __name__ == "__main__":
    main(tyro.cli(Args))
