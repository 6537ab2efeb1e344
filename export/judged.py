"""Which images a model is judged on: never those that it was trained on, where that is known."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.answering import load_file
from export.artefacts import Form
from train import data
from train.folder import Files, LeftOut, Track, class_folders, find_files
from train.refusal import Refusal
from train.spec import DatasetName, ImageSpec, Spec

ENLARGED = 160  # pixels of the shorter side of an image that is shown


@dataclass(frozen=True)
class Judged:
    """Images of known classes: `what` they are, in words, and `targets` int64 [N], places in the model's labels."""

    what: str
    dataset: str
    part: data.Part
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
        assert isinstance(self.part, data.Split)
        return np.asarray(self.part.images[index])


def find_judged(
    form: Form,
    *,
    dataset: DatasetName | None = None,
    data_dir: Path | None = None,
    track: Callable[[str], Track] = lambda what: lambda items, total: items,
) -> Judged:
    """The test images of the model's run, or of the data set that is named; a folder without a record whole.

    Refuses a folder that does not fit the record of the run, and classes that the model does not have.
    """
    training = _training(form)
    learnt = training.get("dataset")
    name = dataset or learnt or ("folder" if data_dir else None)
    if name is None:
        raise Refusal(
            f"{form.path} does not say what it was trained on: name a folder with --data-dir, or a data set "
            "with --dataset"
        )
    if name == "folder":
        return _recorded(form, training, data_dir) if learnt == "folder" else _folder(form, data_dir, track)
    return _published(form, name, training if name == learnt else None, data_dir)


def _training(form: Form) -> dict[str, Any]:
    """What the artefact says of its training; a checkpoint says more than the files made of it."""
    if form.path.suffix != ".pt":
        return form.provenance.get("training", {})
    from train.checkpoint import load_checkpoint

    return load_checkpoint(form.path).config


def _recorded(form: Form, training: dict[str, Any], data_dir: Path | None) -> Judged:
    """The test images of the run, from its record."""
    if not training.get("split"):
        raise Refusal(
            f"{form.path} does not record which images it was trained on, so that none can be told to be new to it: "
            "train it again"
        )
    if data_dir is None and not training.get("data_dir"):
        raise Refusal(f"{form.path} does not say where its photographs lie: name their folder with --data-dir")
    dataset = data.load_as_trained(
        training, data_dir=data_dir, beside=form.path.parent, image_size=form.spec.image.height
    )
    what = "test images that its run recorded, which training has not seen"
    return _judged(form, what, "folder", dataset.test, dataset.info.labels)


def _folder(form: Form, data_dir: Path | None, track: Callable[[str], Track]) -> Judged:
    """All images of a folder, or the test images where it names them; nobody knows whether they were trained on."""
    if data_dir is None:
        raise Refusal("--dataset folder needs --data-dir, a directory with one folder of images per class")
    labels = tuple(folder.name for folder in class_folders(data_dir))
    found = find_files(data_dir, labels, form.spec.image, skip_unreadable=True, track=track("reading images"))
    what = "images in its test folder" if found.test else "images, all of the folder"
    what += "; no record says whether the model was trained on them"
    return _judged(form, what, "folder", found.test or found.train, labels, found.left_out)


def _published(form: Form, name: str, training: dict[str, Any] | None, data_dir: Path | None) -> Judged:
    """The test images of a data set with a name; `training` where the model was trained on it."""
    dataset = data.load_as_trained(training, data_dir=data_dir) if training else data.load(name, data_dir=data_dir)
    image = form.spec.image
    found, needed = dataset.test.first(1).shape[1:], (image.height, image.width, image.channels)
    if found != needed:
        raise Refusal(f"{name} has images of {_shape(found)}, and {form.path} takes {_shape(needed)}")
    return _judged(form, f"test images of {name}", name, dataset.test, dataset.info.labels)


def _judged(
    form: Form,
    what: str,
    dataset: str,
    part: data.Part,
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
