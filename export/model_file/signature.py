"""A classifier as every command sees it: one input of images, one output with a value for each class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from export.model_file.onnx_reader import Header, OnnxGraph
from export.model_file.reading import NO_HINTS, Reading, ReadingHints, decide_reading, find_hints

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    dtype: str  # as numpy spells it
    shape: tuple[int | None, ...]  # None where it is free

    @property
    def num_classes(self) -> int | None:
        """Of an output [N, K] or [N, K, 1, 1]; 1 if it is not a classifier's, None if the graph does not say."""
        if self.dtype not in _FLOATS or len(self.shape) < 2 or any(size not in (1, None) for size in self.shape[2:]):
            return 1
        return self.shape[1]

    @property
    def shown(self) -> list[int | str]:
        """The shape, for messages."""
        return [size or "N" for size in self.shape]


@dataclass(frozen=True)
class Signature:
    """One input of images, one output of logits.

    A net of this project takes `images` uint8 [N, H, W, C]. A third-party net may take uint8 or float, [N, H, W, C] or
    [N, C, H, W]; `reading` says how pixels become its input and how to read its output.
    """

    input_name: str
    output_name: str
    dtype: str  # uint8, float16 or float32
    shape: tuple[int | None, ...]  # of the input; None where it is free
    reading: Reading | None = None  # of a third-party net

    def __post_init__(self) -> None:
        takes = f"the net takes {self.input_name} {[size or 'N' for size in self.shape]}"
        if self.dtype not in ("uint8", "float16", "float32"):
            raise Refusal(f"the net takes {self.dtype}; images must be uint8, float32 or float16")
        if len(self.shape) != 4 or None in self.shape[1:]:
            raise Refusal(f"{takes}; export it with a fixed height, width and channels")
        if self.shape[3] not in (1, 3) and self.shape[1] not in (1, 3):
            raise Refusal(f"{takes}; images have 1 or 3 channels")

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Signature":
        """The inverse of `dataclasses.asdict`, after a round through JSON."""
        reading = record.get("reading")
        if reading:
            reading = Reading(**{**reading, "mean": tuple(reading["mean"]), "std": tuple(reading["std"])})
        return cls(**{**record, "shape": tuple(record["shape"]), "reading": reading})

    @property
    def batch(self) -> int | None:
        """The only batch size that the net takes, or None if it takes any."""
        return self.shape[0]

    @property
    def channels_first(self) -> bool:
        return self.shape[3] not in (1, 3)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, first, second, third = (size or 0 for size in self.shape)
        return (second, third, first) if self.channels_first else (first, second, third)

    def to_input(self, images: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, H, W, C] → what the net takes, in C order."""
        reading = self.reading
        x = images[..., ::-1] if reading and reading.channels == "bgr" else images
        if self.dtype != "uint8":
            x = x.astype(np.float32) / np.float32(255)
            if reading:
                x = (x - np.asarray(reading.mean, np.float32)) / np.asarray(reading.std, np.float32)
        x = x.transpose(0, 3, 1, 2) if self.channels_first else x
        return np.ascontiguousarray(x, dtype=self.dtype)


def find_signature(
    path: Path, header: Header, graph: OnnxGraph, inputs: Sequence[Value], outputs: Sequence[Value], hints: ReadingHints
) -> tuple[Signature, ReadingHints]:
    """The signature of the classifier in `path`, and all hints on it; `hints` are its user's. Refuses other graphs."""
    if header.spec is None:
        hints = hints.over(find_hints(path, header.metadata))
    elif hints.sources:
        raise Refusal(f"{path} says itself how it is read; leave {hints.flags} out")
    if len(inputs) != 1:
        raise Refusal(f"{path} has {len(inputs)} inputs; a classifier has one input of images")
    if nodes := graph.in_training_mode():
        raise Refusal(
            f"{path} was exported in training mode: the batch norm {nodes[0]} normalizes with the other images of its "
            "batch, so that an image's answer depends on them; call net.eval() and export it again"
        )
    try:
        output = _choose_output(outputs, hints.output)
        signature = Signature(inputs[0].name, output.name, inputs[0].dtype, inputs[0].shape)
        if header.spec is not None:
            return signature, NO_HINTS
        reading = decide_reading(hints, signature.dtype, signature.sizes[2], graph.last_kind(output.name))
        return replace(signature, reading=reading), hints
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal


def find_spec(path: Path, header: Header, signature: Signature, hints: ReadingHints, num_classes: int) -> Spec:
    """The spec in the file, or one made from all hints; refuses labels that do not fit."""
    if num_classes < 2:
        raise Refusal(f"{path} gives {num_classes} value per image; a classifier gives one per class")
    reading = signature.reading
    if reading is None:  # of this project
        assert header.spec
        if (num := len(header.spec.labels)) != num_classes:
            raise Refusal(f"{path}: its spec has {num} labels, its graph {num_classes} logits; export it again")
        return header.spec
    labels = tuple(f"class {index}" for index in range(num_classes)) if hints.labels is None else hints.labels
    if (num := len(labels)) != num_classes:
        given = f"{reading.sources['labels']} gives {num} labels"
        raise Refusal(f"{path}: the net has {num_classes} classes, and {given}; give one for each")
    height, width, channels = signature.sizes
    mean, std = reading.mean or (0.0,) * channels, reading.std or (1.0,) * channels
    try:
        image = ImageSpec(height, width, channels, mean, std, reading.resize)
        return Spec.of_net("", image, labels, 1.0 if hints.temperature is None else hints.temperature)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal


def _choose_output(outputs: Sequence[Value], asked: str | None) -> Value:
    """The output that holds the classes: the one asked for, or the only one that can."""
    names = ", ".join(output.name for output in outputs)
    if asked not in (None, *(output.name for output in outputs)):
        raise Refusal(f"it has no output {asked}; choose one of {names} with --output")
    able = [output for output in outputs if (output.num_classes or 2) > 1 and asked in (None, output.name)]
    if not able:
        shown = "; ".join(f"{output.name} {output.dtype} {output.shown}" for output in outputs)
        raise Refusal(f"its outputs are {shown}; a classifier's is [N, K], one float for each of its K classes")
    if len(able) > 1:
        raise Refusal(f"it has the outputs {names}; choose the one that holds the classes with --output NAME")
    return able[0]
