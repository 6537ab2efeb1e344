"""The batches of an epoch: images picked, read from memory or decoded by worker processes, and augmented."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from common.environment import num_cores
from common.refusal import Refusal
from train.config import Settings
from train.data.datasets import DatasetInfo, Part, Split
from train.data.folder import Files, read
from train.machine import World

JUDGED_PIXELS = 2_000_000  # of the images that are judged at once


@dataclass(frozen=True)
class Batch:
    epoch: int
    step: int  # within the epoch
    images: Tensor  # uint8 [N, H, W, C], augmented
    targets: Tensor  # int64 [N]
    others: Tensor | None = None  # int64 [N], of the images that are mixed in
    share: float = 1.0  # of an image in its mixture


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches only: each epoch leaves out different images."""
    return max(1, num_images // batch_size)


def batches(
    part: Part, settings: Settings, info: DatasetInfo, world: World, *, epoch: int, first_step: int
) -> Iterator[Batch]:
    """One epoch from `first_step` on, augmented: this process's share of each batch.

    What a batch holds depends on (seed, epoch, step) alone, not on how many processes or workers share it; only the
    pairs that are mixed lie in one process each. Files that cannot be read are missing from it: it may be empty, and
    other images are erased and mixed.
    """
    key, batch_size = (settings.seed, epoch), settings.batch_size
    order = _order(part, np.random.default_rng(key), balanced=settings.balanced)
    steps = range(first_step, steps_per_epoch(len(part), batch_size))
    picked = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    share = batch_size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    flip = info.flip if settings.flip == "auto" else settings.flip == "yes"
    if isinstance(part, Files):
        readable = Readable(part, key, settings.smallest_crop, flip)
        loaded = stream(readable, [indices[mine] for indices in picked], settings.workers)
    else:  # picked and augmented on the device, where `to_device` may have put the images already
        pixels, labels = (torch.as_tensor(array, device=world.device) for array in (part.images, part.targets))
        crop = info.crop if settings.crop is None else settings.crop

        def load(step: int, indices: np.ndarray) -> tuple[Tensor, Tensor]:
            rows, generator = torch.from_numpy(indices).to(world.device), _generator(*key, step)
            return augment(pixels[rows], flip=flip, crop=crop, generator=generator, rows=mine), labels[rows[mine]]

        loaded = map(load, steps, picked)
    fill = [round(255 * mean) for mean in info.image.mean]
    for step, (images, targets) in zip(steps, loaded, strict=True):
        images, targets = images.to(world.device), targets.to(world.device)
        if settings.erase:
            generator = _generator(*key, step, 1)
            images = erase(images, settings.erase, fill, num=batch_size, rows=mine, generator=generator)
        if settings.mixup or settings.cutmix:
            rng = np.random.default_rng((*key, step, 2))
            yield Batch(epoch, step, *mix(images, targets, settings.mixup, settings.cutmix, rng))
        else:
            yield Batch(epoch, step, images, targets)


def _order(split: Part, rng: np.random.Generator, *, balanced: bool) -> np.ndarray:
    """An epoch's images: each once; or as many, with each class equally often and rare images repeated."""
    num = len(split)
    if not balanced:
        return rng.permutation(num)
    targets = torch.as_tensor(split.targets).numpy(force=True)
    of_class = [rng.permutation(np.flatnonzero(targets == target)) for target in np.unique(targets)]
    of_each = math.ceil(num / len(of_class))
    return rng.permutation(np.concatenate([np.resize(drawn, of_each) for drawn in of_class]))[:num]


def _generator(*key: int) -> Generator:
    return Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def to_device(split: Part, device: str) -> Part:
    """Images in memory moved to `device`, once and as bytes; files stay where they are."""
    if isinstance(split, Files):
        return split
    return Split(torch.as_tensor(split.images, device=device), torch.as_tensor(split.targets, device=device))


def in_order(split: Part, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    height, width = (split.image.height, split.image.width) if isinstance(split, Files) else split.images.shape[1:3]
    batch_size = max(1, min(500, JUDGED_PIXELS // (height * width)))
    picked = np.array_split(np.arange(len(split)), max(1, math.ceil(len(split) / batch_size)))
    if isinstance(split, Files):
        yield from stream(Readable(split), picked, workers)
        return
    for indices in picked:
        yield torch.as_tensor(split.images[indices]), torch.as_tensor(split.targets[indices])


@dataclass(frozen=True)
class Readable(Dataset):
    """From an array of indices to those of the `files` that can be read.

    Without `key` as the server prepares images; with one, random crops of at least `smallest_crop` of the image's area
    and flips, which depend on `key` and the image's index alone.
    """

    files: Files
    key: tuple[int, ...] = ()
    smallest_crop: float = 1.0
    flip: bool = False

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
        """(images, targets, why a file was refused): a worker's exception would lose its message."""
        images, targets, files = [], [], self.files
        size, scale = (files.image.height, files.image.width), (self.smallest_crop, 1.0)
        augmented = v2.Compose([v2.RandomResizedCrop(size, scale=scale), v2.RandomHorizontalFlip(self.flip / 2)])
        crop = (lambda image, _: augmented(image)) if self.key else None
        try:
            with torch.random.fork_rng(devices=[]):
                for index in map(int, indices):
                    torch.default_generator.manual_seed(_seed(*self.key, index))
                    if (pixels := read(files.paths[index], files, crop, self.smallest_crop)) is not None:
                        images.append(pixels)
                        targets.append(files.targets[index])
        except Refusal as refusal:
            return np.empty(0), np.empty(0), str(refusal)
        return np.array(images, np.uint8).reshape(-1, *files.image.shape), np.array(targets, np.int64), ""


def stream(readable: Readable, picked: Sequence[np.ndarray], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [N, H, W, C], targets int64 [N]) for each array of indices in `picked`.

    A file that cannot be read is left out of its batch or refused, as the files say.
    """
    loader = DataLoader(
        readable,
        batch_size=None,  # an item is a whole batch
        sampler=picked,
        num_workers=min(workers, num_cores()),  # torch warns of more
        pin_memory=torch.cuda.is_available(),
        generator=Generator(),  # or it would draw from the global one
    )
    for images, targets, refusal in loader:
        if refusal:
            raise Refusal(refusal)
        yield images, targets


def augment(images: Tensor, *, flip: bool, crop: int, generator: Generator, rows: slice = slice(None)) -> Tensor:
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


def erase(images: Tensor, share: float, fill: Sequence[int], *, num: int, rows: slice, generator: Generator) -> Tensor:
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
    """(images, targets, targets of the images mixed in, share of an image in its mixture).

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
