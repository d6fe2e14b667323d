"""How the policy of a bandit moved, as a heat map of what a run of bandit.py saved.

    python benchmark/plot_bandit.py runs/escape__bandit__1__1790000000

A row for each method: the reward over the action, the density of the policy over the epochs as a
mean over the seeds (without those that diverged), and the same for one seed. The picture goes to
policy.png in the run's folder, or to --figure.
"""

import json
import pathlib
import sys
import zipfile
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bandit  # noqa: E402 (the line above finds it)

DENSITY_LIMIT = 20  # where the colours end; a policy in one bin has 40 if the action bound is 1


@dataclass(frozen=True)
class Args:
    run: Annotated[pathlib.Path, tyro.conf.Positional]  # folder of a run of bandit.py
    seed: int | None = None  # seed of the right column (none: the first)
    figure: pathlib.Path | None = None  # picture's file (none: policy.png in the folder)


def load_run(folder: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The flags and the arrays of results.npz; exits with one line if they cannot be read."""
    try:
        flags = json.loads((folder / "args.json").read_text())
        with np.load(folder / "results.npz") as file:
            arrays = dict(file)
        needed = {"problem", "seed", "num_seeds", "methods", "bins", "histogram", "regret"}
        missing = needed - flags.keys() - arrays.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{folder} is not a finished run of bandit.py: {error}") from None
    return flags, arrays


def mean_density(density: np.ndarray, regret: np.ndarray) -> np.ndarray:
    """(E + 1, bins) over the seeds that never diverged, of (S, E + 1, bins); zero if none is."""
    sound = bandit.is_sound(regret)
    if not sound.any():
        return np.zeros(density.shape[1:])
    return density[sound].mean(axis=0)


def draw(flags: dict, arrays: dict[str, np.ndarray], seed: int) -> Figure:
    """The heat map; `seed` is that of the right column."""
    problem = bandit.PROBLEMS[flags["problem"]]
    methods, bins = arrays["methods"], arrays["bins"]
    actions_per_policy = arrays["histogram"][0, 0, 0].sum()
    density = arrays["histogram"] / actions_per_policy / np.diff(bins)
    rows = len(methods)
    figure = Figure(figsize=(11, 1.1 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, width_ratios=[1, 5, 5], sharey=True, squeeze=False)
    last_epoch = density.shape[2] - 1
    image_style = {
        "extent": (-0.5, last_epoch + 0.5, bins[0], bins[-1]),
        "norm": PowerNorm(0.4, 0, DENSITY_LIMIT),  # on a linear scale only a collapsed policy shows
        "cmap": "magma",
        "aspect": "auto",
        "origin": "lower",
        "interpolation": "nearest",
    }
    grid = np.linspace(bins[0], bins[-1], 501)
    for i, (left, middle, right) in enumerate(axes):
        left.plot(bandit.reward(problem, grid), grid, color="black")
        num_sound = bandit.is_sound(arrays["regret"][i]).sum()
        left.set(ylabel=f"{methods[i]} ({num_sound} seeds)\naction a", xlim=(1.1, -0.1))
        mean = mean_density(density[i], arrays["regret"][i])
        one_seed = density[i, seed - flags["seed"]]
        for panel, values in ((middle, mean), (right, one_seed)):
            image = panel.imshow(values.T, **image_style)
            for center in problem.centers:
                panel.axhline(center, color="white", linewidth=0.6, linestyle=":")
    titles = ("reward", "mean over seeds that did not diverge", f"seed {seed}")
    labels = ("R(a)", "epoch", "epoch")
    for top, bottom, title, label in zip(axes[0], axes[-1], titles, labels, strict=True):
        top.set_title(title)
        bottom.set_xlabel(label)
    label = f"policy density (clipped at {DENSITY_LIMIT})"
    figure.colorbar(image, ax=axes, label=label, aspect=12 * rows)
    return figure


def main(args: Args) -> None:
    flags, arrays = load_run(args.run)
    first, last = flags["seed"], flags["seed"] + flags["num_seeds"] - 1
    seed = first if args.seed is None else args.seed
    if not first <= seed <= last:
        raise SystemExit(f"--seed must be one of the run's, {first} to {last}, got {seed}")
    path = args.figure or args.run / "policy.png"
    try:
        draw(flags, arrays, seed).savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--figure must be a picture's file that can be written: {error}"
        ) from None
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
