"""The output of a run: its images as a table, a line per epoch, TensorBoard's event files, the learning curve."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from common.figure import png
from common.files import write_whole
from common.interval import interval
from common.progress import printable
from common.refusal import Refusal
from train.data.datasets import Dataset
from train.data.folder import PARTS, describe_left_out

MAX_CLASSES = 50  # that the survey lists; beyond, the smallest
OVERFITTING = 0.05  # between training and validation images, beyond what chance explains


def print_survey(console: Console, dataset: Dataset) -> None:
    """Images of each class in each part, their sizes, and what was left out and why."""
    labels = [*map(printable, dataset.info.labels)]
    counts = np.array([np.bincount(getattr(dataset, part).targets, minlength=len(labels)) for part in PARTS])
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
        console.print(f"sizes from {first[0]}x{first[1]} to {last[0]}x{last[1]} pixels")
    if untested := [label for label, count in zip(labels, counts[2], strict=True) if not count]:
        console.print(f"no image to test on: {', '.join(untested[:10])}")
    for line in describe_left_out(dataset.left_out):
        console.print(line)


@contextmanager
def event_files(run_dir: Path, num_done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes rows of finished epochs into tensorboard/ of the run; events there of later epochs than `num_done` go."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Refusal("--tensorboard needs its package: pip install tensorboard") from error

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch" and value is not None:
                part, _, what = name.rpartition("_") if name.endswith(("_loss", "_accuracy")) else (name, "", "run")
                writer.add_scalar(f"{what}/{part}", value, row["epoch"])
        writer.flush()

    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=num_done + 1) as writer:
        yield log


def describe_fit(train: float, num_train: int, held: float, num_held: int) -> str:
    """The accuracy on training and validation images, and whether the net overfits, as a sentence."""
    figures = (
        f"{100 * train:.1f} % of {num_train} training images and {100 * held:.1f} % of {num_held} held out are right"
    )
    apart = interval(train * num_train, num_train)[0] > interval(held * num_held, num_held)[1]
    if apart and train - held > OVERFITTING:
        return (
            f"{figures}: the net overfits. More images help most; then --init, --erase 0.25, --mixup 0.2, --cutmix 1, "
            "a larger --weight-decay or a smaller --width"
        )
    return f"{figures}: no sign of overfitting"


def draw_learning_curve(path: Path, history: list[dict[str, Any]], title: str, *, smoothing: float = 0.0) -> None:
    """Loss and error over epochs, training and validation; without the loss where it is not recorded."""
    from matplotlib.figure import Figure

    smoothed = f", labels smoothed by {smoothing:g}" if smoothing else ""
    panels = [what for what in ("loss", "accuracy") if f"train_{what}" in history[0]]
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    for what, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for part, colour, label in (
            ("train", "tab:blue", f"training, augmented{smoothed if what == 'loss' else ''}"),
            ("validation", "tab:orange", "held out, as they are"),
        ):
            values = [row[f"{part}_{what}"] for row in history]
            if None not in values:
                shown = values if what == "loss" else [100 * (1 - value) for value in values]
                axes.plot([row["epoch"] for row in history], shown, ".-", color=colour, label=label)
        axes.set(xlabel="epoch", ylabel="cross-entropy" if what == "loss" else "error, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain_log_ticks(axes)
        axes.legend()
    figure.suptitle(title)
    write_whole(path, png(figure))


def _plain_log_ticks(axes: Any) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, written out; a linear one where a value is zero."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if min(min(line.get_ydata()) for line in axes.lines) <= 0:
        axes.set_ylim(0, None)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()


def describe_row(row: dict[str, Any], num_epochs: int, left_s: float) -> str:
    """One line per epoch."""
    validation = row["validation_accuracy"]
    return (
        f"epoch {row['epoch']:3d}/{num_epochs}  loss {row['train_loss']:.4f}  "
        f"train {100 * row['train_accuracy']:.2f} %  "
        + (f"validation {100 * validation:.2f} %  " if validation is not None else "")
        + f"lr {row['lr']:.4f}  {row['images_per_s']:.0f} images/s  {left_s:.0f} s left"
    )
