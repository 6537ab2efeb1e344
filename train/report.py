"""What a run leaves to look at: metrics.jsonl and learning_curve.png."""

import json
from pathlib import Path
from typing import Any

from train.figure import png
from train.files import write_whole


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """One JSON object per finished epoch."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in history).encode())


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
