"""Where two forms part: the difference of every layer, in the order of the graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.difference import Difference, difference
from common.figure import png
from common.refusal import Refusal
from export.artefacts import Artefact
from export.compare import TOLERANCES, Tolerance

NUM_IMAGES = 8  # of each kind: the outputs of all layers of both forms are in memory at once


@dataclass(frozen=True)
class LayerError:
    """True where a layer's outputs are within tolerance."""

    name: str
    difference: Difference
    tolerance: Tolerance

    def __bool__(self) -> bool:
        return self.tolerance.covers(self.difference)

    @property
    def error(self) -> float:
        """What the tolerance limits: the largest difference or the rms one, as a share of the reference's."""
        return self.difference.rms if self.tolerance.is_statistical else self.difference.relative

    @property
    def limit(self) -> float:
        return self.tolerance.rms if self.tolerance.is_statistical else self.tolerance.largest

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "error": self.error, "limit": self.limit, "within_tolerance": bool(self)}


@dataclass(frozen=True)
class LayerComparison:
    """All layers that two forms have in common."""

    reference: str
    candidate: str
    layers: tuple[LayerError, ...]

    def first_beyond(self) -> str | None:
        """The name of the first layer beyond tolerance: what comes after it inherits its error."""
        return next((layer.name for layer in self.layers if not layer), None)

    def to_dict(self) -> dict[str, Any]:
        rows = [layer.to_dict() for layer in self.layers]
        names = {"reference": self.reference, "candidate": self.candidate}
        return {**names, "first_beyond_tolerance": self.first_beyond(), "layers": rows}


def compare_layers(reference: Artefact, candidate: Artefact, images: np.ndarray) -> LayerComparison:
    """Every layer with weights on images uint8 [N, H, W, C]; refuses forms without a layer in common."""
    before, after = reference.layers(images), candidate.layers(images)
    names = [name for name in before if name in after]
    if not names:
        raise Refusal(f"{reference.name} and {candidate.name} have no layer of the same name")
    is_scaled = "skip" in (reference.lowering, candidate.lowering)
    rows = []
    for name in names:
        one, other = _first_channels(before[name], after[name])
        if is_scaled:
            other = _rescale(one, other)
        rows.append(LayerError(name, difference(one, other), TOLERANCES[candidate.precision]))
    return LayerComparison(reference.name, candidate.name, tuple(rows))


def draw_layers(comparisons: Sequence[LayerComparison]) -> bytes:
    """A PNG: a line for each pair of forms, errors on a logarithmic scale, tolerances dashed."""
    from matplotlib.figure import Figure

    longest = max((comparison.layers for comparison in comparisons), key=len)
    figure = Figure(figsize=(max(6.0, 0.28 * len(longest)), 5), layout="constrained")
    axes = figure.subplots()
    for index, comparison in enumerate(comparisons):
        # An error of zero has no place on a logarithmic scale; it is drawn as one rounding of float64.
        errors = [max(layer.error, 2**-53) for layer in comparison.layers]
        names = [layer.name for layer in comparison.layers]
        label = " against ".join(name.rpartition("/")[2] for name in (comparison.candidate, comparison.reference))
        axes.plot(names, errors, marker="o", markersize=3, color=f"C{index}", label=label)
    for limit in sorted({layer.limit for comparison in comparisons for layer in comparison.layers}):
        axes.axhline(limit, linestyle="--", color="grey", label=f"tolerance {limit:g}")
    axes.set(yscale="log", ylabel="error as a share of the layer's outputs")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.legend(fontsize=7).set_in_layout(False)  # long names shall not squeeze the axes
    return png(figure)


def _first_channels(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the mirrored channels [N, 2C, ...] that lowering mirror appends to one of them."""
    num = min(before.shape[1], after.shape[1])
    return before[:, :num], after[:, :num]


def _rescale(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after` with every channel in units of `before`'s: lowering skip changes them by positive factors."""
    axes = (0, *range(2, before.ndim))
    inner, square = ((before * after).sum(axes, keepdims=True), (after * after).sum(axes, keepdims=True))
    factor = np.where(square > 0, np.maximum(inner, 0) / np.maximum(square, np.finfo(np.float64).tiny), 1)
    return after * factor
