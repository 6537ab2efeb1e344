"""What is said of somebody else's classifier: by its user, by a file beside it, or by its exporter."""

import ast
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from common.documents import read_json, read_object
from common.files import read_whole
from common.refusal import Refusal

Channels = Literal["rgb", "bgr"]
Scores = Literal["logits", "probabilities"]


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """What a command that takes somebody else's net asks its user: how the net is read."""

    mean: Annotated[tuple[float, ...], "somebody else's net: what is subtracted of each channel, black 0, white 1"] = ()
    std: Annotated[tuple[float, ...], "somebody else's net: what each channel is divided by after that"] = ()
    resize: Annotated[int | None, "somebody else's net: pixels of the shorter side before the centre is cropped"] = None
    labels: Annotated[Path | None, "somebody else's net: a text file with one label a line"] = None
    channels: Annotated[Channels | None, "somebody else's net: the order of its channels"] = None
    probabilities: Annotated[bool, "somebody else's net: it gives probabilities"] = False
    logits: Annotated[bool, "somebody else's net: it gives logits, whatever its last node is"] = False
    output: Annotated[str | None, "somebody else's net: the name of the output that holds the classes"] = None
    temperature: Annotated[float | None, "somebody else's net: its logits are divided by it before the softmax"] = None


@dataclass(frozen=True)
class Described:
    """What is said of a net, field by field; None where nothing is. `sources` says who says it."""

    mean: tuple[float, ...] | None = None  # of each channel, in units of full scale
    std: tuple[float, ...] | None = None
    resize: int | None = None  # as in `ImageSpec`
    labels: tuple[str, ...] | None = None
    channels: Channels | None = None
    scores: Scores | None = None
    output: str | None = None
    temperature: float | None = None  # as in `Spec`
    sources: tuple[tuple[str, str], ...] = ()  # field → who says it

    def over(self, other: "Described") -> "Described":
        """This, and what `other` says of the fields that this leaves open."""
        fresh = {name: value for name, value in _said(other).items() if getattr(self, name) is None}
        sources = {name: source for name, source in other.sources if name in fresh}
        return replace(self, **fresh, sources=tuple(sorted({**sources, **dict(self.sources)}.items())))

    def by(self, source: str) -> "Described":
        """The same, said by `source`."""
        return replace(self, sources=tuple((name, source) for name in _said(self)))

    def to_json(self) -> str:
        """What is said, for the file beside a model."""
        return json.dumps(_said(self), indent=1, ensure_ascii=False) + "\n"


NOTHING = Described()
_CONFIGS = ("preprocessor_config.json", "config.json")


def from_flags(flags: ReadingFlags) -> Described:
    """What a user says in a command's flags."""
    if flags.probabilities and flags.logits:
        raise Refusal("--probabilities and --logits exclude each other; give one of them")
    scores: Scores | None = "probabilities" if flags.probabilities else "logits" if flags.logits else None
    labels = read_labels(flags.labels) if flags.labels else None
    said = Described(flags.mean or None, flags.std or None, flags.resize, labels, flags.channels, scores)
    said = replace(said, output=flags.output, temperature=flags.temperature)
    return said.by("the command line")


def read_labels(path: Path) -> tuple[str, ...]:
    """One label a line; an empty line at the end is none."""
    try:
        return tuple(line.strip() for line in read_whole(path).decode("utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not a text file in UTF-8; write one label a line") from error


def description_path(model: Path) -> Path:
    """model.onnx → model.onnx.json"""
    return model.with_name(model.name + ".json")


def descriptions(model: Path) -> list[Path]:
    """The files beside a model in which something is said of it."""
    return [file for file in (description_path(model), *map(model.with_name, _CONFIGS)) if file.is_file()]


def found(path: Path, metadata: dict[str, str]) -> Described:
    """All that is said of a net without its user: by model.onnx.json, then its metadata, then files beside it."""
    said = read_description(description_path(path)) if description_path(path).exists() else NOTHING
    return said.over(_of_ultralytics(metadata)).over(_of_configs(path))


def read_description(path: Path) -> Described:
    """What export/describe.py wrote; refuses what is unknown or of the wrong type."""
    again = "write it again with export/describe.py"
    record = read_object(read_whole(path), str(path), todo=again)
    known = {field.name for field in fields(Described)} - {"sources"}
    if unknown := sorted(set(record) - known):
        raise Refusal(f"{path} says {', '.join(unknown)}, and known are {', '.join(sorted(known))}; {again}")
    try:
        return Described(**{name: _CHECKS[name](value) for name, value in record.items()}).by(path.name)
    except (TypeError, ValueError) as error:
        raise Refusal(f"{path} cannot be understood: {error}; {again}") from error


def _said(described: Described) -> dict[str, Any]:
    values = {name: value for name, value in asdict(described).items() if name != "sources"}
    return {name: value for name, value in values.items() if value is not None}


def _of_ultralytics(metadata: dict[str, str]) -> Described:
    """Its classifiers are trained on crops of x / 255, and its exporter writes the labels as a Python dict."""
    if metadata.get("task") != "classify" or "names" not in metadata:
        return NOTHING
    try:
        names = ast.literal_eval(metadata["names"])
        labels = tuple(str(names[index]) for index in range(len(names)))
        sizes = ast.literal_eval(metadata.get("imgsz", "[]"))
    except (ValueError, SyntaxError, KeyError, TypeError):
        return NOTHING
    resize = max(sizes) if isinstance(sizes, list) and sizes else None
    channels = 1 if metadata.get("channels") == "1" else 3
    said = Described(mean=(0.0,) * channels, std=(1.0,) * channels, resize=resize, labels=labels, channels="rgb")
    return said.by("Ultralytics' metadata in the file")


def _of_configs(path: Path) -> Described:
    """Files that go with a model of Hugging Face's or timm's; what cannot be read as one says nothing."""
    said = NOTHING
    for name, read in zip(_CONFIGS, (_of_preprocessor, _of_config), strict=True):
        file = path.with_name(name)
        if file.is_file():
            try:
                said = said.over(read(read_json(read_whole(file))).by(name))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # another program's file of that name
    return said


def _of_preprocessor(record: dict[str, Any]) -> Described:
    """Hugging Face's image processor."""
    if record.get("do_normalize", True) and "image_mean" in record:
        mean, std = _floats(record["image_mean"]), _floats(record["image_std"])
    else:
        mean = std = None
    size = record.get("size", {})
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    if shorter and not record.get("do_center_crop"):
        shorter = int(shorter / record["crop_pct"]) if "crop_pct" in record else None
    return Described(mean=mean, std=std, resize=shorter)


def _of_config(record: dict[str, Any]) -> Described:
    """Labels of Hugging Face's config.json; labels and preprocessing of timm's."""
    said = NOTHING
    if "id2label" in record:
        said = Described(labels=_by_index(record["id2label"]))
    timm = record.get("pretrained_cfg")
    if timm:
        size = timm["input_size"][-1]
        resize = int(size / timm["crop_pct"]) if timm.get("crop_mode", "center") == "center" else None
        labels = _by_index(record["label_names"]) if "label_names" in record else None
        said = said.over(Described(_floats(timm["mean"]), _floats(timm["std"]), resize, labels))
    return said


def _by_index(names: Any) -> tuple[str, ...]:
    """Labels that lie in a list, or in a dict by their index as JSON writes it."""
    return tuple(str(names[str(index)] if isinstance(names, dict) else names[index]) for index in range(len(names)))


def _floats(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise TypeError(f"{values!r} is not a list of numbers")
    return tuple(map(float, values))


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _labels(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of labels")
    return tuple(map(_text, values))


def _one_of(kind: Any) -> Any:
    def check(value: Any) -> Any:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is not one of {', '.join(get_args(kind))}")
        return value

    return check


_CHECKS: dict[str, Any] = {
    "mean": _floats,
    "std": _floats,
    "resize": _whole,
    "labels": _labels,
    "channels": _one_of(Channels),
    "scores": _one_of(Scores),
    "output": _text,
    "temperature": _number,
}


def said_of(path: Path, metadata: dict[str, str], by_user: Described) -> Described:
    """All that is said of a net that has no spec of ours; its user's word goes before every other."""
    return by_user.over(found(path, metadata))
