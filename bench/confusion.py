"""python bench/confusion.py: which classes the served model takes for which, over the whole test split."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from serve.run import BUNDLED
from train.cli import POSITIONAL, run_command
from train.refusal import Refusal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

EXAMPLES = (
    "python bench/confusion.py                              # the Fashion-MNIST model that comes along",
    "python bench/confusion.py runs/demo/plain.onnx --out digits.png",
)


@dataclass(frozen=True)
class ConfusionConfig:
    model: Annotated[Path, "plain.onnx or plain.engine (default: models/fashion-mnist.onnx)", POSITIONAL] = BUNDLED
    dataset: Annotated[str | None, "data set to answer (default: what the net learnt)"] = None
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    out: Annotated[Path, "file to write"] = Path("confusion.png")


def command(config: ConfusionConfig) -> int:
    """Answer the test split with the runtime that the server uses, and draw the confusion matrix."""
    from export.compare import answer_all
    from export.runtimes.load import load_runtime
    from train import data
    from train.figure import png
    from train.files import write_whole
    from train.progress import make_console, progress

    console, runtime = make_console(), load_runtime(config.model)
    spec, training = runtime.model.spec, runtime.model.provenance.get("training", {})
    name = config.dataset or training.get("dataset")
    if name is None:
        raise Refusal(f"{config.model} does not say what it was trained on: add --dataset")
    test = data.load(name, data_dir=config.data_dir, image_size=spec.image.height).test
    with progress(console, "answering", len(test)) as advance:
        answers = answer_all(runtime, test.first(len(test)), advance).argmax(axis=1)
    counts = confusion(test.targets, answers, len(spec.labels))
    title = f"{runtime.model.name} on {len(test):,} test images of {name}: {accuracy(counts)}"
    write_whole(config.out, png(draw(counts, spec.labels, title)))
    console.print(f"{title}\nwrote {config.out}")
    return 0


def confusion(targets: "np.ndarray", answers: "np.ndarray", num_classes: int) -> "np.ndarray":
    """int64 [K, K]: how many images of class i (row) are answered with class j (column)."""
    import numpy as np

    return np.bincount(targets * num_classes + answers, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(counts: "np.ndarray") -> str:
    return f"{100 * counts.trace() / counts.sum():.2f} % right"


def draw(counts: "np.ndarray", labels: tuple[str, ...], title: str) -> "Figure":
    """Shares of a row as shades, on a scale on which one in a hundred is seen; counts as numbers."""
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 8), layout="constrained")
    axes, shares = figure.subplots(), counts / counts.sum(axis=1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.4 else "black"
        axes.text(column, row, count or "", ha="center", va="center", color=colour, fontsize=10)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=45, ha="right")
    axes.set_yticks(places, labels)
    axes.set(xlabel="answer", ylabel="truth", title=title)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(command, ConfusionConfig, examples=EXAMPLES))
