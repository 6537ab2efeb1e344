"""What a run leaves to look at: metrics.jsonl and learning_curve.png."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.figure import png
from train.files import write_whole
from train.interval import interval
from train.refusal import Refusal

OVERFITTING = 0.05  # between training and validation images, beyond what chance explains
Log = Callable[[dict[str, Any]], None]  # takes a finished epoch's row


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """One JSON object per finished epoch."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in history).encode())


@contextmanager
def event_files(run_dir: Path, num_done: int) -> Iterator[Log]:
    """TensorBoard's own writer into tensorboard/ of the run; what lies there beyond epoch `num_done` is void."""
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
    """Training images against validation images in words."""
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


def draw_learning_curve(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Loss and error over epochs, training and validation."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, colour in (("train", "tab:blue"), ("validation", "tab:orange")):
        if all(row[f"{part}_loss"] is not None for row in history):
            left.plot(epochs, [row[f"{part}_loss"] for row in history], color=colour, label=part)
            error = [100 * (1 - row[f"{part}_accuracy"]) for row in history]
            right.plot(epochs, error, color=colour, label=part)
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    right.set(xlabel="epoch", ylabel="error, %", yscale="symlog", ylim=(0, None))
    left.legend()
    figure.suptitle(title)
    write_whole(path, png(figure))


def describe_row(row: dict[str, Any], num_epochs: int, left_s: float) -> str:
    """One line per epoch."""
    validation = row["validation_accuracy"]
    return (
        f"epoch {row['epoch']:3d}/{num_epochs}  loss {row['train_loss']:.4f}  "
        f"train {100 * row['train_accuracy']:.2f} %  "
        + (f"validation {100 * validation:.2f} %  " if validation is not None else "")
        + f"lr {row['lr']:.4f}  {row['images_per_s']:.0f} images/s  {left_s:.0f} s left"
    )
