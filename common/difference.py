"""How far two nets' outputs for the same images are apart, and which images change their class."""

from dataclasses import dataclass

import numpy as np

# Runtimes and folding change the order in which n products are summed in each of L layers. Roundings of u = 2^-24 add
# up like a random walk, to sqrt(L n) u of the output: 2e-5 for 34 layers of 2,304 products, 6e-5 for 400 layers.
FLOAT32_TOLERANCE = 1e-4
# In float64, folding and unfolding reorder a few hundred roundings of 2^-53 per layer, which gives 1e-15 to 1e-13 of
# the output; a wrong fold changes the first digits.
TOLERANCES = {"float64": 1e-9, "float32": FLOAT32_TOLERANCE}


@dataclass(frozen=True)
class Difference:
    max_abs: float
    relative: float  # max_abs as a share of the largest reference value
    rms: float  # root mean square difference as a share of the reference's root mean square


def difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """Between two arrays of the same shape; `before` is the reference."""
    error = before.astype(np.float64) - after
    max_abs, scale = (float(np.abs(values).max()) for values in (error, before))
    rms, rms_scale = (float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) for values in (error, before))
    return Difference(max_abs, share(max_abs, scale), share(rms, rms_scale))


def share(error: float, scale: float) -> float:
    """`error` as a share of `scale`; infinite if `scale` is zero and `error` is not."""
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def keeps_class(before: np.ndarray, after: np.ndarray, *, tolerance: float) -> np.ndarray:
    """bool [N] for logits [N, K]. Classes within `tolerance` of the best logit of `before` tie with it."""
    chosen = np.take_along_axis(before, after.argmax(1)[:, None], axis=1)[:, 0]
    return before.max(axis=1) - chosen <= 2 * tolerance * np.abs(before).max()
