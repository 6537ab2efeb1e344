"""What bench/training.py recorded, as a page of Markdown."""

import statistics
from typing import Any

from bench.page import machine_table, spread, table

GOALS = (0.92, 0.94, 0.95)


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    parts = [
        "# Training",
        f"Written by `{record['command']}`. A step is forward, backward and optimizer of the project's own trainer on "
        f"{record['batch_size']} random images in memory. Figures are medians of {record['rounds']} rounds that "
        "alternate between all forms, and in brackets the smallest and the largest round.",
        machine_table(record["machine"]),
        *_steps(record["steps"]),
        *_memory(record["memory"]),
        *_depths(record["depths"]),
        *_processes(record["processes"]),
        *_runs(record["runs"]),
    ]
    return "\n\n".join(parts) + "\n"


def _steps(nets: list[dict[str, Any]]) -> list[str]:
    parts = [
        "## What the Dirac form costs",
        "`ordinary` is the same net with `nn.Conv2d`; `Dirac` is `train/layers.py`; `Dirac, reference` builds the "
        "same weight as the authors' release does: `a` and `b` expanded to a value per filter, a dense δ, filters "
        "normalised as the rows of a matrix. The last column is the median of the rounds' ratios.",
    ]
    for net in nets:
        about = net["net"]
        rows = [
            [
                row["precision"],
                row["form"],
                spread([1000 * row["batch_size"] / ms for ms in row["round_ms"]], ",.0f"),
                f"{row['median_ms']:.1f}",
                f"{100 * row['share_of_ordinary']:.1f} %",
            ]
            for row in net["rows"]
        ]
        parts += [
            f"### {about['name']}, {about['images']} images, {about['parameters']:,} parameters",
            table(["precision", "form", "images/s", "step, ms", "speed of ordinary"], rows),
            _weights(net),
        ]
    return parts


def _weights(net: dict[str, Any]) -> str:
    """How much of a step goes into Ŵ."""
    ours, reference = (row["round_ms"] for row in net["weights"])
    steps = {row["precision"]: row["median_ms"] for row in net["rows"] if row["form"] == "Dirac"}
    built = statistics.median(ours)
    shares = " and ".join(f"{100 * built / step:.1f} % of a step in {precision}" for precision, step in steps.items())
    return (
        f"All filters Ŵ and the gradients of a, b and W alone: {spread(ours)} ms, which is {shares}; "
        f"as the reference builds them {spread(reference)} ms."
    )


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [row["precision"], row["form"], *(_mb(row[key]) for key in ("imported_bytes", "own_bytes", "peak_bytes"))]
        for row in rows
    ]
    return [
        "## Memory",
        "The smaller net, each form in a process of its own: resident memory once everything is imported, what four "
        "steps add to it at their peak, and both together.",
        table(["precision", "form", "imports, MB", "steps, MB", "together, MB"], lines),
    ]


def _depths(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [str(row["depth"]), spread(row["round_ms"]), spread([ms / row["depth"] for ms in row["round_ms"]], ".2f")]
        for row in rows
    ]
    return [
        "## Depth",
        "Width 1/4, 8x8 images, fp32:",
        table(["layers", "step, ms", "ms per layer"], lines),
    ]


def _processes(rows: list[dict[str, Any]]) -> list[str]:
    lines = [[str(row["processes"]), spread(row["round_ms"]), f"{row['images_per_s']:,.0f}"] for row in rows]
    return [
        "## Processes",
        "The cores as threads of one process, or as processes of one thread that share every batch with gloo "
        "(`torchrun --nproc-per-node 2`). The smaller net in fp32, runs that alternate, each started afresh:",
        table(["processes", "step, ms", "images/s"], lines),
    ]


def _runs(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    parts = [
        "## Time to an accuracy",
        "Recorded runs on Fashion-MNIST, not made by this benchmark. Accuracy is that on images held out from the "
        "training set, after each epoch; time is that of the training steps. The test images were read once, at the "
        "end. How many cores each run had is said in [results.md](../results.md); images/s show it.",
    ]
    for run in runs:
        epochs = run["epochs"]
        reached = [(goal, _first(epochs, goal)) for goal in GOALS]
        rows = [
            [f"{100 * goal:.0f} %", *([str(row["epoch"]), f"{row['elapsed_s']:,.0f} s"] if row else ["never", ""])]
            for goal, row in reached
        ]
        speeds = [row["images_per_s"] for row in epochs]
        parts += [
            f"`{run['command']}` ({run['name']}, {run['parameters']:,} parameters): test accuracy "
            f"{100 * run['test_accuracy']:.2f} % after {len(epochs)} epochs and {epochs[-1]['elapsed_s']:,.0f} s, "
            f"at {spread(speeds, '.0f')} images/s.",
            table(["held-out accuracy", "first after epoch", "time"], rows),
        ]
    return parts


def _first(epochs: list[dict[str, Any]], goal: float) -> dict[str, Any] | None:
    return next((row for row in epochs if (row["validation_accuracy"] or 0) >= goal), None)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f}"
