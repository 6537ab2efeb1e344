"""A folder of images per class: found and checked at the start, divided by name, decoded only when needed."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.files import read_whole, sha256
from common.image import FORMATS, SUFFIXES, decode
from common.progress import printable
from common.refusal import Refusal
from common.spec import ImageSpec

CHECK_THREADS = 8
PART_NAMES = {"validation": ("val", "valid", "validation"), "test": ("test",)}  # beside train
JUNK = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")
JUNK_REASON = "hidden, or an operating system's own"
UNREADABLE = "cannot be read"
FILE = "split.json"  # in the run's folder: names and sizes of a folder's images, by part
PARTS = ("train", "validation", "test")
TEST_SHARE = 0.2
Sizes = dict[str, int]  # bytes of a file, by its name below the data set's folder
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, total): gives the items, and shows progress


@dataclass(frozen=True)
class Files:
    """Images on disk: paths, targets int64 [N], and how they become pixels."""

    root: str  # the data set's folder
    paths: np.ndarray  # of str
    targets: np.ndarray
    image: ImageSpec
    skip_unreadable: bool

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> "Files":
        return replace(self, paths=self.paths[indices], targets=self.targets[indices])

    @property
    def names(self) -> list[str]:
        """Paths below `root`, with slashes."""
        return [Path(path).relative_to(self.root).as_posix() for path in self.paths]

    def first(self, num: int) -> np.ndarray:
        """The first `num` images, those that can be read, uint8 [N, H, W, C] as the server sees them."""
        pixels = [image for path in self.paths[:num] if (image := read(path, self)) is not None]
        if not pixels:
            raise Refusal(f"none of {', '.join(self.paths[:num])} can be read")
        return np.stack(pixels)


@dataclass(frozen=True)
class LeftOut:
    path: Path
    why: str


def describe_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason: the number of paths, and the first."""
    reasons = dict.fromkeys(stranger.why for stranger in left_out)
    by_reason = {why: [stranger.path for stranger in left_out if stranger.why == why] for why in reasons}
    return [printable(f"left out, {why}: {len(paths)}, first {paths[0]}") for why, paths in by_reason.items()]


def read(path: str, files: Files, crop: Callable | None = None, smallest_crop: float = 1.0) -> np.ndarray | None:
    """One file as uint8 [H, W, C], see `decode`; None if it cannot be read and may be skipped."""
    try:
        return decode(Path(path).read_bytes(), files.image, crop=crop, smallest_crop=smallest_crop)
    except (Refusal, OSError) as error:
        if files.skip_unreadable:
            return None
        raise Refusal(f"{path} cannot be read ({error}): repair or remove it, or add --skip-unreadable") from error


def find_images(paths: Iterable[Path]) -> tuple[list[Path], list[LeftOut]]:
    """The files among `paths`, each image in the folders among them and below, in order; and all other files there.

    Refuses a path that is not there, and paths without one image.
    """
    paths = list(paths)
    if missing := [str(path) for path in paths if not path.exists() and not path.is_symlink()]:
        raise Refusal(f"{', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} not there")
    found: dict[Path, None] = {}  # in order, none twice
    left_out: list[LeftOut] = []
    for path in paths:
        if not path.is_dir():
            found[path] = None
            continue
        for folder, folders, names in os.walk(path, onerror=_refuse_folder):
            below = [Path(folder, name) for name in folders]
            left_out += [LeftOut(child, JUNK_REASON) for child in below if _is_junk(child)]
            left_out += [LeftOut(child, "a link to a folder") for child in below if child.is_symlink()]
            folders[:] = sorted(child.name for child in below if not _is_junk(child))
            for child in sorted(Path(folder, name) for name in names):
                if why := _reason(child):
                    left_out.append(LeftOut(child, why))
                else:
                    found[child] = None
    if not found:
        raise Refusal(f"no {', '.join(SUFFIXES)} images in {', '.join(map(str, paths))}")
    return list(found), [stranger for stranger in left_out if stranger.path not in found]


def _refuse_folder(error: OSError) -> None:
    raise Refusal(f"cannot read the folder {error.filename}: {error.strerror}") from error


def take_decodable(files: Files, track: Track) -> tuple[Files, list[LeftOut]]:
    """The files that can be decoded, and the others; refuses those in one message, unless they may be skipped.

    A truncated body shows only when it is decoded, and the images to be judged are first needed after the last epoch.
    """

    def fault(path: str) -> str | None:
        try:
            read(path, replace(files, skip_unreadable=False))
        except Refusal as refusal:
            return str(refusal)
        return None

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        faults = dict(zip(files.paths, track(pool.map(fault, files.paths), len(files)), strict=True))
    damaged = [fault for fault in faults.values() if fault]
    if damaged and not files.skip_unreadable:
        raise Refusal(f"{len(damaged)} of {len(files)} images to be judged are damaged: {damaged[0]}")
    left_out = [LeftOut(Path(path), UNREADABLE) for path, fault in faults.items() if fault]
    return files.take(np.flatnonzero([not fault for fault in faults.values()])), left_out


def class_folders(root: Path) -> list[Path]:
    """The folders of the training classes in alphabetical order; refuses fewer than two."""
    folders = _folders(part := part_folders(root)["train"])
    if len(folders) < 2:
        raise Refusal(f"{part} has {len(folders)} class folders; a classifier needs two or more")
    return folders


def part_folders(root: Path) -> dict[str, Path]:
    """Where "train", "validation" and "test" lie: only "train", `root` itself, where it holds class folders alone.

    A validation folder without a test folder beside it is for testing.
    """
    names = {folder.name: folder for folder in _folders(root)}
    if "train" not in names or not _folders(names["train"]):
        return {"train": root}
    parts = {"train": names["train"]}
    for part, spellings in PART_NAMES.items():
        if given := [names[name] for name in spellings if name in names]:
            parts[part] = given[0]
        if len(given) > 1:
            raise Refusal(f"{root} has {' and '.join(folder.name for folder in given)}: keep one of them")
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return parts


def find_files(
    root: Path, labels: tuple[str, ...], image: ImageSpec, *, skip_unreadable: bool, track: Track, partial: bool = False
) -> tuple[dict[str, Files], list[LeftOut], list[tuple[int, int]]]:
    """The parts that a folder has, files that belong to none, and (width, height) of every image.

    Refuses unreadable images unless they may be skipped, and a class without an image.
    In a `partial` folder, of which no image is trained on, a class may lack images.
    """
    folders = part_folders(root)
    strangers = [path for path in _folders(root) if "test" in folders and path not in folders.values()]
    left_out = [LeftOut(path, "not one of the parts") for path in strangers]
    left_out += [LeftOut(path, JUNK_REASON) for path in root.iterdir() if path.is_dir() and _is_junk(path)]
    found: dict[Path, str] = {}  # images and their parts
    for part, folder in folders.items():
        classes = _folders(folder)
        if strange := [place.name for place in classes if place.name not in labels]:
            raise Refusal(f"{folder} has classes that training has not: {', '.join(strange[:5])}")
        for path in (path for place in classes for path in sorted(place.iterdir())):
            if why := _reason(path):
                left_out.append(LeftOut(path, why))
            else:
                found[path] = part
    if not found:
        raise Refusal(f"no {', '.join(SUFFIXES)} images in the class folders of {folders['train']}")
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        sizes = dict(zip(found, track(pool.map(_size, found), len(found)), strict=True))
    unreadable = [path for path, size in sizes.items() if size is None]
    if unreadable and not skip_unreadable:
        raise Refusal(
            f"{len(unreadable)} of {len(found)} images cannot be read, the first is {unreadable[0]}: "
            "repair or remove them, or add --skip-unreadable"
        )
    left_out += [LeftOut(path, UNREADABLE) for path in unreadable]
    parts: dict[str, Files] = {}
    for part in folders:
        paths = [path for path in found if found[path] == part and sizes[path]]
        parts[part] = make_files(root, paths, labels, image, skip_unreadable=skip_unreadable)
    counts = np.bincount(parts["train"].targets, minlength=len(labels))
    if (empty := [labels[index] for index in np.flatnonzero(counts == 0)]) and not partial:
        raise Refusal(
            f"no {', '.join(SUFFIXES)} image to train on for {', '.join(empty[:5])} in {folders['train']}: "
            "add images, or remove the folder"
        )
    return parts, left_out, [size for size in sizes.values() if size]


def make_files(
    root: Path, paths: list[Path], labels: tuple[str, ...], image: ImageSpec, *, skip_unreadable: bool
) -> Files:
    """`paths` lie in folders named after their labels."""
    targets = np.array([labels.index(path.parent.name) for path in paths], np.int64)
    return Files(str(root), np.array([str(path) for path in paths], np.str_), targets, image, skip_unreadable)


def _reason(path: Path) -> str:
    """Why a path in a class folder is not an image of the class; empty if it is one."""
    if _is_junk(path):
        return JUNK_REASON
    if path.is_dir():
        return "a folder inside a class folder"
    return "" if path.suffix.lower() in SUFFIXES else f"not one of {', '.join(SUFFIXES)}"


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not _is_junk(path))
    except OSError as error:
        raise Refusal(f"cannot read the folder {root}: {error.strerror}") from error


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name in JUNK


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height from the header, with what checksums the format has; None if the file is not a valid image.

    A truncated body may show only when it is decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()
            return image.size
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return None


class Changed(Refusal):
    """An image of the run is missing or has changed."""


class Unlike(Refusal):
    """The images are not those of the run."""


def picked_by_name(names: Sequence[str], targets: np.ndarray, share: float, *, purpose: str) -> np.ndarray:
    """bool [N]: the images of a part that takes about `share` of each class, by a hash of name and `purpose` alone.

    A class of two images or more gives at least one and keeps at least one; a class of one keeps it. Since
    another image's name does not matter, adding images makes no image of the rest one of the part,
    but for classes of one, and those all of whose hashes are below `share`.
    """
    digests = (
        hashlib.sha256(f"{purpose}:{unicodedata.normalize('NFC', name)}".encode(errors="surrogateescape"))
        for name in names  # the same for a name however its accents are composed
    )
    place = np.array([int.from_bytes(digest.digest()[:6]) / 2**48 for digest in digests])  # from 0 to below 1
    picked = place < share
    for target in np.unique(targets):
        of_class = np.flatnonzero(targets == target)
        if share == 0 or len(of_class) < 2:
            picked[of_class] = False
        elif not picked[of_class].any():
            picked[of_class[place[of_class].argmin()]] = True
        elif picked[of_class].all():
            picked[of_class[place[of_class].argmax()]] = False
    return picked


def read_record(path: Path, expected_sha256: str) -> dict[str, Sizes] | None:
    """The parts in a run's FILE; None if there is no such file, or it belongs to another run."""
    if not path.is_file():
        return None
    content = read_whole(path)
    return json.loads(content) if sha256(content) == expected_sha256 else None
