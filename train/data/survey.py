"""The summary of a folder of photographs, printed before training."""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from train.data.datasets import Dataset
from train.data.folder import LeftOut
from train.data.split import PARTS

MAX_CLASSES = 50  # beyond, the smallest are listed


def print_survey(console: Console, dataset: Dataset) -> None:
    """Images of each class in each part, their sizes, and what was left out and why."""
    labels = dataset.info.labels
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    counts = np.array([np.bincount(parts[part].targets, minlength=len(labels)) for part in PARTS])
    shown = np.sort(counts.sum(0).argsort(kind="stable")[:MAX_CLASSES])
    width = max(len(label) for label in labels)
    console.print(f"{'class':{width}}  " + "  ".join(f"{part:>10}" for part in PARTS))
    for index in shown:
        console.print(f"{labels[index]:{width}}  " + "  ".join(f"{count:10,}" for count in counts[:, index]))
    if len(shown) < len(labels):
        console.print(f"these are the {len(shown)} smallest of {len(labels)} classes")
    console.print(f"{'all':{width}}  " + "  ".join(f"{count:10,}" for count in counts.sum(1)))
    if dataset.sizes:
        first, last = min(dataset.sizes, key=math.prod), max(dataset.sizes, key=math.prod)
        console.print(f"sizes from {_size(first)} to {_size(last)} pixels")
    if untested := [label for label, count in zip(labels, counts[2], strict=True) if not count]:
        console.print(f"no image to test on: {', '.join(untested[:10])}")
    for line in describe_left_out(dataset.left_out):
        console.print(line)


def describe_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason, with how many and the first."""
    reasons = dict.fromkeys(stranger.why for stranger in left_out)
    by_reason = {why: [stranger.path for stranger in left_out if stranger.why == why] for why in reasons}
    return [f"left out, {why}: {len(paths)}, first {paths[0]}" for why, paths in by_reason.items()]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
