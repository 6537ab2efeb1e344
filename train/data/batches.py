"""The batches of an epoch: images picked, read from memory or decoded by worker processes, and augmented."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from common.cores import num_cores
from common.refusal import Refusal
from common.spec import ImageSpec
from train.data.augment import augment, erase, mix
from train.data.datasets import Part, Split
from train.data.folder import Files, read
from train.distributed import World

JUDGED_PIXELS = 2_000_000  # of the images that are judged at once


@dataclass(frozen=True)
class Batch:
    epoch: int
    step: int  # within the epoch
    images: Tensor  # uint8 [N, H, W, C], augmented
    targets: Tensor  # int64 [N]
    others: Tensor | None = None  # int64 [N], of the images that are mixed in
    share: float = 1.0  # of an image in its mixture


@dataclass(frozen=True)
class Augmentation:
    flip: bool
    crop: int  # pixels by which crops of images in memory shift
    smallest_crop: float  # the smallest share of a file's image that a crop keeps
    erase: float = 0.0  # the share of images that lose a rectangle
    fill: tuple[int, ...] = ()  # its colour, 0 to 255 per channel
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False  # all classes equally often


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches only: each epoch leaves other images out."""
    return max(1, num_images // batch_size)


def batches(
    split: Part,
    augmentation: Augmentation,
    *,
    batch_size: int,
    epoch: int,
    first_step: int,
    seed: int,
    world: World,
    workers: int = 0,
) -> Iterator[Batch]:
    """One epoch from `first_step` on: the part of each batch that falls to this process of `world`.

    What a batch holds depends on (seed, epoch, step) alone, not on how many processes or workers share it.
    Files that cannot be read are missing from it, so that it may be empty, and others are erased and mixed then.
    """
    order = _order(split, np.random.default_rng((seed, epoch)), balanced=augmentation.balanced)
    steps = range(first_step, steps_per_epoch(len(split), batch_size))
    picked = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    share = batch_size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    if isinstance(split, Files):
        loaded = stream(
            split,
            [indices[mine] for indices in picked],
            key=(seed, epoch),
            smallest_crop=augmentation.smallest_crop,
            flip=augmentation.flip,
            workers=workers,
        )
    else:
        loaded = _from_memory(split, picked, augmentation, mine, [(seed, epoch, step) for step in steps], world.device)
    for step, (images, targets) in zip(steps, loaded, strict=True):
        images, targets = images.to(world.device), targets.to(world.device)
        if augmentation.erase:
            generator = _keyed((seed, epoch, step, 1))
            images = erase(
                images, augmentation.erase, augmentation.fill, num=batch_size, rows=mine, generator=generator
            )
        if augmentation.mixup or augmentation.cutmix:
            rng = np.random.default_rng((seed, epoch, step, 2))
            yield Batch(epoch, step, *mix(images, targets, augmentation.mixup, augmentation.cutmix, rng))
        else:
            yield Batch(epoch, step, images, targets)


def _order(split: Part, rng: np.random.Generator, *, balanced: bool) -> np.ndarray:
    """An epoch's images: each once, or as many but of each class equally often, rare ones again and again."""
    num = len(split)
    if not balanced:
        return rng.permutation(num)
    targets = torch.as_tensor(split.targets).numpy(force=True)
    of_class = [rng.permutation(np.flatnonzero(targets == target)) for target in np.unique(targets)]
    of_each = math.ceil(num / len(of_class))
    return rng.permutation(np.concatenate([np.resize(drawn, of_each) for drawn in of_class]))[:num]


def _from_memory(
    split: Split,
    picked: list[np.ndarray],
    augmentation: Augmentation,
    mine: slice,
    keys: list[tuple[int, ...]],
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Picked and augmented on the device, where `split` already is if `to_device` put it there."""
    pixels, targets = (torch.as_tensor(part, device=device) for part in (split.images, split.targets))
    for indices, key in zip(picked, keys, strict=True):
        rows = torch.from_numpy(indices).to(device)
        images = augment(pixels[rows], flip=augmentation.flip, crop=augmentation.crop, generator=_keyed(key), rows=mine)
        yield images, targets[rows[mine]]


def _keyed(key: tuple[int, ...]) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


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
        yield from stream(split, picked, workers=workers)
        return
    for indices in picked:
        yield torch.as_tensor(split.images[indices]), torch.as_tensor(split.targets[indices])


def stream(
    files: Files,
    picked: Sequence[np.ndarray],
    *,
    key: tuple[int, ...] = (),
    smallest_crop: float = 1.0,
    flip: bool = False,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [N, H, W, C], targets int64 [N]) for each array of indices in `picked`.

    Without `key` as the server prepares images; with one, random crops of at least `smallest_crop` of
    the image's area and flips, which depend on `key` and the image's index alone.
    A file that cannot be read is left out of its batch or refused, as `files` says.
    """
    loader = DataLoader(
        _Images(files, key, smallest_crop, flip),
        batch_sampler=[indices.tolist() for indices in picked],
        num_workers=min(workers, num_cores()),  # torch warns of more
        collate_fn=partial(_collate, shape=(files.image.height, files.image.width, files.image.channels)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )
    for images, targets, refusal in loader:
        if refusal:
            raise Refusal(refusal)
        yield images, targets


class _Images(Dataset):
    def __init__(self, files: Files, key: tuple[int, ...], smallest_crop: float, flip: bool) -> None:
        self.files, self.key, self.smallest_crop = files, key, smallest_crop
        size, scale = (files.image.height, files.image.width), (smallest_crop, 1.0)
        self.augment = v2.Compose([v2.RandomResizedCrop(size, scale=scale), v2.RandomHorizontalFlip(flip / 2)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int, str]:
        """(pixels or None, target, why the file was refused): a worker's exception would lose its type."""
        path, target = self.files.paths[index], int(self.files.targets[index])
        try:
            if not self.key:
                return read(path, self.files), target, ""
            keyed = int(np.random.SeedSequence((*self.key, index)).generate_state(1, np.uint64)[0] >> 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(keyed)
                return read(path, self.files, self._random_crop, self.smallest_crop), target, ""
        except Refusal as refusal:
            return None, target, str(refusal)

    def _random_crop(self, image: Any, _: ImageSpec) -> Any:
        return self.augment(image)


def _collate(
    items: list[tuple[np.ndarray | None, int, str]], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, str]:
    """The readable ones of `items` as a batch of images [N, *shape], N of 0 if there are none."""
    readable = [(pixels, target) for pixels, target, _ in items if pixels is not None]
    refusal = next((refusal for _, _, refusal in items if refusal), "")
    images = torch.from_numpy(np.array([pixels for pixels, _ in readable], np.uint8).reshape(-1, *shape))
    return images, torch.tensor([target for _, target in readable], dtype=torch.int64), refusal
