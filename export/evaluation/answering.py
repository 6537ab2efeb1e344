"""Images answered one batch after the other, and which images a model is evaluated on.

Never those that it was trained on, if that is known.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from rich.console import Console

from common.environment import num_cores
from common.files import read_whole
from common.image import decode
from common.progress import track
from common.refusal import Refusal, first_of
from common.spec import DatasetName, ImageSpec, Published
from export.artefacts import Artefact
from export.runtimes.cascade import Cascade
from export.runtimes.runtime import probabilities
from train.data import datasets, folder

BATCH_SIZE = 32  # as the server's; the pixels of two batches are in memory at once

Item = TypeVar("Item")


def answer_each(
    form: Artefact, items: Sequence[Item], load: Callable[[Item], np.ndarray]
) -> Iterator[np.ndarray | Refusal]:
    """In the order of `items`: probabilities float64 [K], or why there are none.

    `load` gives an item's pixels uint8 [H, W, C] or raises a `Refusal`; it is called from several threads.
    """
    with ThreadPoolExecutor(num_cores()) as pool:

        def submit(start: int) -> list[Future[np.ndarray]]:
            return [pool.submit(load, item) for item in items[start : start + BATCH_SIZE]]

        try:
            ahead = submit(0)
            for start in range(0, len(items), BATCH_SIZE):
                batch, ahead = ahead, submit(start + BATCH_SIZE)
                yield from _answer(form, batch)
        finally:
            pool.shutdown(cancel_futures=True)


def _answer(form: Artefact, batch: list[Future[np.ndarray]]) -> Iterator[np.ndarray | Refusal]:
    images = [future.result() for future in batch if not isinstance(future.exception(), Refusal)]
    rows = iter(form.answer(np.stack(images)) if images else ())
    for future in batch:
        if isinstance(refusal := future.exception(), Refusal):
            yield refusal
        elif np.isfinite(row := next(rows)).all():
            yield probabilities(
                row[None], temperature=form.spec.temperature, are_probabilities=form.gives_probabilities
            )[0]
        else:
            yield Refusal("the model answers with values that are not numbers")


def mirrored(form: Artefact) -> Artefact:
    """`form` with the mean of its outputs for an image and for its mirror image.

    Refuses a model whose training did not mirror images, and a cascade.
    """
    if isinstance(form.answer, Cascade):
        raise Refusal("a cascade keeps float32's class of one image, not of two: leave --flips or --cascade out")
    training = form.provenance.get("training", {})
    dataset, choice = training.get("dataset"), training.get("flip", "auto")
    if choice == "no" or (choice == "auto" and dataset in get_args(Published) and not datasets.info_of(dataset).flip):
        raise Refusal(f"{form.path} was not trained on mirror images, which may have other labels: leave --flips out")

    def answer(images: np.ndarray) -> np.ndarray:
        return (form.answer(images) + form.answer(np.ascontiguousarray(images[:, :, ::-1]))) / 2

    return replace(form, answer=answer)


@dataclass(frozen=True)
class Judged:
    """Images of known classes: `what` they are, in words, and `targets` int64 [N], places in the model's labels."""

    what: str
    dataset: str
    part: datasets.Part
    targets: np.ndarray
    image: ImageSpec
    left_out: tuple[folder.LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self.part.names[index] if isinstance(self.part, folder.Files) else f"image {index}"

    def pixels(self, index: int, *, shorter_side: int = 0) -> np.ndarray:
        """uint8 [H, W, C] as the net takes them; a file's as many whole times larger as a `shorter_side` needs."""
        if not isinstance(self.part, folder.Files):
            return np.asarray(self.part.images[index])
        times = max(1, -(-shorter_side // min(self.image.height, self.image.width)))
        sides = {name: getattr(self.image, name) for name in ("height", "width", "resize")}
        larger = replace(self.image, **{name: side and side * times for name, side in sides.items()})
        return decode(read_whole(Path(self.part.paths[index])), larger)


def find_judged(
    form: Artefact,
    *,
    dataset: DatasetName | None = None,
    data_dir: Path | None = None,
    track: folder.Track = lambda items, total: items,
) -> Judged:
    """The test images of the model's run, or of the named data set; a folder without a record as a whole.

    Of another folder than the run's, all images except those that the run trained on. Refuses the run's folder if it
    does not fit its record, and a folder without a class that the model has.
    """
    training = form.provenance.get("training", {})
    if form.path.suffix == ".pt":  # a checkpoint says more than the files made from it
        training = form.source.config
    learnt = training.get("dataset")
    name = dataset or learnt or ("folder" if data_dir else None)
    if name is None:
        raise Refusal(f"{form.path} does not say what it was trained on: name images with --dataset or --data-dir")
    if name != "folder":
        return _published(form, name, training if name == learnt else None, data_dir)
    if learnt != "folder":
        return _folder(form, data_dir, track)
    split = training.get("split")
    digest = split.get("sha256", "") if isinstance(split, dict) else ""
    parts = folder.read_record(form.path.parent / folder.FILE, digest)
    if data_dir and parts:
        sizes = {name: size for part in parts.values() for name, size in part.items()}
        num_there = sum(datasets.num_bytes(data_dir / name) == size for name, size in sizes.items())
        if 2 * num_there < len(sizes):  # else it is the run's folder, grown or changed
            return _another(form, parts, data_dir, track)
    return _recorded(form, training, data_dir)


def answer_judged(form: Artefact, judged: Judged, console: Console) -> tuple[np.ndarray, list[int], dict[str, str]]:
    """(probabilities [N, K], the index of each among the judged, name of an image → why it has no answer)."""
    strangers = [stranger for stranger in judged.left_out if stranger.why != folder.UNREADABLE]
    for line in folder.describe_left_out(strangers):
        console.print(line)
    found = track(console, "answering")(answer_each(form, range(len(judged)), judged.pixels), len(judged))
    answers: dict[int, np.ndarray] = {}
    unreadable = {str(stranger.path): stranger.why for stranger in judged.left_out if stranger.why == folder.UNREADABLE}
    for index, answer in enumerate(found):
        if isinstance(answer, Refusal):
            unreadable[judged.name(index)] = str(answer)
        else:
            answers[index] = answer
    if not answers:
        raise Refusal(f"none of the {len(judged)} images could be answered: {next(iter(unreadable.values()), '')}")
    return np.stack([*answers.values()]), [*answers], unreadable


def _recorded(form: Artefact, training: dict[str, Any], data_dir: Path | None) -> Judged:
    """The test images of the run, from its record."""
    if not training.get("split"):
        raise Refusal(f"{form.path} does not record which images it was trained on: train it again")
    if data_dir is None and not training.get("data_dir"):
        raise Refusal(f"{form.path} does not say where its photographs lie: name their folder with --data-dir")
    image = form.spec.image
    dataset = datasets.load_as_trained(training, data_dir=data_dir, beside=form.path.parent, image=image)
    what = "test images that its run recorded, which training has not seen"
    return _judged(form, what, dataset.test, dataset.info.labels)


def _another(form: Artefact, parts: dict[str, folder.Sizes], data_dir: Path, track: folder.Track) -> Judged:
    """The images of another folder, or of its test part, whose class the model has and that it was not trained on.

    An image of the run is recognised by class, name and size, wherever it lies.
    """
    labels, known = tuple(place.name for place in folder.class_folders(data_dir)), form.spec.labels
    if not set(labels) & set(known):
        _places(labels, form, by_number=False)  # refuses
    image = form.spec.image
    found, left_out, _ = folder.find_files(data_dir, labels, image, skip_unreadable=True, track=track, partial=True)
    part, kept = found.get("test") or found["train"], list[int]()
    trained = {(*Path(name).parts[-2:], size) for side in ("train", "validation") for name, size in parts[side].items()}
    for index, (path, target) in enumerate(zip(map(Path, part.paths), part.targets, strict=True)):
        if labels[target] not in known:
            left_out.append(folder.LeftOut(path, f"the model has no class {labels[target]}"))
        elif (*path.parts[-2:], datasets.num_bytes(path)) in trained:
            left_out.append(folder.LeftOut(path, "the model was trained on it"))
        else:
            kept.append(index)
    if not kept:
        raise Refusal(f"no image of {data_dir} is left to judge {form.path} on: {left_out[-1].why}")
    part = part.take(np.array(kept))
    targets = np.array([known.index(labels[target]) for target in part.targets])
    what = "images of another folder than its run's, which training has not seen"
    if lacking := [label for index, label in enumerate(known) if index not in targets]:
        what += f"; there is none of {first_of(lacking, 10)}"
    return Judged(what, "folder", part, targets, image, tuple(left_out))


def _folder(form: Artefact, data_dir: Path | None, track: folder.Track) -> Judged:
    """All images of a folder, or its test images if it names them; whether they were trained on is not known."""
    labels = datasets.info_of("folder", data_dir=data_dir).labels
    assert data_dir is not None  # `info_of` refuses it
    found, left_out, _ = folder.find_files(data_dir, labels, form.spec.image, skip_unreadable=True, track=track)
    what = "images in its test folder" if found.get("test") else "images, all of the folder"
    what += "; no record says whether the model was trained on them"
    return _judged(form, what, found.get("test") or found["train"], labels, left_out=tuple(left_out))


def _published(form: Artefact, name: str, training: dict[str, Any] | None, data_dir: Path | None) -> Judged:
    """The test images of a data set with a name; `training` if the model was trained on it."""
    where: dict[str, Any] = {"data_dir": data_dir, "image": form.spec.image}
    dataset = datasets.load_as_trained(training, **where) if training else datasets.load(name, **where)
    return _judged(form, f"test images of {name}", dataset.test, dataset.info.labels, dataset=name)


def _judged(
    form: Artefact, what: str, part: datasets.Part, labels: tuple[str, ...], *, dataset: str = "folder", **more: Any
) -> Judged:
    targets = _places(labels, form, by_number=dataset != "folder")[np.asarray(part.targets)]
    return Judged(what, dataset, part, targets, form.spec.image, **more)


def _places(labels: tuple[str, ...], form: Artefact, *, by_number: bool) -> np.ndarray:
    """int64 [len(labels)]: the index of each label of a data set among the model's.

    With `by_number`, the order of the data set's own labels if the model's are numbers alone and there are as many.
    """
    known = form.spec.labels
    if missing := [label for label in labels if label not in known]:
        numbered = known == tuple(f"class {index}" for index in range(len(known)))
        if numbered and by_number and len(labels) == len(known):
            return np.arange(len(labels))
        advice = "name its labels with --labels" if numbered else "judge it on images of its own classes"
        raise Refusal(
            f"{form.path} does not answer {first_of(missing, 5)}; its labels are {first_of(known, 5)}: {advice}"
        )
    return np.array([known.index(label) for label in labels])
