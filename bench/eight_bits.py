"""python bench/eight_bits.py: the error of eight bits with δ in the filters and beside them, while a net trains."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.spec import Published

if TYPE_CHECKING:
    from torch import nn

    from train.config import Settings

# Initial values: the paper's a and b with the standard deviation of W in the authors' code, and our recipe's.
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


def command(config: EightBitsConfig) -> None:
    """Train from a = 5 and from a = 1; after every epoch fold, quantise both ways and compare with float32."""
    from copy import deepcopy

    from common.progress import make_console, progress
    from train.config import TrainConfig
    from train.data import datasets
    from train.experiments.lab import run_trial, write_results

    dataset, rows, accuracies = datasets.load(config.dataset, data_dir=config.data_dir), [], {}
    shape = {name: getattr(config, name) for name in ("dataset", "family", "depth", "width", "epochs")}
    with progress(make_console(), "epochs", len(STARTS) * config.epochs) as advance:
        for start, values in STARTS.items():
            settings = TrainConfig(**shape, lr=0.1, precision="fp32", **values).resolved()
            trial = run_trial(settings, dataset, observe=deepcopy)
            accuracies[start] = trial.test_accuracy
            _, *nets = trial.observed  # before the first step batch normalisation has no statistics
            for epoch, net in enumerate(nets, start=1):
                rows.append({"start": start, "epoch": epoch, **_measure(net, settings, dataset, config.images)})
                errors = [f"{label} {rows[-1][name]['relative_error']:.2%}" for name, label in LABELS.items()]
                advance(note=f"from {start}, epoch {epoch}: logit error {', '.join(errors)}")
    figure = _draw(rows, f"{config.dataset}, {config.family} {config.depth}-{config.width:g}")
    record = {"settings": asdict(config), "test_accuracy": accuracies, "rows": rows}
    write_results(config.out, "eight-bits", figure, record)


def _measure(net: "nn.Sequential", settings: "Settings", dataset: Any, num_images: int) -> dict[str, Any]:
    """The best ranges of each lowering on held-out images, as a row of the figure."""
    import numpy as np

    from export.eight_bits.quantize import quantize
    from fold.graph import fold
    from train.data import datasets
    from train.layers import DiracConv2d

    _, held = datasets.hold_out(dataset.train, settings.validation, seed=0)
    pixels = held.first(num_images)
    observed, chosen_by = np.split(pixels, [len(pixels) // 4])
    spec = settings.spec(dataset.info.image, dataset.info.labels)
    options = {"lowerings": tuple(LABELS), "observed": observed, "chosen_by": chosen_by}
    _, candidates = quantize(fold(net.eval()).float(), spec, precision="int8", target="onnxruntime", **options)
    scales = [layer.a.item() for layer in net.modules() if isinstance(layer, DiracConv2d)]
    row: dict[str, Any] = {"a": {"min": min(scales), "mean": float(np.mean(scales)), "max": max(scales)}}
    for candidate in reversed(candidates):  # the best is the last of its lowering
        errors = {"relative_error": candidate.relative_error, "top1_agreement": candidate.top1_agreement}
        row[candidate.lowering] = {"ranges": candidate.method, **errors}
    return row


def _draw(rows: list[dict[str, Any]], title: str) -> Any:
    from train.experiments.lab import new_figure

    figure, (scales, errors, agreements) = new_figure(3)
    for start, style in zip(STARTS, ("-", "--"), strict=True):
        from_start = [row for row in rows if row["start"] == start]
        epochs = [row["epoch"] for row in from_start]
        least, mean, largest = ([row["a"][name] for row in from_start] for name in ("min", "mean", "max"))
        scales.plot(epochs, mean, style, color="black", label=f"from {start}")
        scales.fill_between(epochs, least, largest, color="black", alpha=0.12, lw=0)
        for (lowering, label), color in zip(LABELS.items(), ("tab:red", "tab:blue"), strict=True):
            for axes, key in ((errors, "relative_error"), (agreements, "top1_agreement")):
                percents = [100 * row[lowering][key] for row in from_start]
                axes.plot(epochs, percents, style, color=color, label=f"{label}, from {start}")
    scales.set(title="a: mean, least and largest of all layers", ylim=(0, None))
    errors.set(title="int8 logit error, %", ylim=(0, None))
    agreements.set(title="images that keep their class, %")
    for axes in (scales, errors, agreements):
        axes.set_xlabel("epoch")
    for axes in (scales, errors):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, EightBitsConfig, examples=EXAMPLES))
