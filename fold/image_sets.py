"""The images that nets are compared on: real, random, and extreme ones, which strain arithmetic most."""

from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole
from common.image import decode
from common.refusal import Refusal
from common.spec import ImageSpec
from train.data.folder import Changed, find_images

NUM_RANDOM = 64
EXTREMES = ("all black", "all white", "one hot pixel", "noise of full contrast", "checkerboard")


def random_images(image: ImageSpec, num: int = NUM_RANDOM) -> np.ndarray:
    """uint8 [num, H, W, C], uniformly distributed."""
    return np.random.default_rng(0).integers(0, 256, (num, *image.shape), dtype=np.uint8)


def extreme_images(image: ImageSpec) -> np.ndarray:
    """One image for each of EXTREMES, uint8 [5, H, W, C], with values only at the ends of the range."""
    hot = np.zeros(image.shape, np.uint8)
    hot[image.height // 2, image.width // 2] = 255
    noise = np.random.default_rng(1).integers(0, 2, image.shape, dtype=np.uint8) * 255
    row, column, _ = np.indices(image.shape)
    checkers = ((row + column) % 2 * 255).astype(np.uint8)
    return np.stack([np.zeros_like(hot), np.full_like(hot, 255), hot, noise, checkers])


def real_images(
    image: ImageSpec, training: dict[str, Any], *, num: int, data_dir: Path | None = None, beside: Path | None = None
) -> tuple[np.ndarray | None, str]:
    """The first test images of the data set that `training` names, or None and the reason.

    `training` is a checkpoint's config, or what later artefacts keep of it. `data_dir` overrides the one in it,
    and must have the images. `beside` is the model's folder. Refuses a data set that has changed.
    """
    from train.data import datasets

    if "dataset" not in training:
        if data_dir:
            return photographs(image, data_dir, num=num), ""
        return None, "no artefact says what it was trained on; name a folder of images with --data-dir"
    if data_dir is None and training["dataset"] == "folder" and not Path(training.get("data_dir") or "").is_absolute():
        return None, "the folder of the photographs is not recorded: name it with --data-dir"
    given = data_dir or (Path(training["data_dir"]) if training.get("data_dir") else None)
    if data_dir is None and given and not given.is_dir():
        return None, f"{given} no longer exists: name the data set's folder with --data-dir"
    try:
        test = datasets.load_as_trained(training, data_dir=given, beside=beside, image=image).test
    except Refusal as refusal:
        if data_dir or isinstance(refusal, Changed):
            raise
        return None, str(refusal)
    return test.first(num), ""


def photographs(image: ImageSpec, folder: Path, *, num: int) -> np.ndarray:
    """The first `num` images that `find_images` finds, uint8 [N, H, W, C]; refuses one that cannot be read."""
    images: list[np.ndarray] = []
    for path in find_images([folder])[0][:num]:
        try:
            images.append(decode(read_whole(path), image))
        except Refusal as refusal:
            raise Refusal(f"{path}: {refusal}") from refusal
    return np.stack(images)
