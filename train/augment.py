"""Random flips and crops on a whole batch of uint8 images at once."""

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


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond the border count backwards from it, without repeating the border itself."""
    return (size - 1) - (index.abs() - (size - 1)).abs()
