"""Pairs of artefacts compared: their logits on images of several kinds, and the outputs of their layers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from rich.console import Console

from common.difference import difference
from common.figure import png
from common.progress import make_table, progress
from common.refusal import Refusal
from export.artefacts import Artefact
from export.compare import TOLERANCES, Comparison, answer_all, compare
from fold.image_sets import EXTREMES

NUM_IMAGES = 8  # of each kind, to compare layers on: the outputs of all layers of both forms are in memory at once

Pair = tuple[Artefact, Artefact]  # (reference, candidate)
ImageSets = Mapping[str, np.ndarray]  # uint8 [N, H, W, C] of each kind: real, random, extreme


@dataclass(frozen=True)
class ParityRow:
    """One comparison on one kind of images: real, random or extreme."""

    images: str
    comparison: Comparison
    overflow: str | None = None  # the node that leaves float16's range, where the CPU computed in more

    @property
    def verdict(self) -> bool | None:
        """None if nothing can be said: statistics hold for images like those that a net was trained on."""
        result = self.comparison
        if self.overflow:
            return False
        if result.tolerance.is_statistical and self.images != "real" and isfinite(result.difference.rms):
            return None
        return bool(result)

    @property
    def worst(self) -> str:
        index = self.comparison.worst_image
        return EXTREMES[index] if self.images == "extreme" else f"image {index}"

    def to_dict(self) -> dict[str, Any]:
        own = {"worst": self.worst, "within_tolerance": self.verdict, "overflow": self.overflow}
        return {"images": self.images, **self.comparison.to_dict(), **own}


def by_precision(form: Artefact, other: Artefact) -> Pair:
    """The more precise form first, `other` if they are equally precise."""
    first, second = sorted((other, form), key=lambda form: [*TOLERANCES].index(form.precision))
    return first, second


def compare_logits(pairs: Sequence[Pair], image_sets: ImageSets, console: Console) -> list[ParityRow]:
    """Every pair on every kind of images."""
    forms = {form.title: form for pair in pairs for form in pair}
    rows = []
    with progress(console, "comparing", len(forms) * sum(map(len, image_sets.values()))) as advance:
        for kind, images in image_sets.items():
            logits = {title: answer_all(form.answer, images, advance) for title, form in forms.items()}
            for pair in pairs:
                before, after = ((form.title, logits[form.title]) for form in pair)
                comparison = compare(before, after, tolerance=TOLERANCES[pair[1].precision])
                rows.append(ParityRow(kind, comparison, pair[0].overflow(images) or pair[1].overflow(images)))
    return rows


def print_rows(console: Console, rows: Sequence[ParityRow]) -> None:
    table = make_table("form", "reference", "images", "largest", "rms", "top-1 agreement", "tolerance", "verdict")
    for row in rows:
        result = row.comparison
        verdict = {True: "same", False: f"DIFFERENT: {row.worst}", None: "not judged"}[row.verdict]
        table.add_row(
            result.candidate,
            result.reference,
            f"{result.num_images} {row.images}",
            f"{result.difference.relative:.1e}",
            f"{result.difference.rms:.1e}",
            f"{100 * result.top1_agreement:.2f} %",
            str(result.tolerance),
            f"OVERFLOWS float16: {row.overflow}" if row.overflow else verdict,
        )
    console.print(table)


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are apart: the figure that the tolerance limits, and its limit."""

    name: str
    error: float
    limit: float
    within_tolerance: bool


@dataclass(frozen=True)
class LayerComparison:
    """All layers that two forms have in common."""

    reference: str
    candidate: str
    layers: tuple[LayerError, ...]

    def first_beyond(self) -> str | None:
        """The name of the first layer beyond tolerance; the layers after it inherit its error."""
        return next((layer.name for layer in self.layers if not layer.within_tolerance), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "first_beyond_tolerance": self.first_beyond()}


def compare_layers(reference: Artefact, candidate: Artefact, images: np.ndarray) -> LayerComparison:
    """Every layer with weights on images uint8 [N, H, W, C]; refuses forms without a layer in common."""
    tolerance = TOLERANCES[candidate.precision]
    before, after = reference.layers(images), candidate.layers(images)
    lowerings = [form.provenance.get("export", {}).get("lowering") for form in (reference, candidate)]
    rows = []
    for name in (name for name in before if name in after):
        # Lowering mirror appends mirrored channels to one of them.
        num_channels = min(before[name].shape[1], after[name].shape[1])
        one, other = before[name][:, :num_channels], after[name][:, :num_channels]
        if "skip" in lowerings:
            other = _rescale(one, other)
        found = difference(one, other)
        rows.append(LayerError(name, *tolerance.limited(found), within_tolerance=tolerance.covers(found)))
    if not rows:
        raise Refusal(f"{reference.title} and {candidate.title} have no layer of the same name")
    return LayerComparison(reference.title, candidate.title, tuple(rows))


def _rescale(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after` with every channel in units of `before`'s: lowering skip changes them by positive factors."""
    axes = (0, *range(2, before.ndim))
    inner, square = ((before * after).sum(axes, keepdims=True), (after * after).sum(axes, keepdims=True))
    factor = np.where(square > 0, np.maximum(inner, 0) / np.maximum(square, np.finfo(np.float64).tiny), 1)
    return after * factor


def compare_all_layers(pairs: Sequence[Pair], image_sets: ImageSets, console: Console) -> list[LayerComparison]:
    """Layer by layer on a few images of each kind that is judged, shown as a table for each pair."""
    few = {kind: images[:NUM_IMAGES] for kind, images in image_sets.items()}
    comparisons = []
    for reference, candidate in pairs:
        is_statistical = TOLERANCES[candidate.precision].is_statistical
        images = few["real"] if is_statistical else np.concatenate(list(few.values()))
        comparisons.append(result := compare_layers(reference, candidate, images))
        for form in (reference, candidate):
            if form.path.suffix == ".engine":
                console.print(f"{form.title}: an engine shows no layers, these are its ONNX file's")
        table = make_table("layer", "error", "tolerance", "")
        for layer in result.layers:
            flag = "" if layer.within_tolerance else "BEYOND"
            table.add_row(layer.name, f"{layer.error:.1e}", f"{layer.limit:.2g}", flag)
        console.print(table)
        first = result.first_beyond()
        verdict = f"the first layer beyond tolerance is {first}" if first else "every layer is within tolerance"
        console.print(f"{candidate.title} against {reference.title}: {verdict}")
    return comparisons


def draw_layers(comparisons: Sequence[LayerComparison]) -> bytes:
    """A PNG: a line for each pair of forms, errors on a logarithmic scale, tolerances dashed."""
    from matplotlib.figure import Figure

    longest = max(len(comparison.layers) for comparison in comparisons)
    figure = Figure(figsize=(max(6.0, 0.28 * longest), 5), layout="constrained")
    axes = figure.subplots()
    for comparison in comparisons:
        # An error of zero has no place on a logarithmic scale; it is drawn as one rounding of float64.
        errors = [max(layer.error, 2**-53) for layer in comparison.layers]
        names = [layer.name for layer in comparison.layers]
        label = " against ".join(name.rpartition("/")[2] for name in (comparison.candidate, comparison.reference))
        axes.plot(names, errors, marker="o", markersize=3, label=label)
    for limit in sorted({layer.limit for comparison in comparisons for layer in comparison.layers}):
        axes.axhline(limit, linestyle="--", color="grey", label=f"tolerance {limit:g}")
    axes.set(yscale="log", ylabel="error as a share of the layer's outputs")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.legend(fontsize=7).set_in_layout(False)  # long names shall not squeeze the axes
    return png(figure)
