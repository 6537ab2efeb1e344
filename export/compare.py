"""The referee: two answers to the same images, and whether they are the same."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# Float32 runtimes sum in other orders: roundings of 2^-24 over L layers of n terms add up to about
# sqrt(L n) 2^-24 of the output's scale, 2e-5 for 34 layers of 2,304 terms.
FLOAT32_TOLERANCE = 1e-4
BATCH_SIZE = 100

Answer = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, C] → logits [N, K]


@dataclass(frozen=True)
class Comparison:
    """True where every logit is within tolerance and no image changes its class."""

    reference: str
    candidate: str
    num_images: int
    max_abs: float
    relative: float  # max_abs as a share of the largest reference logit
    worst_image: int  # index of the image with max_abs
    top1_agreement: float  # share of images with the same class; classes within tolerance of each other tie
    tolerance: float  # of `relative`

    def __bool__(self) -> bool:
        return self.relative <= self.tolerance and self.top1_agreement == 1  # NaN is beyond any tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "within_tolerance": bool(self)}


def compare(
    reference: tuple[str, np.ndarray],
    candidate: tuple[str, np.ndarray],
    *,
    tolerance: float = FLOAT32_TOLERANCE,
) -> Comparison:
    """Compare named logits [N, K]."""
    before, after = reference[1].astype(np.float64), candidate[1].astype(np.float64)
    if before.shape != after.shape:
        raise ValueError(f"{reference[0]} answers {before.shape}, {candidate[0]} {after.shape}")
    error = np.abs(before - after).max(axis=1)
    scale = np.abs(before).max()
    chosen = np.take_along_axis(before, after.argmax(1)[:, None], axis=1)[:, 0]
    same = before.max(axis=1) - chosen <= 2 * tolerance * scale
    return Comparison(
        reference=reference[0],
        candidate=candidate[0],
        num_images=len(before),
        max_abs=float(error.max()),
        relative=float(error.max() / scale) if scale else float(error.max() > 0),
        worst_image=int(np.nan_to_num(error, nan=np.inf).argmax()),
        top1_agreement=float(same.mean()),
        tolerance=tolerance,
    )


def answer_all(answer: Answer, images: np.ndarray, advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Logits [N, K] for all images, a batch at a time."""
    logits = []
    for start in range(0, len(images), BATCH_SIZE):
        logits.append(answer(images[start : start + BATCH_SIZE]))
        advance(len(logits[-1]))
    return np.concatenate(logits)
