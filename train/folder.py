"""A folder of images per class: found and checked at the start, decoded only when needed."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.image import FORMATS, decode
from train.refusal import Refusal
from train.spec import ImageSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHECK_THREADS = 8

Track = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, total): gives the items, and shows progress


@dataclass(frozen=True)
class Files:
    """Images on the disk: paths, targets int64 [N], and how they become pixels."""

    paths: np.ndarray  # of str
    targets: np.ndarray
    image: ImageSpec
    skip_unreadable: bool

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> "Files":
        return replace(self, paths=self.paths[indices], targets=self.targets[indices])

    def first(self, num: int) -> np.ndarray:
        """The first `num` images, those that can be read, uint8 [N, H, W, C] as the server sees them."""
        pixels = [image for path in self.paths[:num] if (image := read(path, self)) is not None]
        if not pixels:
            raise Refusal(f"none of {', '.join(self.paths[:num])} can be read")
        return np.stack(pixels)


def read(path: str, files: Files, crop: Callable | None = None) -> np.ndarray | None:
    """One file as uint8 [H, W, C], see `decode`; None where it is unreadable and may be skipped."""
    try:
        return decode(Path(path).read_bytes(), files.image, crop=crop)
    except (Refusal, OSError) as error:
        if files.skip_unreadable:
            return None
        raise Refusal(f"{path} cannot be read ({error}): mend or remove it, or add --skip-unreadable") from error


def refuse_what_cannot_be_judged(files: Files, track: Track) -> None:
    """Decodes every file; refuses those that cannot be read, all in one line, unless they may be skipped.

    What is judged after the last epoch is decoded before the first: a body cut short shows only then.
    """

    def fault(path: str) -> str | None:
        try:
            read(path, replace(files, skip_unreadable=False))
        except Refusal as refusal:
            return str(refusal)
        return None

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        faults = [fault for fault in track(pool.map(fault, files.paths), len(files)) if fault]
    if faults:
        raise Refusal(f"{len(faults)} of {len(files)} images to be judged are damaged: {faults[0]}")


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes in alphabetical order; refuses fewer than two."""
    root = root / "train" if (root / "train").is_dir() else root
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise Refusal(f"cannot read the folder {root}: {error.strerror}") from error
    if len(folders) < 2:
        raise Refusal(f"{root} has {len(folders)} class folders; a classifier needs two or more")
    return folders


def find_files(
    root: Path, labels: tuple[str, ...], image: ImageSpec, *, skip_unreadable: bool, track: Track
) -> tuple[Files, Files | None, list[Path]]:
    """(train, test, left out): `train/` and one of `test/`, `val/` where they exist, else all of `root` and None."""
    train, left_out = _find(class_folders(root), labels, image, skip_unreadable=skip_unreadable, track=track)
    part = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or part is None:
        return train, None, left_out
    test, more = _find(class_folders(part), labels, image, skip_unreadable=skip_unreadable, track=track)
    return train, test, [*left_out, *more]


def _find(
    folders: list[Path], labels: tuple[str, ...], image: ImageSpec, *, skip_unreadable: bool, track: Track
) -> tuple[Files, list[Path]]:
    """The images of the class folders, and the files that were left out because they cannot be read."""
    strangers = [folder.name for folder in folders if folder.name not in labels]
    if strangers:
        raise Refusal(f"{folders[0].parent} has classes that training has not: {', '.join(strangers[:5])}")
    found = [
        (path, labels.index(folder.name))
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise Refusal(f"no {', '.join(SUFFIXES)} images in the class folders of {folders[0].parent}")
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        sound = list(track(pool.map(_is_sound, (path for path, _ in found)), len(found)))
    unreadable = [path for (path, _), fine in zip(found, sound, strict=True) if not fine]
    if unreadable and not skip_unreadable:
        raise Refusal(
            f"{len(unreadable)} of {len(found)} images cannot be read, the first is {unreadable[0]}: "
            "mend or remove them, or add --skip-unreadable"
        )
    kept = [pair for pair, fine in zip(found, sound, strict=True) if fine]
    if not kept:
        raise Refusal(f"none of the {len(found)} images under {folders[0].parent} can be read")
    paths, targets = zip(*kept, strict=True)
    files = Files(np.array([str(path) for path in paths]), np.array(targets, np.int64), image, skip_unreadable)
    return files, unreadable


def _is_sound(path: Path) -> bool:
    """The header, and what checksums the format has: a body cut short may show only when it is decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return False
    return True
