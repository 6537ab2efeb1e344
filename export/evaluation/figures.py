"""The figures of an evaluation: what is taken for what, whether probabilities hold, and the surest mistakes."""

import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from common.figure import png
from export.evaluation.scores import Calibration, Evaluation

MAX_NUMBERED = 25  # classes whose counts are written into the confusion matrix
MAX_NAMED = 60  # ... that are named at its edges; of more, every so many
MAX_LABEL = 24  # characters of a label in a figure
FEW = 50  # images up to which a bin's bar stands on a linear scale
ACCENT, MUTED = "#1f5fa8", "#8a94a0"


def draw(figure: Figure) -> bytes:
    """PNG; a letter that the font lacks is a box, and no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return png(figure)


def confusion_figure(evaluation: Evaluation, title: str) -> Figure:
    """Shares of a row as shades, on a scale on which one in a hundred is seen; counts as numbers."""
    counts, num = evaluation.counts, len(evaluation.labels)
    side = min(14.0, max(5.0, 2.8 + 0.56 * num))
    figure = Figure(figsize=(side + 1.6, side), layout="constrained")
    axes, shares = figure.subplots(), counts / counts.sum(axis=1, keepdims=True).clip(1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    if num <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, count or "", ha="center", va="center", color=colour, fontsize=9)
    step = -(-num // MAX_NAMED)
    places, size = range(0, num, step), 10 if num <= MAX_NUMBERED else 7
    labels = [figure_text(evaluation.labels[place]) for place in places]
    axes.set_xticks(places, labels, rotation=45 if num <= MAX_NUMBERED else 90, ha="right", fontsize=size)
    axes.set_yticks(places, labels, fontsize=size)
    axes.set(xlabel="answer", ylabel="truth")
    axes.set_title(title, fontsize=11, wrap=True)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the images of a class (row)")
    return figure


def reliability_figure(evaluation: Evaluation, title: str) -> Figure:
    """Above, how many answers of a confidence are right, with intervals; below, how many there are.

    Rings are what would be without the model's temperature.
    """
    calibration, plain = evaluation.calibration, evaluation.without_temperature
    bins, nums = calibration.bins, [part.right.num for part in calibration.bins]
    figure = Figure(figsize=(6.4, 6.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    above.plot([0, 1], [0, 1], color=MUTED, linestyle="--", label="probabilities that hold")
    at, right = _points(calibration)
    reach = np.abs(np.array([part.right.interval for part in bins if part.right.num]).T - right)
    above.errorbar(at, right, yerr=reach, fmt="o", color=ACCENT, capsize=3, label="this model, 95 % interval")
    above.grid(alpha=0.25)
    if plain:
        label = f"without T = {evaluation.temperature:.3g}"
        above.plot(*_points(plain), "o", color=MUTED, fillstyle="none", label=label)
    above.set(ylabel="share that is right", ylim=(-0.02, 1.02), xlim=(0, 1))
    above.set_title(title, fontsize=11, wrap=True)
    above.legend(loc="lower right", frameon=False)
    width = 1 / len(bins)
    below.bar([part.low + width / 2 for part in bins], nums, width=0.94 * width, color=MUTED)
    below.set(xlabel="probability of the answer", ylabel="images")
    if max(nums) > FEW:
        below.set(yscale="symlog", ylim=(0, None))
    else:
        below.yaxis.get_major_locator().set_params(integer=True)
    below.axvline(calibration.confidence, color=ACCENT, linestyle="--", label=f"mean {calibration.confidence:.1%}")
    below.legend(loc="upper left", frameon=False)
    return figure


def _points(calibration: Calibration) -> tuple[list[float], list[float]]:
    """Mean probability and share that is right, of each bin with images."""
    filled = [part for part in calibration.bins if part.confidence is not None]
    return [part.confidence or 0.0 for part in filled], [part.right.value or 0.0 for part in filled]


def mistakes_figure(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """The surest mistakes, uint8 [H, W, C] each, with what each was taken for."""
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(11, 0.7 + 2.25 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8)
    return figure


def figure_text(label: str, longest: int = MAX_LABEL) -> str:
    """A label that a figure takes as it is: short, no formula, every byte a letter."""
    short = label if len(label) <= longest else label[: longest - 1] + "…"
    return short.encode(errors="replace").decode().replace("$", r"\$")
