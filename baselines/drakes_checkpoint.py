"""Loads a denoiser of DRAKES (Wang et al. 2024), a PyTorch Lightning checkpoint, into dna_finetune.py's network.

Usage: `python dna_finetune.py --denoiser-checkpoint FILE --preset paper`. Needs PyTorch: `pip install -e ".[torch]"`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dna_finetune import Args, Denoiser


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
