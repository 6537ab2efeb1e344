"""The referee: two answers to the same images, and whether they are the same."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from common.difference import FLOAT32_TOLERANCE, Difference, difference, keeps_class

if TYPE_CHECKING:
    from train.data.datasets import Part

BATCH_SIZE = 100  # of float32 and less; the fold is proven in float64, which wants smaller ones

Answer = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, C] → logits [N, K]
Named = tuple[str, np.ndarray]  # a form's name, and its logits [N, K]


@dataclass(frozen=True)
class Tolerance:
    """How far a form may be from a more precise one. A limit of infinity is none."""

    largest: float = inf  # of the largest difference, as a share of the largest reference value
    rms: float = inf  # of the root mean square difference, as a share of the reference's root mean square
    agreement: float = 1.0  # least share of images that keep their class

    @property
    def is_statistical(self) -> bool:
        """Whether it says what most images do, and not what every image does."""
        return not isfinite(self.largest)

    def covers(self, difference: Difference) -> bool:
        """NaN is beyond any limit."""
        return difference.relative <= self.largest and difference.rms <= self.rms

    def limited(self, difference: Difference) -> tuple[float, float]:
        """The figure that it limits, and the limit."""
        return (difference.rms, self.rms) if self.is_statistical else (difference.relative, self.largest)

    def shown(self, difference: Difference) -> str:
        """The figure that it limits, for people."""
        return f"{'rms ' if self.is_statistical else ''}{self.limited(difference)[0]:.1e}"

    def __str__(self) -> str:
        limit = f"rms {self.rms:.2g}" if self.is_statistical else f"largest {self.largest:.0e}"
        return f"{limit}, top-1 {100 * self.agreement:g} %"

    def to_dict(self) -> dict[str, float]:
        return {name: limit for name, limit in asdict(self).items() if isfinite(limit)}


# Derivations for L layers of n products each, u the largest relative error of one rounding. The mean
# square of a rounding is near (u/2)^2; errors of different signs add up as a random walk, and a layer
# passes on the relative error that it is given.
#
# float32: Winograd's method, which MNN uses, sums n / 9 products of transformed tiles, and the transforms multiply
# their roundings by the root mean square of A G B: 1.7, 11 and 21 to 28 for tiles of 2, 4 and 6 pixels. A third of it,
# at most 9, is what it may be less exact than direct sums. Measured: 3 to 8 times; 3e-5 for 34 layers, which
# FLOAT32_TOLERANCE covers, and 2e-4 for 400 random layers, which it refuses: such a net is for ONNX Runtime.
# float16, u = 2^-11, summed in float32: weights, inputs and outputs are rounded, three times (u/2)^2 a
# layer, so nearly sqrt(L) u: 2.8e-3 for 34 layers, 1e-2 for 400. Measured by rounding on the CPU: 1.0e-3 to
# 2.1e-3 for the trained net of 16 layers, 0.4e-3 to 1.0e-3 for 34. At 34 layers 1e-2 leaves room for kernels that
# keep sums in float16 between the steps of a tensor core.
FLOAT16_TOLERANCE = 1e-2
# bfloat16, u = 2^-8: the same, eight times as large. Measured: 1.1e-2 to 2.2e-2 for 16 layers.
BFLOAT16_TOLERANCE = 8e-2
# int8: a value is off by up to half a step, step / sqrt(12) in the mean square. With 127 steps to the
# largest weight of a filter, four times its rms, that is 4 / 127 / sqrt(12) = 0.9 % of the weights; with
# 255 steps to activations of eight times their rms another 0.9 %: 1.3 % a layer, 4.9 % after 14 of them and 7.4 %
# after 34. Measured: 3.0 % and 3.2 % for the trained net of 16 layers, as unsigned and as signed graph.
# Single logits have no useful bound: an outlier that saturates is off by any amount.
INT8_RMS_TOLERANCE = 0.10
# float8 (E4M3), u = 2^-4: weights and inputs are rounded, sqrt(2) u/2 = 4.4 % a layer, 26 % after 34.
FLOAT8_RMS_TOLERANCE = 0.25
# No derivation but a demand. Classes change where two logits are closer than the error; about half of
# those images were wrong before, so two in a hundred move the accuracy by less than one point.
INT8_AGREEMENT = 0.98
FLOAT8_AGREEMENT = 0.95
ALLOWED_DROP = 0.003  # of test accuracy, in eight bits

# From the most precise on: between two forms the earlier one is the reference, the later one's tolerance holds.
TOLERANCES = {
    "fp32": Tolerance(largest=FLOAT32_TOLERANCE),
    "fp16": Tolerance(largest=FLOAT16_TOLERANCE),
    "bf16": Tolerance(largest=BFLOAT16_TOLERANCE),
    "int8": Tolerance(rms=INT8_RMS_TOLERANCE, agreement=INT8_AGREEMENT),
    "fp8": Tolerance(rms=FLOAT8_RMS_TOLERANCE, agreement=FLOAT8_AGREEMENT),
}


@dataclass(frozen=True)
class Comparison:
    """True where the difference is within tolerance and enough images keep their class."""

    reference: str
    candidate: str
    num_images: int
    difference: Difference
    worst_image: int  # index of the image with the largest difference
    top1_agreement: float  # share of images with the same class; classes within `tolerance.largest` tie
    tolerance: Tolerance

    def __bool__(self) -> bool:
        return self.tolerance.covers(self.difference) and self.top1_agreement >= self.tolerance.agreement

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "difference"}
        verdict = {"tolerance": self.tolerance.to_dict(), "within_tolerance": bool(self)}
        return {**fields, **asdict(self.difference), **verdict}


def compare(reference: Named, candidate: Named, *, tolerance: Tolerance = TOLERANCES["fp32"]) -> Comparison:
    """How far two forms' logits of the same images are apart."""
    before, after = reference[1].astype(np.float64), candidate[1].astype(np.float64)
    if before.shape != after.shape:
        raise ValueError(f"{reference[0]} answers {before.shape}, {candidate[0]} {after.shape}")
    error = np.abs(before - after).max(axis=1)
    kept = keeps_class(before, after, tolerance=0.0 if tolerance.is_statistical else tolerance.largest)
    return Comparison(
        reference=reference[0],
        candidate=candidate[0],
        num_images=len(before),
        difference=difference(before, after),
        worst_image=int(np.nan_to_num(error, nan=np.inf).argmax()),
        top1_agreement=float(kept.mean()),
        tolerance=tolerance,
    )


def answer_part(answers: Sequence[Answer], part: "Part", advance: Callable[[int], object]) -> list[np.ndarray]:
    """Logits [N, K] of each to the images of a part of a data set that can be read, a piece in memory at a time."""
    logits: list[list[np.ndarray]] = [[] for _ in answers]
    for indices in np.array_split(np.arange(len(part)), -(-len(part) // BATCH_SIZE)):
        images = part.take(indices).first(len(indices))
        for rows, answer in zip(logits, answers, strict=True):
            rows.append(answer(images))
        advance(len(indices))
    return [np.concatenate(rows) for rows in logits]


def answer_all(answer: Answer, images: np.ndarray, advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Logits [N, K] for all images, a batch at a time."""
    logits = []
    for start in range(0, len(images), BATCH_SIZE):
        logits.append(answer(images[start : start + BATCH_SIZE]))
        advance(len(logits[-1]))
    return np.concatenate(logits)
