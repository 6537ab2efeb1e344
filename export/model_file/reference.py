"""The answers of a classifier as counts: the reference in a model's file, and how far a server's own counts are off.

Of every image three things are counted: its class, that class's probability, and the margin by which this is ahead of
the second class's. The margin is a difference of probabilities and not of logits: it is between 0 and 1 for every net,
whatever the scale of its logits, and is defined for nets that give only probabilities.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import numpy as np

from common.documents import is_of
from common.refusal import Refusal

KEY = "reference"  # of an ONNX file's metadata, and of the provenance that every runtime shows
_FORMAT = "diracnet-reference-1"
_MOST = 2**53  # images: what a float64 counts exactly
# Upper ends, inclusive, of the bins of a probability or margin; the last bin takes what rounding lifts above 1. Trained
# nets are sure of most images, so the bins near 1 are narrow.
EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
NUM_BINS = len(EDGES)
PARTS = ("classes", "top_probability", "margin")
_CHANCE_DEVIATIONS = 2.0  # above the mean: covers 95.4 % of half-normal values and 97.7 % of normal ones


@dataclass(frozen=True, eq=False)
class Reference:
    """`counts` int64 [K + 2 NUM_BINS], as `count` gives them, over the images that `what` names."""

    what: str
    of: str  # digest of the file before the reference was stored in it
    counts: np.ndarray

    @property
    def num_images(self) -> int:
        return int(part(self.counts, "margin").sum())

    def to_dict(self) -> dict[str, Any]:
        counts = {name: part(self.counts, name).tolist() for name in PARTS}
        head = {"format": _FORMAT, "what": self.what, "of": self.of, "images": self.num_images}
        return {**head, "edges": list(EDGES), **counts}


def read_reference(record: Any, num_classes: int) -> Reference:
    """The inverse of `to_dict` for an untrusted record; a refusal names the field that is wrong."""
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise Refusal(f"the reference is not of the format {_FORMAT}")
    if record.get("edges") != list(EDGES):
        raise Refusal("the reference has other bins than this version counts")
    what, of, images = (record.get(name) for name in ("what", "of", "images"))
    if not isinstance(what, str) or not isinstance(of, str):
        raise Refusal("the reference does not say what it was counted on")
    if type(images) is not int or not 1 <= images <= _MOST:
        raise Refusal(f"the reference is over {str(images)[:20]} images")
    for name, size in zip(PARTS, (num_classes, NUM_BINS, NUM_BINS), strict=True):
        counts: Any = record.get(name)
        if not is_of(counts, tuple[int, ...]) or len(counts) != size or min(counts) < 0:
            raise Refusal(f"{name} in the reference is not a list of {size} counts")
        if sum(counts) != images:
            raise Refusal(f"{name} in the reference counts {sum(counts)} images, not {images}")
    return Reference(what, of, np.array([number for name in PARTS for number in record[name]], np.int64))


def bin_of(value: float) -> int:
    """The bin of a probability or margin."""
    return min(bisect_left(EDGES, value), NUM_BINS - 1)


def part(counts: np.ndarray, name: str) -> np.ndarray:
    """A view of one of PARTS, which `counts` [K + 2 NUM_BINS] holds in this order."""
    return np.split(counts, (len(counts) - 2 * NUM_BINS, len(counts) - NUM_BINS))[PARTS.index(name)]


def count(order: np.ndarray, ranked: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K + 2 NUM_BINS] for the best classes [N, ≥ 1] of N images and their probabilities [N, ≥ 2]."""
    counts = np.zeros(num_classes + 2 * NUM_BINS, np.int64)
    np.add.at(part(counts, "classes"), order[:, 0], 1)
    for name, values in (("top_probability", ranked[:, 0]), ("margin", ranked[:, 0] - ranked[:, 1])):
        np.add.at(part(counts, name), [bin_of(value) for value in values.tolist()], 1)
    return counts


@dataclass(frozen=True)
class Drift:
    """How far apart two counts are: the share of one's images that would have to be counted elsewhere, 0 to 1."""

    value: float
    chance: float  # what chance alone stays below, in 95 % of all cases, for independent images of one distribution
    num_images: int


def drift(counts: np.ndarray, reference: np.ndarray) -> Drift:
    """The total variation distance of two counts [K], neither of which is empty.

    With n and m images of one distribution p, the shares of a class differ by about a normal value of variance
    p (1 - p) (1/n + 1/m) = v s. The distance is half the sum of these values' amounts: its mean is half of
    sqrt(2 s / pi) times the sum of sqrt(v). The covariance of two amounts with the correlation r is at most
    (1 - 2/pi) r^2 times their deviations (equal for r = 1), which for a multinomial is (1 - 2/pi) a_i a_j s with
    a = p^1.5 / sqrt(1 - p); so its variance is at most (1 - 2/pi) s/4 times the sum of v and of all a_i a_j.
    """
    n, m = counts.sum(), reference.sum()
    distance = float(np.abs(counts / n - reference / m).sum() / 2)
    shares = (counts + reference) / (n + m)
    scale, variances = 1 / n + 1 / m, shares * (1 - shares)
    pairs = np.divide(shares**1.5, np.sqrt(1 - shares), out=np.zeros(len(shares)), where=shares < 1)
    mean = sqrt(2 * scale / pi) * np.sqrt(variances).sum() / 2
    variance = (1 - 2 / pi) * scale / 4 * (variances.sum() + pairs.sum() ** 2 - np.square(pairs).sum())
    return Drift(distance, float(min(1.0, mean + _CHANCE_DEVIATIONS * sqrt(variance))), int(n))
