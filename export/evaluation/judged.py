"""Which images a model is judged on: never those that it was trained on, where that is known."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.refusal import Refusal
from common.spec import DatasetName, ImageSpec, Spec
from export.artefacts import Artefact
from export.evaluation.answering import load_file
from train.data import datasets
from train.data.datasets import num_bytes
from train.data.folder import FILE, Files, LeftOut, Sizes, Track, class_folders, find_files, read_record

ENLARGED = 160  # pixels of the shorter side of an image that is shown


@dataclass(frozen=True)
class Judged:
    """Images of known classes: `what` they are, in words, and `targets` int64 [N], places in the model's labels."""

    what: str
    dataset: str
    part: datasets.Part
    targets: np.ndarray
    image: ImageSpec
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self.part.names[index] if isinstance(self.part, Files) else f"image {index}"

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, C] as the net takes them."""
        return load_file(self.part.paths[index], self.image) if isinstance(self.part, Files) else self._array(index)

    def enlarged(self, index: int) -> np.ndarray:
        """What the net sees of a file, with more pixels where the file has them."""
        if not isinstance(self.part, Files):
            return self._array(index)
        image = self.image
        factor = -(-ENLARGED // min(image.height, image.width))
        larger = ImageSpec(
            image.height * factor,
            image.width * factor,
            image.channels,
            image.mean,
            image.std,
            image.resize and image.resize * factor,
        )
        return load_file(self.part.paths[index], larger)

    def _array(self, index: int) -> np.ndarray:
        assert isinstance(self.part, datasets.Split)
        return np.asarray(self.part.images[index])


def find_judged(
    form: Artefact,
    *,
    dataset: DatasetName | None = None,
    data_dir: Path | None = None,
    track: Callable[[str], Track] = lambda what: lambda items, total: items,
) -> Judged:
    """The test images of the model's run, or of the data set that is named; a folder without a record whole.

    Of another folder than the run's all images but those that the run trained on. Refuses the run's folder where it
    does not fit its record, and a folder without a class that the model has.
    """
    training = _training(form)
    learnt = training.get("dataset")
    name = dataset or learnt or ("folder" if data_dir else None)
    if name is None:
        raise Refusal(
            f"{form.path} does not say what it was trained on: name a folder with --data-dir, or a data set "
            "with --dataset"
        )
    if name == "folder" and learnt == "folder":
        parts = _parts(form, training)
        if data_dir and parts and not _is_of_run(data_dir, parts):
            return _another(form, parts, data_dir, track)
        return _recorded(form, training, data_dir)
    if name == "folder":
        return _folder(form, data_dir, track)
    return _published(form, name, training if name == learnt else None, data_dir)


def _training(form: Artefact) -> dict[str, Any]:
    """What the artefact says of its training; a checkpoint says more than the files made of it."""
    if form.path.suffix != ".pt":
        return form.provenance.get("training", {})
    from train.checkpoint import load_checkpoint

    return load_checkpoint(form.path).config


def _recorded(form: Artefact, training: dict[str, Any], data_dir: Path | None) -> Judged:
    """The test images of the run, from its record."""
    if not training.get("split"):
        raise Refusal(
            f"{form.path} does not record which images it was trained on, so that none can be told to be new to it: "
            "train it again"
        )
    if data_dir is None and not training.get("data_dir"):
        raise Refusal(f"{form.path} does not say where its photographs lie: name their folder with --data-dir")
    dataset = datasets.load_as_trained(
        training, data_dir=data_dir, beside=form.path.parent, image_size=form.spec.image.height
    )
    what = "test images that its run recorded, which training has not seen"
    return _judged(form, what, "folder", dataset.test, dataset.info.labels)


def _parts(form: Artefact, training: dict[str, Any]) -> dict[str, Sizes] | None:
    """Names and sizes of the run's images by part; None where its record does not lie beside the model."""
    split = training.get("split")
    digest = split.get("sha256", "") if isinstance(split, dict) else ""
    return read_record(form.path.parent / FILE, digest)


def _is_of_run(data_dir: Path, parts: dict[str, Sizes]) -> bool:
    """Whether at least half of the run's images are there as they were: its folder, grown or changed."""
    sizes = {name: size for part in parts.values() for name, size in part.items()}
    there = [name for name, size in sizes.items() if num_bytes(data_dir / name) == size]
    return 2 * len(there) >= len(sizes)


def _another(form: Artefact, parts: dict[str, Sizes], data_dir: Path, track: Callable[[str], Track]) -> Judged:
    """The images of another folder, or of its test part, whose class the model has and that it was not trained on.

    An image of the run is known by class, name and size, wherever it lies.
    """
    labels, known = tuple(folder.name for folder in class_folders(data_dir)), form.spec.labels
    if not set(labels) & set(known):
        place_of(labels, form.spec, by_number=False, path=form.path)  # refuses
    found = find_files(
        data_dir, labels, form.spec.image, skip_unreadable=True, track=track("reading images"), may_lack=True
    )
    part = found.test or found.train
    trained = {_key(name, size) for side in ("train", "validation") for name, size in parts[side].items()}
    left_out = list(found.left_out)
    kept: list[int] = []
    for index, (path, target) in enumerate(zip(part.paths, part.targets, strict=True)):
        if labels[target] not in known:
            left_out.append(LeftOut(Path(path), f"the model has no class {labels[target]}"))
        elif _key(path, num_bytes(Path(path))) in trained:
            left_out.append(LeftOut(Path(path), "the model was trained on it"))
        else:
            kept.append(index)
    if not kept:
        raise Refusal(f"no image of {data_dir} is left to judge {form.path} on: {left_out[-1].why}")
    part = part.take(np.array(kept))
    place = np.array([known.index(label) if label in known else -1 for label in labels])
    targets = place[part.targets]
    what = "images of another folder than its run's, which training has not seen"
    if lacking := [label for index, label in enumerate(known) if index not in targets]:
        what += f"; there is none of {', '.join(lacking[:10])}"
    return Judged(what, "folder", part, targets, form.spec.image, tuple(left_out))


def _key(name: str, size: int) -> tuple[str, str, int]:
    return Path(name).parent.name, Path(name).name, size


def _folder(form: Artefact, data_dir: Path | None, track: Callable[[str], Track]) -> Judged:
    """All images of a folder, or the test images where it names them; nobody knows whether they were trained on."""
    if data_dir is None:
        raise Refusal("--dataset folder needs --data-dir, a directory with one folder of images per class")
    labels = tuple(folder.name for folder in class_folders(data_dir))
    found = find_files(data_dir, labels, form.spec.image, skip_unreadable=True, track=track("reading images"))
    what = "images in its test folder" if found.test else "images, all of the folder"
    what += "; no record says whether the model was trained on them"
    return _judged(form, what, "folder", found.test or found.train, labels, found.left_out)


def _published(form: Artefact, name: str, training: dict[str, Any] | None, data_dir: Path | None) -> Judged:
    """The test images of a data set with a name; `training` where the model was trained on it."""
    dataset = (
        datasets.load_as_trained(training, data_dir=data_dir) if training else datasets.load(name, data_dir=data_dir)
    )
    image = form.spec.image
    found, needed = dataset.test.first(1).shape[1:], (image.height, image.width, image.channels)
    if found != needed:
        raise Refusal(f"{name} has images of {_shape(found)}, and {form.path} takes {_shape(needed)}")
    return _judged(form, f"test images of {name}", name, dataset.test, dataset.info.labels)


def _judged(
    form: Artefact,
    what: str,
    dataset: str,
    part: datasets.Part,
    labels: tuple[str, ...],
    left_out: Iterable[LeftOut] = (),
) -> Judged:
    targets = place_of(labels, form.spec, by_number=dataset != "folder", path=form.path)[np.asarray(part.targets)]
    return Judged(what, dataset, part, targets, form.spec.image, tuple(left_out))


def place_of(labels: tuple[str, ...], spec: Spec, *, by_number: bool, path: Path) -> np.ndarray:
    """int64 [len(labels)]: where each label of a data set stands among the model's.

    `by_number` takes them as they stand if the model's labels are numbers alone and there are as many.
    """
    if missing := [label for label in labels if label not in spec.labels]:
        numbered = spec.labels == tuple(f"class {index}" for index in range(len(spec.labels)))
        if numbered and by_number and len(labels) == len(spec.labels):
            return np.arange(len(labels))
        advice = "name its labels with --labels" if numbered else "judge it on images of its own classes"
        raise Refusal(
            f"{path} does not answer {', '.join(missing[:5])}; its labels are {', '.join(spec.labels[:5])}"
            f"{', ...' if len(spec.labels) > 5 else ''}: {advice}"
        )
    return np.array([spec.labels.index(label) for label in labels])


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
