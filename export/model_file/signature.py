"""What an exported net takes and gives, ours or somebody else's, and how pixels become its input."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from export.model_file.described import Channels, Described, Scores


@dataclass(frozen=True)
class Reading:
    """How pixels become the input of somebody else's net, how its output is read, and who says so.

    `mean` and `std` are empty where the graph normalises by itself, which one that takes uint8 does.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    channels: Channels
    scores: Scores
    sources: dict[str, str]  # field → who says it; labels too

    @property
    def assumed(self) -> list[str]:
        """The fields that nobody says."""
        return [name for name, source in self.sources.items() if source == ASSUMED]

    def __str__(self) -> str:
        """In one line, for people."""
        shown = {
            "mean": f"mean {_listed(self.mean)}",
            "std": f"std {_listed(self.std)}",
            "resize": f"shorter side {self.resize}, centre cropped" if self.resize else "images stretched to its input",
            "channels": self.channels.upper(),
            "scores": f"answers {self.scores}",
            "labels": "labels 'class N'",
        }
        assumed = [shown[name] for name in self.assumed]
        said = [f"{name} by {source}" for name, source in self.sources.items() if source != ASSUMED]
        parts = [f"assumed: {', '.join(assumed)}"] if assumed else []
        return "; ".join(parts + ([f"said: {', '.join(said)}"] if said else []))


ASSUMED = "assumed"


@dataclass(frozen=True)
class Signature:
    """One input of images, one output of logits.

    A net of ours takes `images` uint8 [N, H, W, C]. Somebody else's may take uint8 or float,
    [N, H, W, C] or [N, C, H, W]; `reading` says how pixels become its input and how its output is read.
    """

    input_name: str
    output_name: str
    dtype: str  # uint8, float16 or float32
    shape: tuple[int | None, ...]  # of the input; None where it is free
    reading: Reading | None = None  # of somebody else's net

    def __post_init__(self) -> None:
        shown = [size or "N" for size in self.shape]
        if self.dtype not in ("uint8", "float16", "float32"):
            raise Refusal(f"the net takes {self.dtype}; images must be uint8, float32 or float16")
        if len(self.shape) != 4 or None in self.shape[1:]:
            raise Refusal(f"the net takes {self.input_name} {shown}; export it with a fixed height, width and channels")
        if self.shape[3] not in (1, 3) and self.shape[1] not in (1, 3):
            raise Refusal(f"the net takes {self.input_name} {shown}; images have 1 or 3 channels")

    @property
    def batch(self) -> int | None:
        """The only batch size that the net takes, or None where any will do."""
        return self.shape[0]

    @property
    def channels_first(self) -> bool:
        return self.shape[3] not in (1, 3)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, *sizes = (size or 0 for size in self.shape)
        return (sizes[1], sizes[2], sizes[0]) if self.channels_first else (sizes[0], sizes[1], sizes[2])

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

    def to_output(self, logits: np.ndarray) -> np.ndarray:
        """What the net gives, [N, K] with any number of ones behind it → float32 [N, K]."""
        return np.asarray(logits).reshape(len(logits), -1).astype(np.float32, copy=False)

    @property
    def scores(self) -> Scores:
        return self.reading.scores if self.reading else "logits"


def read_as(signature: Signature, said: Described, *, last_kind: str) -> Reading:
    """How somebody else's net is read, from what is said of it and the kind of its last node."""
    num = signature.sizes[2]
    sources = dict.fromkeys(("mean", "std", "resize", "channels", "scores", "labels"), ASSUMED)
    given = {name: source for name, source in said.sources if name in (*sources, "temperature")}
    if signature.dtype == "uint8":
        if by_hand := [f"--{name}" for name in ("mean", "std") if given.get(name) == "the command line"]:
            raise Refusal(f"the net takes uint8 and normalises by itself; leave {' and '.join(by_hand)} out")
        given |= {"mean": "the graph", "std": "the graph"}
    if said.scores is None and last_kind in _SCORES:
        given["scores"] = f"the graph's last node, {last_kind}"
    if num == 1:
        given["channels"] = "the graph"
        if said.channels == "bgr":
            raise Refusal("the net takes one channel, and bgr is an order of three; leave --channels out")
    for name, values in (("mean", said.mean), ("std", said.std)):
        if values is not None and len(values) != num and signature.dtype != "uint8":
            raise Refusal(f"{name} needs {num} value{'s' * (num > 1)}, one for each channel, got {_listed(values)}")
    is_float, scores = signature.dtype != "uint8", said.scores or _SCORES.get(last_kind, "logits")
    if said.temperature is not None and scores == "probabilities":
        raise Refusal("the net gives probabilities, and a temperature is for logits; leave --temperature out")
    return Reading(
        mean=(said.mean or (0.0,) * num) if is_float else (),
        std=(said.std or (1.0,) * num) if is_float else (),
        resize=said.resize,
        channels=said.channels or "rgb",
        scores=scores,
        sources={**sources, **given},
    )


# Log-softmax gives logits as good as any: their softmax is what it is the logarithm of.
_SCORES: dict[str, Scores] = {"Softmax": "probabilities", "Sigmoid": "probabilities", "LogSoftmax": "logits"}


def generic_spec(
    signature: Signature, *, num_classes: int, labels: tuple[str, ...] | None = None, temperature: float | None = None
) -> Spec:
    """The spec of somebody else's net: labels by number unless they are said."""
    height, width, channels = signature.sizes
    reading = signature.reading
    if labels is not None and len(labels) != num_classes:
        source = reading.sources["labels"] if reading else "the command line"
        raise Refusal(f"the net has {num_classes} classes, and {source} gives {len(labels)} labels; give one for each")
    image = ImageSpec(
        height,
        width,
        channels,
        mean=(reading and reading.mean) or (0.0,) * channels,
        std=(reading and reading.std) or (1.0,) * channels,
        resize=reading.resize if reading else None,
    )
    return Spec(
        family="unknown",
        depth=0,
        width=0.0,
        nonlinearity="relu",
        image=image,
        labels=labels or tuple(f"class {index}" for index in range(num_classes)),
        temperature=1.0 if temperature is None else temperature,
    )


def signature_of(record: dict[str, Any]) -> Signature:
    """The inverse of `dataclasses.asdict`, after a round through JSON."""
    reading = record.get("reading")
    if reading:
        reading = Reading(**{**reading, "mean": tuple(reading["mean"]), "std": tuple(reading["std"])})
    return Signature(**{**record, "shape": tuple(record["shape"]), "reading": reading})


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def pad(images: np.ndarray, batch: int) -> np.ndarray:
    """At least `batch` images, black ones at the end."""
    missing = max(0, batch - len(images))
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
