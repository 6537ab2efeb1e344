"""Random flips, crops and erasing on a whole batch of uint8 images at once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def augment(images: Tensor, *, flip: bool, crop: int, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """images [N, H, W, C] → `rows` of them: shifted by up to `crop` pixels, half mirrored.

    What a shift uncovers is reflected at the border. Random numbers are drawn for all N images, so that
    processes which share a batch see the images that one process would.
    `generator` lives on the CPU, so that a seed gives the same images on every device.
    """
    num, height, width, _ = images.shape
    lines = torch.arange(height).expand(num, height)
    columns = torch.arange(width).expand(num, width)
    if crop:
        shift = torch.randint(-crop, crop + 1, (2, num, 1), generator=generator)
        lines, columns = _reflect(lines + shift[0], height), _reflect(columns + shift[1], width)
    if flip:
        mirrored = torch.randint(2, (num, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    lines, columns = lines[rows].to(images.device), columns[rows].to(images.device)
    picked = torch.arange(num, device=images.device)[rows]
    return images[picked[:, None, None], lines[:, :, None], columns[:, None, :]]


def erase(
    images: Tensor,
    share: float,
    fill: Sequence[int],
    *,
    num: int,
    rows: slice,
    generator: torch.Generator,
) -> Tensor:
    """images [M, H, W, C], a `share` of them with a random rectangle of colour `fill`, C values up to 255.

    Random erasing (Zhong et al., 2017): 2 to 33 % of the area, sides in a proportion of 0.3 to 3.3.
    The images are `rows` of a batch of `num`, for all of which numbers are drawn, as in `augment`.
    """
    _, height, width, _ = images.shape
    chosen, area, ratio, y, x = torch.rand(5, num, generator=generator)
    area = (0.02 + 0.31 * area) * height * width
    ratio = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * ratio)
    high, wide = (area * ratio).sqrt().clamp(1, height).round(), (area / ratio).sqrt().clamp(1, width).round()
    top, left = (y * (height - high + 1)).floor(), (x * (width - wide + 1)).floor()
    inside = _between(top, high, height)[:, :, None] & _between(left, wide, width)[:, None, :]
    inside &= (chosen < share)[:, None, None]
    inside = inside[rows][: len(images), :, :, None].to(images.device)
    return torch.where(inside, torch.tensor(fill, dtype=torch.uint8, device=images.device), images)


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(images, targets, targets of what is mixed into them, share of an image in its mixture).

    An image is mixed with its neighbour, the first with the second and so on, blended (mixup, Zhang et al., 2018) or
    with a rectangle of it (cutmix, Yun et al., 2019); a coin decides for the batch where both are given.
    The share is from Beta(α, α) of the given α.
    """
    num, height, width, _ = images.shape
    partner = torch.arange(num, device=images.device)
    partner = torch.where(partner ^ 1 < num, partner ^ 1, partner)
    blends = rng.random() < (0.5 if mixup and cutmix else float(mixup > 0))
    share = rng.beta(mixup, mixup) if blends else rng.beta(cutmix, cutmix)
    if blends:
        mixed = torch.lerp(images[partner].float(), images.float(), share).round().to(torch.uint8)
        return mixed, targets, targets[partner], share
    side, (y, x) = math.sqrt(1 - share), rng.random(2)
    top, bottom = (round(min(max(y + half, 0), 1) * height) for half in (-side / 2, side / 2))
    left, right = (round(min(max(x + half, 0), 1) * width) for half in (-side / 2, side / 2))
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    return mixed, targets, targets[partner], 1 - (bottom - top) * (right - left) / (height * width)


def _between(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[N, size]: which of the positions 0, 1, ... lie in [start, start + length)."""
    position = torch.arange(size)
    return (position >= start[:, None]) & (position < (start + length)[:, None])


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond the border count backwards from it, without repeating the border itself."""
    return (size - 1) - (index.abs() - (size - 1)).abs()
