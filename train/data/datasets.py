"""Data sets as uint8 arrays [N, H, W, C] with the spec of their images."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import sha256
from common.refusal import Refusal
from common.spec import ImageSpec
from train.data import folder as photos
from train.data.folder import FILE, PARTS, TEST_SHARE, Changed, Files, LeftOut, Sizes, Track, Unlike

if TYPE_CHECKING:
    from torch import Tensor

FASHION_MNIST_DIRS = (Path("data"), Path("/usr/share/datasets/fashion-mnist"))  # the second is Debian's


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read."""

    image: ImageSpec
    labels: tuple[str, ...]
    flip: bool  # a mirrored image keeps its label
    crop: int  # pixels by which random crops shift images that are in memory


@dataclass(frozen=True)
class Split:
    """images uint8 [N, H, W, C]; targets int64 [N], indices into the labels. Arrays, or tensors on a device."""

    images: "np.ndarray | Tensor"
    targets: "np.ndarray | Tensor"

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.targets[indices])

    def first(self, num: int) -> np.ndarray:
        """The first `num` images, uint8 [N, H, W, C]."""
        return np.asarray(self.images[:num])


Part = Split | Files  # of a data set, in memory or on the disk


@dataclass(frozen=True)
class Dataset:
    info: DatasetInfo
    train: Part
    test: Part
    validation: Part | None = None  # where a folder names it, or `divide` has cut it from `train`
    left_out: Sequence[LeftOut] = ()  # of a folder
    sizes: Sequence[tuple[int, int]] = ()  # width and height of a folder's images


def imagenet_image(size: int = 224, resize: int = 256) -> ImageSpec:
    return ImageSpec(size, size, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=resize)


def cifar_image() -> ImageSpec:
    """Mean and deviation of the authors' code, section 3."""
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return ImageSpec(32, 32, 3, tuple(m / 255 for m in mean), tuple(s / 255 for s in std), resize=32)


FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle~boot"
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm"""


def _info(image: ImageSpec, labels: str, *, flip: bool, crop: int) -> DatasetInfo:
    return DatasetInfo(image, tuple(label.replace("~", " ") for label in labels.split()), flip, crop)


INFO = {
    "digits": _info(ImageSpec(8, 8, 1, (0.305,), (0.376,), resize=8), " ".join("0123456789"), flip=False, crop=0),
    "fashion-mnist": _info(ImageSpec(28, 28, 1, (0.286,), (0.353,), resize=28), FASHION, flip=True, crop=1),
    "cifar10": _info(cifar_image(), CIFAR10, flip=True, crop=4),
    "cifar100": _info(cifar_image(), CIFAR100, flip=True, crop=4),
}


def info_of(
    name: str, *, data_dir: Path | None = None, image_size: int = 32, image: ImageSpec | None = None
) -> DatasetInfo:
    """The `DatasetInfo` of data set `name`; a folder's labels are its subfolders.

    `image` is how a net that is there wants its images: a folder's are prepared so, others must have its shape.
    """
    if name == "folder":  # photographs: ImageNet's mean and deviation, and its resize of 256 to a crop of 224 pixels
        labels = tuple(folder.name for folder in photos.class_folders(_given(data_dir)))
        resize = round(image_size * 256 / 224) if image_size >= 64 else image_size
        info = DatasetInfo(imagenet_image(image_size, resize), labels, flip=True, crop=0)
    elif image and image.shape != INFO[name].image.shape:
        raise Refusal(f"{name} has images of shape {INFO[name].image.shape}, the net takes {image.shape}")
    else:
        info = INFO[name]
    return replace(info, image=image) if image else info


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int = 32,
    image: ImageSpec | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    track: Track = lambda items, total: items,
) -> Dataset:
    """Read a data set whole, or find a folder's files: they are read when needed. `image` as in `info_of`.

    `track(items, total)` wraps the loop over a folder's files, to show progress.
    Refuses a data set that is not where it should be, saying where it was looked for.
    """
    info = info_of(name, data_dir=data_dir, image_size=image_size, image=image)
    match name:
        case "digits":
            if data_dir:
                raise Refusal("digits are bundled with scikit-learn: leave out --data-dir, or add --dataset folder")
            return Dataset(info, *_load_digits())
        case "fashion-mnist":
            return Dataset(info, *_load_fashion_mnist(data_dir, download))
        case "cifar10" | "cifar100":
            return Dataset(info, *_load_cifar(name, data_dir, download))
    where = _given(data_dir), info.labels, info.image
    parts, left_out, sizes = photos.find_files(*where, skip_unreadable=skip_unreadable, track=track)
    train, test = parts["train"], parts.get("test")
    if test is None:
        picked = photos.picked_by_name(train.names, train.targets, TEST_SHARE, purpose="test")
        train, test = train.take(np.flatnonzero(~picked)), train.take(np.flatnonzero(picked))
    if not len(test):
        raise Refusal(f"no image of {data_dir} is left to test on: a class needs two or more")
    return Dataset(info, train, test, parts.get("validation"), left_out, sizes)


def load_as_trained(
    run: Mapping[str, Any], *, data_dir: Path | None = None, beside: Path | None = None, image: ImageSpec | None = None
) -> Dataset:
    """The data set of a run, divided as it was; refuses one that has changed.

    `run` is a checkpoint's config, or what later artefacts keep of it; `data_dir` goes before the one in it, `image` is
    the net's. A folder that has grown is divided by the run's split.json, where that lies in the folder `beside`.
    """
    name, recorded, split = run["dataset"], run.get("data_dir"), run.get("split") or {}
    data_dir = data_dir or (Path(recorded) if recorded else None)
    parts = photos.read_record(beside / FILE, split["sha256"]) if beside and split and name == "folder" else None
    skip = run.get("skip_unreadable", False)
    how: dict[str, Any] = {"data_dir": data_dir, "image": image}
    if parts:
        return recorded_files(_given(data_dir), parts, info_of(name, **how), skip_unreadable=skip)
    dataset = load(name, **how, skip_unreadable=skip)
    dataset = divide(dataset, run.get("validation", 0.0), seed=run.get("seed", 0))
    found = record(dataset)[0] if split else {}
    if found.get("sha256") != split.get("sha256"):
        then, now = (", ".join(f"{counts.get(part, 0)} {part}" for part in PARTS) for counts in (split, found))
        raise Unlike(
            f"{data_dir or name} does not hold the images that the model was trained and tested on ({then}; found "
            f"{now}): name them as they were with --data-dir, or keep the run's {FILE} beside the model"
        )
    return dataset


def recorded_files(root: Path, parts: Mapping[str, Sizes], info: DatasetInfo, *, skip_unreadable: bool) -> Dataset:
    """A folder divided as a run recorded it in `parts`; refuses it if an image is gone or has another size."""
    if changed := [name for sizes in parts.values() for name, size in sizes.items() if num_bytes(root / name) != size]:
        raise Changed(
            f"{len(changed)} images of the run are missing from {root} or changed, the first is {changed[0]}: "
            "put them back, or train again"
        )
    labels = tuple(sorted({Path(name).parent.name for name in parts["train"]}))
    train, validation, test = (
        photos.make_files(root, [*map(root.joinpath, parts[part])], labels, info.image, skip_unreadable=skip_unreadable)
        for part in PARTS
    )
    return Dataset(replace(info, labels=labels), train, test, validation)


def divide(dataset: Dataset, fraction: float, *, seed: int, track: Track = lambda items, total: items) -> Dataset:
    """The data set with a validation part: the one that its folder names, or `fraction` of the training images.

    Where files may be skipped, the damaged ones are left out of the parts that are judged: `track` as in `load`.
    """
    if dataset.validation is None or not fraction:
        rest, held = hold_out(dataset.train, fraction, seed=seed)
        dataset = replace(dataset, train=rest, validation=held)
    for part in PARTS[1:]:
        files = getattr(dataset, part)
        if isinstance(files, Files) and files.skip_unreadable:
            kept, damaged = photos.take_decodable(files, track)
            dataset = replace(dataset, **{part: kept}, left_out=[*dataset.left_out, *damaged])
    if not len(dataset.test):
        raise Refusal("none of the images to test on can be decoded: repair some of them")
    return dataset


def record(dataset: Dataset) -> tuple[dict[str, Any], bytes]:
    """The images of a divided data set: their number by part and a digest; and the content of FILE.

    The digest is that of FILE, names and sizes of files by part, or of arrays, which have no FILE.
    """
    parts = dict(zip(PARTS, (dataset.train, dataset.validation, dataset.test), strict=True))
    digest, sizes = hashlib.sha256(), dict[str, Sizes]()
    for name, part in parts.items():
        if isinstance(part, Files):
            sizes[name] = {file: num_bytes(Path(part.root) / file) for file in part.names}
        elif part is not None:
            for array in (np.asarray(part.images), np.asarray(part.targets)):
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
    content = json.dumps(sizes, indent=0).encode() if sizes else b""
    counts = {name: len(part or ()) for name, part in parts.items()}
    return {**counts, "sha256": sha256(content) if content else digest.hexdigest()}, content


def num_bytes(path: Path) -> int:
    """The size of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def hold_out(split: Part, fraction: float, *, seed: int) -> tuple[Part, Part]:
    """Divides `split` into the rest, for training, and a part to choose by: (rest, part).

    A folder's images are chosen by name, the same share of each class; others at random.
    """
    if isinstance(split, Files):
        picked = photos.picked_by_name(split.names, split.targets, fraction, purpose="validation")
        return split.take(np.flatnonzero(~picked)), split.take(np.flatnonzero(picked))
    order = np.random.default_rng(seed).permutation(len(split))
    num_held = round(len(split) * fraction)
    return split.take(np.sort(order[num_held:])), split.take(np.sort(order[:num_held]))


def _load_digits() -> tuple[Split, Split]:
    """Every fifth image is for testing, the same ones each time."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    whole, index = Split(images, targets.astype(np.int64)), np.arange(len(targets))
    return whole.take(index[index % 5 != 4]), whole.take(index[index % 5 == 4])


def _load_fashion_mnist(data_dir: Path | None, download: bool) -> tuple[Split, Split]:
    from torchvision.datasets import FashionMNIST

    folders = (data_dir,) if data_dir else FASHION_MNIST_DIRS
    if download:
        FashionMNIST(str(folders[0]), train=True, download=True)
    for place in (place for folder in folders for place in (folder, folder / "FashionMNIST" / "raw")):
        try:
            return _read_fashion_mnist(place, "train"), _read_fashion_mnist(place, "t10k")
        except FileNotFoundError:
            continue
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise Refusal(f"the Fashion-MNIST files in {place} cannot be read: {error}") from error
    raise Refusal(
        f"Fashion-MNIST is not in {' or '.join(map(str, folders))}: install Debian's package "
        "dataset-fashion-mnist, name its folder with --data-dir, or let --download fetch it"
    )


def _read_fashion_mnist(folder: Path, part: str) -> Split:
    images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    pixels, targets = _read_idx(folder, images, 3), _read_idx(folder, labels, 1)
    if len(pixels) != len(targets):
        raise ValueError(f"{images} has {len(pixels)} images, {labels} {len(targets)} labels")
    return Split(pixels[..., None], targets.astype(np.int64))


def _read_idx(folder: Path, name: str, num_dims: int) -> np.ndarray:
    """An IDX file of bytes, also a compressed one, which torchvision does not read."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(folder / name)
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if content[:4] != bytes((0, 0, 8, num_dims)):
        raise ValueError(f"{name} is not an IDX file of bytes in {num_dims} dimensions")
    shape = np.frombuffer(content, ">u4", num_dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape).copy()  # writable


def _load_cifar(name: str, data_dir: Path | None, download: bool) -> tuple[Split, Split]:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = data_dir or Path("data")
    try:
        parts = [kind(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise Refusal(
            f"{name} is not readable in {folder} ({error}): name the folder that holds torchvision's "
            "files with --data-dir, or let --download fetch them"
        ) from error
    train, test = (Split(part.data, np.asarray(part.targets, np.int64)) for part in parts)
    return train, test


def _given(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise Refusal("--dataset folder needs --data-dir, a directory with one folder of images per class")
    return data_dir
