"""How to read a third-party classifier: hints from its user, from files beside it and from its exporter."""

import ast
import json
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from common.documents import is_of, read_json, read_object, wrong_fields
from common.files import read_labels, read_whole
from common.refusal import Refusal

Channels = Literal["rgb", "bgr"]
Scores = Literal["logits", "probabilities"]
_COMMAND_LINE, _ASSUMED = "the command line", "assumed"  # sources
_CONFIGS = ("preprocessor_config.json", "config.json")
# Log-softmax outputs are valid logits: their softmax gives the same probabilities.
_SCORES_OF: dict[str, Scores] = {"Softmax": "probabilities", "Sigmoid": "probabilities", "LogSoftmax": "logits"}


@dataclass(frozen=True, kw_only=True)
class ReadingFlags:
    """The flags of every command that takes a third-party net: how to read it."""

    mean: Annotated[tuple[float, ...], "third-party net: subtracted from each channel; black is 0, white 1"] = ()
    std: Annotated[tuple[float, ...], "third-party net: each channel is then divided by it"] = ()
    resize: Annotated[int | None, "third-party net: pixels of the shorter side before the centre is cropped"] = None
    labels: Annotated[Path | None, "third-party net: a text file with one label a line"] = None
    channels: Annotated[Channels | None, "third-party net: the order of its channels"] = None
    probabilities: Annotated[bool, "third-party net: it gives probabilities"] = False
    logits: Annotated[bool, "third-party net: it gives logits, whatever its last node"] = False
    output: Annotated[str | None, "third-party net: the name of the output that holds the classes"] = None
    temperature: Annotated[float | None, "third-party net: its logits are divided by it before the softmax"] = None


@dataclass(frozen=True)
class ReadingHints:
    """What is known about how to read a net; None for a field that is unknown."""

    mean: tuple[float, ...] | None = None  # of each channel, in units of full scale
    std: tuple[float, ...] | None = None
    resize: int | None = None  # as in `ImageSpec`
    labels: tuple[str, ...] | None = None
    channels: Channels | None = None
    scores: Scores | None = None
    output: str | None = None
    temperature: float | None = None  # as in `Spec`
    sources: dict[str, str] = field(default_factory=dict)  # of each field that is known

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "sources" and value is not None}

    @property
    def flags(self) -> str:
        """The flags that give these hints, for messages."""
        return ", ".join(f"--{name}" for name in sorted(self.sources))

    def over(self, other: "ReadingHints") -> "ReadingHints":
        """These hints, completed by those of `other`."""
        return replace(other, **self.given, sources=other.sources | self.sources)

    def by(self, source: str) -> "ReadingHints":
        """The same hints, given by `source`."""
        return replace(self, sources=dict.fromkeys(self.given, source))

    def to_json(self) -> str:
        """The content of the description beside a model."""
        return json.dumps(self.given, indent=1, ensure_ascii=False) + "\n"


NO_HINTS = ReadingHints()


@dataclass(frozen=True)
class Reading:
    """How pixels become the input of a third-party net, how to read its output, and the source of each fact.

    `mean` and `std` are empty if the graph normalises by itself, as one that takes uint8 does.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    channels: Channels
    scores: Scores
    sources: dict[str, str]  # of each field, and of the labels

    @property
    def assumed(self) -> list[str]:
        """The fields without a source."""
        return [name for name, source in self.sources.items() if source == _ASSUMED]

    def __str__(self) -> str:
        """In one line, for people."""
        shown = {
            "mean": f"mean {numbers_text(self.mean)}",
            "std": f"std {numbers_text(self.std)}",
            "resize": f"shorter side {self.resize}, centre cropped" if self.resize else "images stretched to its input",
            "channels": self.channels.upper(),
            "scores": f"answers {self.scores}",
            "labels": "labels 'class N'",
        }
        assumed = ", ".join(shown[name] for name in self.assumed)
        said = ", ".join(f"{name} by {source}" for name, source in self.sources.items() if source != _ASSUMED)
        return "; ".join(f"{kind}: {part}" for kind, part in (("assumed", assumed), ("said", said)) if part)


def decide_reading(hints: ReadingHints, dtype: str, num_channels: int, last_kind: str) -> Reading:
    """The reading of a net with inputs of `dtype`, whose last node is of `last_kind`; refuses hints that do not fit."""
    is_float = dtype != "uint8"
    sources = dict.fromkeys(("mean", "std", "resize", "channels", "scores", "labels"), _ASSUMED)
    sources |= {name: source for name, source in hints.sources.items() if name != "output"}
    if not is_float:
        if by_hand := [f"--{name}" for name in ("mean", "std") if sources[name] == _COMMAND_LINE]:
            raise Refusal(f"the net takes uint8 and normalises by itself; leave {' and '.join(by_hand)} out")
        sources |= {"mean": "the graph", "std": "the graph"}
    if hints.scores is None and last_kind in _SCORES_OF:
        sources["scores"] = f"the graph's last node, {last_kind}"
    if num_channels == 1:
        sources["channels"] = "the graph"
        if hints.channels == "bgr":
            raise Refusal("the net takes one channel, and bgr is an order of three; leave --channels out")
    for name, values in (("mean", hints.mean), ("std", hints.std)):
        if values is not None and len(values) != num_channels and is_float:
            raise Refusal(f"{name} needs a value for each channel, {num_channels} in all, got {numbers_text(values)}")
    scores = hints.scores or _SCORES_OF.get(last_kind, "logits")
    if hints.temperature is not None and scores == "probabilities":
        raise Refusal("the net gives probabilities, and a temperature is for logits; leave --temperature out")
    mean, std = (hints.mean or (0.0,) * num_channels, hints.std or (1.0,) * num_channels) if is_float else ((), ())
    return Reading(mean, std, hints.resize, hints.channels or "rgb", scores, sources)


def from_flags(flags: ReadingFlags) -> ReadingHints:
    """The hints in a command's flags."""
    if flags.probabilities and flags.logits:
        raise Refusal("--probabilities and --logits exclude each other; give one of them")
    unchanged = {name: getattr(flags, name) for name in ("resize", "channels", "output", "temperature")}
    labels = read_labels(flags.labels) if flags.labels else None
    scores = "probabilities" if flags.probabilities else "logits" if flags.logits else None
    hints = ReadingHints(flags.mean or None, flags.std or None, labels=labels, scores=scores, **unchanged)
    return hints.by(_COMMAND_LINE)


def description_path(model: Path) -> Path:
    """model.onnx → model.onnx.json"""
    return model.with_name(model.name + ".json")


def descriptions(model: Path) -> list[Path]:
    """The files beside a model that hold hints."""
    return [file for file in (description_path(model), *map(model.with_name, _CONFIGS)) if file.is_file()]


def find_hints(path: Path, metadata: dict[str, str]) -> ReadingHints:
    """All hints but the user's: from model.onnx.json first, then its metadata, then configs beside it."""
    hints = read_description(description_path(path)) if description_path(path).exists() else NO_HINTS
    return hints.over(_of_ultralytics(metadata)).over(_of_configs(path))


def read_description(path: Path) -> ReadingHints:
    """The hints that export/describe.py wrote; refuses unknown fields and wrong types."""
    again = "write it again with export/describe.py"
    record = read_object(read_whole(path), str(path), todo=again)
    # None is that of a field that the description leaves out.
    kinds = {known.name: get_args(known.type)[0] for known in fields(ReadingHints) if known.name != "sources"}
    if unknown := sorted({*record} - {*kinds}):
        known = ", ".join(sorted(kinds))
        raise Refusal(f"{path} has the unknown fields {', '.join(unknown)}; known are {known}; {again}")
    if wrong := wrong_fields(record, kinds):
        raise Refusal(f"{path} is not a valid description: {'; '.join(wrong)}; {again}")
    try:
        numbers = {name: _floats(record[name]) for name in ("mean", "std") if name in record}
    except OverflowError as error:  # JSON has no largest number
        raise Refusal(f"{path} is not a valid description: {error}; {again}") from error
    labels = {"labels": tuple(record["labels"])} if "labels" in record else {}
    return ReadingHints(**{**record, **numbers, **labels}).by(path.name)


def numbers_text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _of_ultralytics(metadata: dict[str, str]) -> ReadingHints:
    """Its classifiers are trained on crops of x / 255, and its exporter writes the labels as a Python dict."""
    if metadata.get("task") != "classify" or "names" not in metadata:
        return NO_HINTS
    try:
        names, sizes = (ast.literal_eval(text) for text in (metadata["names"], metadata.get("imgsz", "[]")))
        labels = tuple(str(names[index]) for index in range(len(names)))
    except (ValueError, SyntaxError, KeyError, TypeError):
        return NO_HINTS
    resize = max(sizes) if isinstance(sizes, list) and sizes else None
    channels = 1 if metadata.get("channels") == "1" else 3
    hints = ReadingHints((0.0,) * channels, (1.0,) * channels, resize, labels, channels="rgb")
    return hints.by("Ultralytics' metadata in the file")


def _of_configs(path: Path) -> ReadingHints:
    """Configs of Hugging Face or timm beside a model; a file of another program with such a name gives no hints."""
    hints = NO_HINTS
    for name, read in zip(_CONFIGS, (_of_preprocessor, _of_config), strict=True):
        if (file := path.with_name(name)).is_file():
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                hints = hints.over(read(read_json(read_whole(file))).by(name))
    return hints


def _of_preprocessor(record: dict[str, Any]) -> ReadingHints:
    """Hugging Face's image processor."""
    mean = std = None
    if record.get("do_normalize", True) and "image_mean" in record:
        mean, std = _floats(record["image_mean"]), _floats(record["image_std"])
    size = record.get("size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    if shorter and not record.get("do_center_crop"):
        shorter = int(shorter / record["crop_pct"]) if "crop_pct" in record else None
    return ReadingHints(mean, std, shorter)


def _of_config(record: dict[str, Any]) -> ReadingHints:
    """Labels of Hugging Face's config.json; labels and preprocessing of timm's."""
    timm = record.get("pretrained_cfg")
    names = record.get("id2label", record.get("label_names") if timm else None)
    hints = ReadingHints(labels=None if names is None else _by_index(names))
    if timm:
        is_cropped = timm.get("crop_mode", "center") == "center"
        resize = int(timm["input_size"][-1] / timm["crop_pct"]) if is_cropped else None
        hints = replace(hints, mean=_floats(timm["mean"]), std=_floats(timm["std"]), resize=resize)
    return hints


def _by_index(names: Any) -> tuple[str, ...]:
    """Labels in a list, or in a dict by their index as JSON writes it."""
    return tuple(str(names[str(index)] if isinstance(names, dict) else names[index]) for index in range(len(names)))


def _floats(values: Any) -> tuple[float, ...]:
    if not is_of(values, tuple[float, ...]):
        raise TypeError(f"{values!r} is not a list of numbers")
    return tuple(map(float, values))
