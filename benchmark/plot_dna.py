"""Pictures of runs of dna_finetune.py and baselines/dna_guidance.py, into their own folders.

    python benchmark/plot_dna.py runs/neg__dna_finetune__1__1700000000

activities.png  the samples' activities before and after
learning.png    activities and weights over the updates (if the run has learned)
motifs.png      the binding sites of the best samples

A run draws them at its end if it finds this file.
"""

import pathlib
from dataclasses import dataclass

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NUM_BEST = 30  # samples in motifs.png


@dataclass(frozen=True)
class Args:
    paths: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders of runs


def read_samples(path: pathlib.Path) -> list[dict[str, str]]:
    """A dict of the fields of each header in a FASTA file, such as predicted_activity=1.5."""
    headers = [line for line in path.read_text().splitlines() if line.startswith(">")]
    samples = []
    for header in headers:
        fields = [field.split("=") for field in header.split()[1:]]
        samples.append(dict(fields))
    return samples


def draw_activities(folder: pathlib.Path) -> None:
    """Histograms of the activities by the evaluation oracle and, of generated data, the truth."""
    samples = {name: read_samples(folder / f"{name}.fasta") for name in ("pretrained", "finetuned")}
    columns = [name for name in samples["finetuned"][0] if name.endswith("activity")]
    figure = Figure((5 * len(columns), 3.5), layout="constrained")
    all_axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(all_axes, columns, strict=True):
        values = {name: [float(row[column]) for row in rows] for name, rows in samples.items()}
        bins = np.histogram_bin_edges(sum(values.values(), []), 40)  # the same, so heights compare
        for name, activities in values.items():
            axes.hist(activities, bins, alpha=0.6, label=name)
        axes.set(xlabel=column.replace("_", " "), ylabel="samples")
        axes.legend()
    figure.savefig(folder / "activities.png", dpi=120)


def draw_learning(folder: pathlib.Path) -> None:
    """Curves of activities and weights; no picture of a run without updates."""
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()["scalars"]
    if not tags:
        return
    figure = Figure((10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tag in tags:
        group, name = tag.split("/")
        is_activity = name == "reward" or name.endswith("activity")
        if not is_activity and group != "weights":
            continue
        axes = left if is_activity else right
        events = log.Scalars(tag)
        updates = [event.step for event in events]
        axes.plot(updates, [event.value for event in events], label=name.replace("_", " "))
    for axes in (left, right):
        axes.set(xlabel="update")
        axes.legend()
    left.set(ylabel="median of an update's samples")
    right.set(ylabel="weights")
    figure.savefig(folder / "learning.png", dpi=120)


def draw_motifs(folder: pathlib.Path) -> None:
    """The sites along the samples with the highest predicted activity, the best on top."""
    samples = read_samples(folder / "finetuned.fasta")
    samples.sort(key=lambda sample: -float(sample["predicted_activity"]))
    figure = Figure((10, 6), layout="constrained")
    axes = figure.subplots()
    colors = {}
    for rank, sample in enumerate(samples[:NUM_BEST]):
        sites = [site for site in sample["sites"].split(",") if site]
        for site in sites:
            name, place = site.split(":")
            start, end = map(int, place.split("-"))
            label = None if name in colors else name
            color = colors.setdefault(name, f"C{len(colors) % 10}")
            hatch = "///" if list(colors).index(name) >= 10 else None
            axes.barh(rank, end - start, left=start, color=color, hatch=hatch, label=label)
    length = len((folder / "finetuned.fasta").read_text().splitlines()[1])
    axes.set(xlabel="position", ylabel="rank by predicted activity")
    axes.set(xlim=(0, length), ylim=(NUM_BEST, -1))
    if colors:
        figure.legend(loc="outside right upper")
    figure.savefig(folder / "motifs.png", dpi=120)


def draw(folder: pathlib.Path) -> None:
    """All pictures of a run."""
    draw_activities(folder)
    draw_learning(folder)
    draw_motifs(folder)


def main(args: Args) -> None:
    """Draw the runs' pictures; exits with one line if a folder is not a finished run's."""
    if not args.paths:
        raise SystemExit("paths must name one or more folders of finished runs")
    for folder in args.paths:
        if not (folder / "finetuned.fasta").exists():
            raise SystemExit(f"{folder} has no finetuned.fasta: it is not a finished run")
        draw(folder)
        pictures = sorted(path.name for path in folder.glob("*.png"))
        print(f"{folder}: {', '.join(pictures)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
