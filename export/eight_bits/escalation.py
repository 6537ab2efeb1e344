"""The evidence for a cascade: the gap above which eight bits keep float32's class, and how well that works.

With d the difference of eight bits' logits from float32's, and t the class that eight bits give, float32 gives another
class j only if d[t] - d[j] is at least the lead of t over j. So no class changes whose lead exceeds the largest such
error. For future images that error is unknown: it is measured on images that the export has set aside, and the classes
that still change are counted on test images, which choose nothing. The guarantee is empirical: it holds for images like
those, with the certainty that `changed_at_most` states.
"""

from collections.abc import Callable, Sequence

import numpy as np

from common.interval import at_most
from common.refusal import Refusal
from export.compare import Answer, answer_part
from export.runtimes.cascade import Evidence, in_doubt
from train.data.datasets import Dataset, Part

MOST = 5_000  # images to choose the threshold by: of those that come, at most 3 in 5,000 err by more, 95 % certain


def images_to_choose_by(dataset: Dataset, num_calibration: int) -> list[Part]:
    """Validation images, then training images that set no range, those last that chose a form: `MOST` in all.

    `num_calibration` of the training images set ranges, and twice as many chose.
    """
    parts: list[Part] = []
    if dataset.validation is not None and len(dataset.validation):
        parts.append(dataset.validation.take(mixed(dataset.validation)[:MOST]))
    order = mixed(dataset.train)
    rest = np.concatenate([order[3 * num_calibration :], order[num_calibration : 3 * num_calibration]])
    rest = rest[: MOST - sum(map(len, parts))]
    return [*parts, dataset.train.take(rest)] if len(rest) else parts


def mixed(part: Part) -> np.ndarray:
    """int64 [N]: the images of a part in an order that is always the same; the first training images set ranges."""
    return np.random.default_rng(0).permutation(len(part))


def answer_both(
    reference: Answer, candidate: Answer, parts: Sequence[Part], advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] of both to all images of `parts`, which are read a piece at a time."""
    pairs = [answer_part((reference, candidate), part, advance) for part in parts]
    before, after = (np.concatenate(logits) for logits in zip(*pairs, strict=True))
    return before, after


def measure(chosen_by: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Evidence:
    """The evidence of pairs of logits [N, K], float32's and eight bits', of the images to choose by and of the test."""
    threshold, num = largest_error(*chosen_by), len(test[0])
    if not np.isfinite(threshold):
        raise Refusal("the int8 or the float32 form gives logits that are not finite; export the net again")
    counts = count_changes(*test, threshold)
    at_worst = at_most(counts["num_changed"], num)
    return Evidence(threshold, num_chosen_by=len(chosen_by[0]), num_test=num, changed_at_most=at_worst, **counts)


def count_changes(reference: np.ndarray, logits: np.ndarray, threshold: float) -> dict[str, int]:
    """Images that go on to float32, that change their class all the same, and that do in eight bits alone: [N, K]."""
    doubtful, changed = in_doubt(logits, threshold), reference.argmax(1) != logits.argmax(1)
    masks = {"num_escalated": doubtful, "num_changed": changed & ~doubtful, "num_changed_alone": changed}
    return {name: int(mask.sum()) for name, mask in masks.items()}


def largest_error(reference: np.ndarray, logits: np.ndarray) -> float:
    """By how much eight bits favour the class they give over any other, more than float32 does: logits [N, K] each."""
    difference = logits.astype(np.float64) - reference
    given = np.take_along_axis(difference, logits.argmax(1)[:, None], axis=1)
    return float((given - difference).max())
