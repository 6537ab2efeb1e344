"""One temperature for a net: softmax(logits / T) says how often an answer is right (Guo et al. 2017, section 4.2)."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp, softmax

from common.spec import MAX_TEMPERATURE, MIN_TEMPERATURE

# Only images answered wrongly keep the fitted net from being certain of everything. Ten events for each parameter is
# the rule of thumb of logistic regression, and this fit is one.
MIN_IMAGES, MIN_WRONG = 100, 10
NUM_HALVINGS = 64  # of an interval of log T that is 9.2 long: to the last bit of a float64


@dataclass(frozen=True)
class Fit:
    """The temperature that held-out images ask for, or 1 and why it was not fitted."""

    temperature: float
    images: int
    wrong: int  # of these images
    why_not: str = ""
    standard_error: float = 0.0  # of the temperature
    cross_entropy_before: float = 0.0  # mean over the images, of softmax(logits)
    cross_entropy: float = 0.0  # ... of softmax(logits / temperature)

    def __str__(self) -> str:
        if self.why_not:
            return f"probabilities have a temperature of 1: {self.why_not}"
        return (
            f"probabilities have a temperature of {self.temperature:.3f} ± {self.standard_error:.3f}: "
            f"on {self.images:,} held-out images a cross-entropy of {self.cross_entropy:.4f}, "
            f"and {self.cross_entropy_before:.4f} without it"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that checkpoints and later artefacts keep."""
        return {name: value for name, value in asdict(self).items() if value or name in ("images", "wrong")}


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> Fit:
    """The T that minimises the cross-entropy of softmax(logits / T); logits [N, K], targets int64 [N].

    The cross-entropy is convex in u = 1 / T. Its derivative is the mean over images of E[z] - z_y, with the expectation
    under softmax(u z): T is where that is zero, found by halving an interval.
    """
    images = len(targets)
    wrong = int((logits.argmax(axis=1) != targets).sum()) if images else 0
    if images < MIN_IMAGES:
        return Fit(1.0, images, wrong, f"{images} images are held out, and {MIN_IMAGES} are needed to fit another")
    if wrong < MIN_WRONG:
        why = f"{wrong} of {images} held-out images are answered wrongly, and {MIN_WRONG} are needed to fit another"
        return Fit(1.0, images, wrong, why)
    margins = logits.astype(np.float64) - logits[np.arange(images), targets, None]  # z - z_y, [N, K]
    coldest, hottest = MIN_TEMPERATURE, MAX_TEMPERATURE
    if not _derivatives(margins, hottest)[1].mean() < 0 < _derivatives(margins, coldest)[1].mean():
        why = f"the best one is not between {coldest:g} and {hottest:g}; the net answers hardly better than by chance"
        return Fit(1.0, images, wrong, why)
    for _ in range(NUM_HALVINGS):
        middle = float(np.sqrt(coldest * hottest))
        if _derivatives(margins, middle)[1].mean() > 0:  # u is too large
            coldest = middle
        else:
            hottest = middle
    temperature = float(np.sqrt(coldest * hottest))
    losses, slopes, curvatures = _derivatives(margins, temperature)
    error_of_u = np.sqrt((slopes**2).sum()) / curvatures.sum()  # White's: holds for a net that is not calibrated, too
    return Fit(
        temperature,
        images,
        wrong,
        standard_error=float(error_of_u * temperature**2),
        cross_entropy_before=float(_derivatives(margins, 1.0)[0].mean()),
        cross_entropy=float(losses.mean()),
    )


def _derivatives(margins: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image's cross-entropy, log sum exp(u (z - z_y)), and its first two derivatives in u = 1 / T, [N] each.

    The derivatives are the mean and variance of z - z_y under softmax(u z).
    """
    scaled = margins / temperature
    shares = softmax(scaled, axis=1)
    mean = (shares * margins).sum(axis=1)
    return np.asarray(logsumexp(scaled, axis=1)), mean, (shares * (margins - mean[:, None]) ** 2).sum(axis=1)
