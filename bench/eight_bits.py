"""python bench/eight_bits.py: the error of eight bits with δ in the filters and beside them, while a net trains."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.spec import Published

if TYPE_CHECKING:
    from torch import nn

    from train.config import Settings

# Where training starts: the paper's a and b with the deviation of W of the authors' code, and our recipe's.
STARTS: dict[str, dict[str, Any]] = {
    "a = 5": {"a0": 5.0, "b0": 1e-3, "w_std": 0.1},
    "a = 1": {"a0": 1.0, "b0": 0.1, "w_std": 0.03},
}
LABELS = {"concat": "δ in the filters", "skip": "δ beside them"}
EXAMPLES = (
    "python bench/eight_bits.py                             # half an hour on one core",
    "python bench/eight_bits.py --dataset digits --epochs 3 --images 200 --out /tmp/figures",
)


@dataclass(frozen=True)
class EightBitsConfig:
    dataset: Annotated[Published, "data set to train on"] = "fashion-mnist"
    data_dir: Annotated[Path | None, "folder of the data set"] = None
    family: Annotated[Literal["cifar", "pooled"], "pooled trains four times faster"] = "pooled"
    depth: Annotated[int, "6N + 4 layers"] = 16
    width: Annotated[float, "width factor k of Table 1"] = 1.0
    epochs: Annotated[int, "passes over the training images"] = 10
    images: Annotated[int, "held-out images to measure on; a quarter of them set the ranges"] = 2000
    out: Annotated[Path, "folder for the figure and the numbers"] = Path("docs/experiments")


def command(config: EightBitsConfig) -> int:
    """Train from a = 5 and from a = 1; after every epoch fold, quantise both ways and compare with float32."""
    from common.progress import make_console, progress
    from train.config import TrainConfig
    from train.data import datasets
    from train.experiments.lab import run_trial, write_results

    dataset, rows, accuracies = datasets.load(config.dataset, data_dir=config.data_dir), [], {}
    with progress(make_console(), "epochs", len(STARTS) * (config.epochs + 1)) as advance:
        for start, values in STARTS.items():
            shape = {name: getattr(config, name) for name in ("dataset", "family", "depth", "width", "epochs")}
            settings = TrainConfig(**shape, lr=0.1, precision="fp32", **values).resolved()
            epochs = count()

            def observe(
                net: "nn.Sequential",
                start: str = start,
                settings: "Settings" = settings,
                epochs: Iterator[int] = epochs,
            ) -> None:
                if epoch := next(epochs):  # before the first step batch normalisation has no statistics
                    rows.append({"start": start, "epoch": epoch, **_measure(net, settings, dataset, config.images)})
                    print(_line(rows[-1]))
                advance(note=start)

            accuracies[start] = run_trial(settings, dataset, observe=observe).test_accuracy
    figure = _draw(rows, f"{config.dataset}, {config.family} {config.depth}-{config.width:g}")
    record = {"settings": asdict(config), "test_accuracy": accuracies, "rows": rows}
    write_results(config.out, "eight-bits", figure, record)
    return 0


def _measure(net: "nn.Sequential", settings: "Settings", dataset: Any, num_images: int) -> dict[str, Any]:
    """The best ranges of each lowering on held-out images, as a row of the figure."""
    import numpy as np

    from export.eight_bits.quantize import quantize
    from fold.plain import fold_net
    from train.data import datasets
    from train.layers import DiracConv2d

    _, held = datasets.hold_out(dataset.train, settings.validation, seed=0)
    pixels = held.first(num_images)
    observed, chosen_by = pixels[: len(pixels) // 4], pixels[len(pixels) // 4 :]
    spec = settings.spec(dataset.info.image, dataset.info.labels)
    options = {"lowerings": tuple(LABELS), "observed": observed, "chosen_by": chosen_by}
    found = quantize(fold_net(net.eval()).float(), spec, precision="int8", target="onnxruntime", **options)
    best = {candidate.lowering: candidate for candidate in reversed(found.candidates)}
    scales = [layer.a.item() for layer in net.modules() if isinstance(layer, DiracConv2d)]
    measured = {
        name: {"ranges": row.method, "relative_error": row.relative_error, "top1_agreement": row.top1_agreement}
        for name, row in best.items()
    }
    return {"a": {"min": min(scales), "mean": float(np.mean(scales)), "max": max(scales)}, **measured}


def _line(row: dict[str, Any]) -> str:
    parts = [
        f"{label} {100 * row[lowering]['relative_error']:.2f} % ({100 * row[lowering]['top1_agreement']:.2f} % same)"
        for lowering, label in LABELS.items()
    ]
    return (
        f"from {row['start']}, epoch {row['epoch']:2d}, mean a {row['a']['mean']:.2f}: logit error {', '.join(parts)}"
    )


def _draw(rows: list[dict[str, Any]], title: str) -> Any:
    from train.experiments.lab import new_figure

    figure, (scales, errors, agreements) = new_figure(3)
    styles = dict(zip(STARTS, ("-", "--"), strict=True))
    colours = dict(zip(LABELS, ("tab:red", "tab:blue"), strict=True))
    for start, style in styles.items():
        of_it = [row for row in rows if row["start"] == start]
        epochs = [row["epoch"] for row in of_it]
        scales.plot(epochs, [row["a"]["mean"] for row in of_it], style, color="black", label=f"from {start}")
        scales.fill_between(
            epochs, *([row["a"][end] for row in of_it] for end in ("min", "max")), color="black", alpha=0.12, lw=0
        )
        for lowering, label in LABELS.items():
            for axes, key in ((errors, "relative_error"), (agreements, "top1_agreement")):
                values = [100 * row[lowering][key] for row in of_it]
                axes.plot(epochs, values, style, color=colours[lowering], label=f"{label}, from {start}")
    scales.set(xlabel="epoch", title="a: mean, least and largest of all layers", ylim=(0, None))
    errors.set(xlabel="epoch", title="int8 logit error, %", ylim=(0, None))
    agreements.set(xlabel="epoch", title="images that keep their class, %")
    for axes in (scales, errors):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, EightBitsConfig, examples=EXAMPLES))
