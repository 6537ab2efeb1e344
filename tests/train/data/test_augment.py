import numpy as np
import pytest
import torch

from train.data.batches import mix


def two_images(num=2, size=16):
    """Of one colour each: 10 and 210, 10 and 210, ..."""
    images = torch.full((num, size, size, 3), 10, dtype=torch.uint8)
    images[1::2] = 210
    return images, torch.arange(num)


@pytest.mark.parametrize("seed", range(5))
def test_blended_images_have_their_share_of_both(seed):
    images, targets = two_images()
    mixed, own, others, share = mix(images, targets, 1.0, 0.0, np.random.default_rng(seed))
    assert (own.tolist(), others.tolist()) == ([0, 1], [1, 0])
    for image, level in zip(mixed, (10 * share + 210 * (1 - share), 210 * share + 10 * (1 - share)), strict=True):
        assert image.unique().tolist() == [round(level)]


@pytest.mark.parametrize("seed", range(5))
def test_a_pasted_rectangle_has_the_area_that_the_share_says(seed):
    images, targets = two_images()
    mixed, _, _, share = mix(images, targets, 0.0, 1.0, np.random.default_rng(seed))
    assert set(mixed.unique().tolist()) <= {10, 210}
    for image, original in zip(mixed, images, strict=True):
        assert (image == original).float().mean().item() == pytest.approx(share)


def test_both_take_turns_and_an_odd_image_stays_itself():
    images, targets = two_images(num=3)
    levels = [mix(images, targets, 1.0, 1.0, np.random.default_rng(seed))[0].unique().tolist() for seed in range(20)]
    assert 0 < sum(set(found) <= {10, 210} for found in levels) < 20
    mixed, _, others, _ = mix(images, targets, 1.0, 0.0, np.random.default_rng(0))
    assert others.tolist() == [1, 0, 2]
    assert torch.equal(mixed[2], images[2])
    empty = mix(images[:0], targets[:0], 1.0, 1.0, np.random.default_rng(0))
    assert len(empty[0]) == 0
