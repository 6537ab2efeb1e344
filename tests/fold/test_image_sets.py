from dataclasses import replace

import numpy as np
import pytest

from common.refusal import Refusal
from common.spec import ImageSpec
from fold.image_sets import EXTREMES, extreme_images, random_images, real_images

IMAGE = ImageSpec(6, 5, 3, (0.5,) * 3, (0.5,) * 3, resize=None)


def test_extreme_images_are_what_they_are_called():
    images = dict(zip(EXTREMES, extreme_images(IMAGE), strict=True))
    assert all(image.shape == (6, 5, 3) and image.dtype == np.uint8 for image in images.values())
    assert images["all black"].max() == 0
    assert images["all white"].min() == 255
    assert (images["one hot pixel"] > 0).sum() == 3
    assert images["one hot pixel"][3, 2].tolist() == [255] * 3
    assert set(np.unique(images["noise of full contrast"])) == {0, 255}
    assert images["checkerboard"][:2, :2, 0].tolist() == [[0, 255], [255, 0]]


def test_random_images_are_the_same_each_time_and_use_the_whole_range():
    images = random_images(IMAGE, 100)
    assert np.array_equal(images, random_images(IMAGE, 100))
    assert (images.shape, images.min(), images.max()) == ((100, 6, 5, 3), 0, 255)


def test_real_images_are_the_first_test_images_or_a_reason(tmp_path):
    digits = ImageSpec(8, 8, 1, (0.3,), (0.4,), resize=8)
    images, missing = real_images(digits, {"dataset": "digits"}, num=7)
    assert (images.shape, missing) == ((7, 8, 8, 1), "")
    with pytest.raises(Refusal, match="Fashion-MNIST is not in"):
        real_images(
            replace(digits, height=28, width=28, resize=28), {"dataset": "fashion-mnist"}, num=7, data_dir=tmp_path
        )
    gone = {"dataset": "cifar10", "data_dir": str(tmp_path / "gone")}
    reason = f"{tmp_path / 'gone'} no longer exists: name the data set's folder with --data-dir"
    assert real_images(digits, gone, num=7) == (None, reason)
    reason = "the folder of the photographs is not recorded: name it with --data-dir"
    assert real_images(digits, {"dataset": "folder"}, num=7) == (None, reason)
    reason = "digits has images of shape (8, 8, 1), the net takes (6, 5, 3)"
    assert real_images(IMAGE, {"dataset": "digits"}, num=7) == (None, reason)
    missing = "no artefact says what it was trained on; name a folder of images with --data-dir"
    assert real_images(digits, {}, num=7) == (None, missing)
