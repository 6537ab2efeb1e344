"""What the answers of a classifier are like, as counts; and whether two such counts differ by more than chance.

Of every image three things are counted: the class it is given, that class's probability, and the margin, by which it
is ahead of the second class's. The margin is a difference of probabilities and not of logits: it is between 0 and 1 for
every net, whatever the scale of its logits, and has a meaning for nets that give probabilities alone.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np

# Upper ends, inclusive, of the bins of a probability or margin; the last bin takes what rounding lifts above 1. Trained
# nets are sure of most images, so that the bins are narrow where these lie.
EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
NUM_BINS = len(EDGES)
PARTS = ("classes", "top_probability", "margin")
_CHANCE_DEVIATIONS = (
    2.0  # above the mean: 4.6 % of half-normal values, 2.3 % of normal ones, and these are between them
)


def bin_of(value: float) -> int:
    """The bin of a probability or margin."""
    return min(bisect_left(EDGES, value), NUM_BINS - 1)


def part(counts: np.ndarray, name: str) -> np.ndarray:
    """The one of PARTS that `name` says, of `counts` [K + 2 NUM_BINS]: they stand there in this order."""
    num_classes = len(counts) - 2 * NUM_BINS
    ends = {"classes": 0, "top_probability": num_classes, "margin": num_classes + NUM_BINS}
    start = ends[name]
    return counts[start : start + (num_classes if name == "classes" else NUM_BINS)]


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
