"""A few images that can be made anywhere, and what an exported file answered to them when it was written."""

from typing import Any

import numpy as np

from common.spec import ImageSpec

SEED = 0
NUM_IMAGES = 4


def probe_images(image: ImageSpec, seed: int = SEED) -> np.ndarray:
    """uint8 [4, height, width, channels]: noise, the same for a seed on every machine."""
    shape = (NUM_IMAGES, image.height, image.width, image.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def record_probe(logits: np.ndarray) -> dict[str, Any]:
    """What goes into an artefact's provenance: logits [4, K] to six digits, more than any runtime repeats."""
    return {"seed": SEED, "logits": [[float(f"{value:.6g}") for value in row] for row in logits]}
