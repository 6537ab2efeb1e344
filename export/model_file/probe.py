"""Images of noise that every machine can make: to recognise a net, and to see whether it mixes images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.difference import difference
from common.refusal import Refusal
from common.spec import ImageSpec

SEED = 0
NUM_IMAGES = 4
# How much an answer may depend on the batch. Kernels for other batch sizes round differently: 1e-2 is what float16 may
# differ (export/compare.py). Graphs that take their int8 ranges from the batch differ by a step or two of 255, batch
# norm in training mode by a half and more.
BATCH_TOLERANCE = 0.05


def probe_images(image: ImageSpec, seed: int = SEED) -> np.ndarray:
    """uint8 [4, height, width, channels]: noise, the same for a seed on every machine."""
    return _noise(image.shape, seed)


def record_probe(logits: np.ndarray) -> dict[str, Any]:
    """The record in an artefact's provenance: logits [4, K] to six digits, more than any runtime reproduces."""
    return {"seed": SEED, "logits": [[float(f"{value:.6g}") for value in row] for row in logits]}


def refuse_batch_dependence(
    path: Path, answer: Callable[[np.ndarray], np.ndarray], sizes: tuple[int, int, int]
) -> np.ndarray:
    """The answers [4, K] of a net to noise of `sizes` [H, W, C].

    Refuses a net whose answer to an image depends on the other images of its batch, or changes from call to call.
    """
    # Of different contrast, because otherwise the statistics of a batch would be nearly those of each image.
    contrast = np.linspace(1, 0.1, NUM_IMAGES).reshape(-1, 1, 1, 1)
    images = (_noise(sizes, SEED) * contrast).astype(np.uint8)
    together = answer(images)
    if np.isfinite(together).all() and not np.array_equal(together, answer(images)):
        raise Refusal(
            f"{path} gives different answers to the same images, as Dropout in training mode does; "
            "call net.eval() and export it again"
        )
    alone = np.concatenate([answer(images[index : index + 1]) for index in range(NUM_IMAGES)])
    if together.shape != alone.shape:
        nums = f"{alone.shape[1]} values to one image alone and {together.shape[1]} to each of {NUM_IMAGES}"
        raise Refusal(f"{path} gives {nums}; export it with a free batch")
    if np.isfinite(alone).all() and (found := difference(alone, together)).relative > BATCH_TOLERANCE:
        raise Refusal(
            f"{path} answers an image differently alone and among others, by {found.relative:.0%} of its largest "
            "value: it uses its batch, as batch norm in training mode does; call net.eval() and export it again"
        )
    return together


def _noise(sizes: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_IMAGES, *sizes), dtype=np.uint8)
