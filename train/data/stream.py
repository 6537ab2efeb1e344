"""Images from files, decoded by worker processes while the net computes."""

from collections.abc import Iterator, Sequence
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
from train.data.folder import Files, read


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
