"""The scores of a classifier on images whose class is known; every share with its interval."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.interval import interval
from export.runtimes.runtime import best, without_temperature

NUM_BINS = 15  # of confidence, of equal width: those of Guo et al. 2017, section 2, whose error this is
NUM_DRAWS = 500  # of what a perfectly calibrated model would show
TOP = 5


@dataclass(frozen=True)
class Estimate:
    """A share, None if there are no images, and its 95 % interval: what so many images can resolve."""

    value: float | None
    interval: tuple[float, float]


@dataclass(frozen=True)
class Share(Estimate):
    """So many hits among so many images, with Wilson's interval."""

    hits: int
    num: int


def share_of(hits: int, num: int) -> Share:
    return Share(hits / num if num else None, interval(hits, num), hits, num)


@dataclass(frozen=True)
class ClassScore:
    """One class: `images` are of it, `answered` were called it, `hits` are both."""

    label: str
    images: int
    answered: int
    hits: int
    precision: Share  # of the images that were called it
    recall: Share  # of the images that are of it
    f1: Estimate  # the harmonic mean of precision and recall


def score_class(label: str, images: int, answered: int, hits: int) -> ClassScore:
    # F1 is 2 J / (1 + J) for the share J of hits among the images that are of the class or called it.
    either = share_of(hits, images + answered - hits)
    value = None if either.value is None else 2 * either.value / (1 + either.value)
    low, high = (2 * end / (1 + end) for end in either.interval)
    precision, recall = share_of(hits, answered), share_of(hits, images)
    return ClassScore(label, images, answered, hits, precision, recall, Estimate(value, (low, high)))


@dataclass(frozen=True)
class Bin:
    """The images whose answer has a probability of more than `low` and at most `high`."""

    low: float
    high: float
    confidence: float | None  # the mean probability of their answers
    right: Share


@dataclass(frozen=True)
class Calibration:
    """Whether an answer of probability p is right in a share p of all cases."""

    error: float  # expected calibration error: mean over images of |share right - mean confidence| of their bin
    perfect: float  # what it would be for a model without any such error, from so few images: the mean
    perfect_95: float  # ... and what 95 % of such models stay below
    confidence: float  # mean probability of the answers
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "expected_calibration_error": self.error,
            "of_a_perfect_model": {"mean": self.perfect, "95_percent_below": self.perfect_95},
            "mean_confidence": self.confidence,
            "bins": [asdict(part) for part in self.bins],
        }


@dataclass(frozen=True)
class Evaluation:
    """`counts` int64 [K, K]: how many images of class i (row) are answered with class j (column).

    Means are over the classes that have images: that of recall is the accuracy if all were equally frequent.
    """

    labels: tuple[str, ...]
    counts: np.ndarray
    top1: Share
    top5: Share | None  # None where all classes are among five
    mean_recall: float
    mean_f1: float
    classes: tuple[ClassScore, ...]
    calibration: Calibration
    temperature: float  # of the model's probabilities
    without_temperature: Calibration | None  # what `calibration` would be; None where the temperature is 1

    def confusions(self, num: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: (truth, answer, how many images)."""
        wrong = self.counts - np.diag(self.counts.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[: min(num, np.count_nonzero(wrong))]
        pairs = [divmod(int(place), len(self.labels)) for place in order]
        return [(self.labels[row], self.labels[column], int(wrong[row, column])) for row, column in pairs]

    def to_dict(self) -> dict[str, Any]:
        names = ("top1", "top5", "mean_recall", "mean_f1", "classes")
        return {
            **{name: value for name, value in asdict(self).items() if name in names},
            "confusion": self.counts.tolist(),
            "calibration": self.calibration.to_dict(),
            "temperature": self.temperature,
            "calibration_without_temperature": self.without_temperature and self.without_temperature.to_dict(),
        }


def evaluate(
    probabilities: np.ndarray, targets: np.ndarray, labels: tuple[str, ...], *, temperature: float = 1.0
) -> Evaluation:
    """`probabilities` [N, K], of a temperature, of images of the classes `targets` [N]; N is at least 1."""
    order = best(probabilities, TOP)
    answers, in_top = order[:, 0], int((order == targets[:, None]).any(axis=1).sum())
    rows, right = np.arange(len(targets)), answers == targets
    plain = without_temperature(probabilities, temperature) if temperature != 1 else None
    counts = confusion(targets, answers, len(labels))
    sides = (counts.sum(1).tolist(), counts.sum(0).tolist(), counts.diagonal().tolist())
    classes = tuple(map(score_class, labels, *sides))
    present = [score for score in classes if score.images]
    return Evaluation(
        labels,
        counts,
        top1=share_of(int(right.sum()), len(targets)),
        top5=share_of(in_top, len(targets)) if len(labels) > TOP else None,
        mean_recall=float(np.mean([score.recall.value or 0.0 for score in present])),
        mean_f1=float(np.mean([score.f1.value or 0.0 for score in present])),
        classes=classes,
        calibration=calibrate(probabilities[rows, answers], right),
        temperature=temperature,
        without_temperature=None if plain is None else calibrate(plain[rows, answers], right),
    )


def confusion(targets: np.ndarray, answers: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K]: how many images of class i (row) are answered with class j (column)."""
    return np.bincount(targets * num_classes + answers, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibrate(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """From the probability of each answer, float64 [N], and whether it is right, bool [N]."""
    place = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    num, hits = (np.bincount(place, weights, NUM_BINS) for weights in (None, right))
    sums = np.bincount(place, confidence, NUM_BINS)
    shares = [share_of(int(hit), int(of)) for hit, of in zip(hits, num, strict=True)]
    means = [total / of if of else None for total, of in zip(sums, num, strict=True)]
    ends = [index / NUM_BINS for index in range(NUM_BINS + 1)]
    rng = np.random.default_rng(0)
    draws = [_error(place, (rng.random(len(place)) < confidence) - confidence) for _ in range(NUM_DRAWS)]
    return Calibration(
        error=_error(place, right - confidence),
        perfect=float(np.mean(draws)),
        perfect_95=float(np.quantile(draws, 0.95)),
        confidence=float(confidence.mean()),
        bins=tuple(map(Bin, ends, ends[1:], means, shares)),
    )


def _error(place: np.ndarray, excess: np.ndarray) -> float:
    """The expected calibration error, from `excess`: 1 or 0 for right or wrong, less the confidence."""
    return float(np.abs(np.bincount(place, excess, NUM_BINS)).sum() / len(place))
