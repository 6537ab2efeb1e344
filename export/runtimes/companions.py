"""Whether a net answers an image alike alone and among others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.difference import difference
from common.refusal import Refusal
from export.model_file.probe import NUM_IMAGES, SEED

# Kernels of other batch sizes round differently: 1e-2 is what float16 may stray (export/compare.py). Graphs that
# take their int8 ranges from the batch stray by a step or two of 255. Batch norm in training mode by a half and more.
TOLERANCE = 0.05


def refuse_companions(
    path: Path, answer: Callable[[np.ndarray], np.ndarray], sizes: tuple[int, int, int]
) -> np.ndarray:
    """The answers [4, K] to images of noise; refuses a net that gives one alone another answer than among them.

    And one that gives the same images another answer the second time.
    """
    shape = (NUM_IMAGES, *sizes)
    images = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
    # Of different contrast, or the statistics of a batch would be nearly those of each image.
    images = (images * np.linspace(1, 0.1, NUM_IMAGES).reshape(-1, 1, 1, 1)).astype(np.uint8)
    together = answer(images)
    if np.isfinite(together).all() and not np.array_equal(together, answer(images)):
        raise Refusal(
            f"{path} gives two answers to the same images, as Dropout in training mode does; "
            "call net.eval() and export it again"
        )
    alone = np.concatenate([answer(images[index : index + 1]) for index in range(NUM_IMAGES)])
    if together.shape != alone.shape:
        raise Refusal(
            f"{path} gives {alone.shape[1]} values to one image alone and {together.shape[1]} to each of {NUM_IMAGES}; "
            "export it with a batch that is free"
        )
    if np.isfinite(alone).all() and (found := difference(alone, together)).relative > TOLERANCE:
        raise Refusal(
            f"{path} answers an image by {found.relative:.0%} of its largest value differently alone and among others: "
            "it uses its batch, as batch norm in training mode does; call net.eval() and export it again"
        )
    return together
