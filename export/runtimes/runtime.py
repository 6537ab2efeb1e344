"""The interface of every runtime to parity and to the server: images in, logits out, and probabilities of these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.spec import Spec
from export.model_file.reading import Reading


@dataclass(frozen=True)
class Model:
    """The description of an exported file, by its own record."""

    name: str  # "DiracNet-16-1", or the file's stem for a third-party net
    digest: str  # sha256 of the artefact, hex
    spec: Spec
    provenance: dict[str, Any]  # the records of training, fold and export; empty for a third-party net
    num_bytes: int = 0  # of the artefact
    reading: Reading | None = None  # of a third-party net

    @property
    def gives_probabilities(self) -> bool:
        """Whether the net's outputs are probabilities already."""
        return self.reading is not None and self.reading.scores == "probabilities"

    def probabilities(self, values: np.ndarray) -> np.ndarray:
        """Finite outputs of the net [N, K] → probabilities, float64 [N, K]."""
        return probabilities(values, temperature=self.spec.temperature, are_probabilities=self.gives_probabilities)


class Runtime(Protocol):
    """An exported file made callable. Safe to call from one thread at a time; what it holds is freed with it."""

    model: Model
    platform: str  # for programs, as the Open Inference Protocol spells it: "onnxruntime_onnx"
    description: str  # for people: "ONNX Runtime, CPUExecutionProvider"
    library: str  # for the log and never for clients: "onnxruntime 1.31.1"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] → logits float32 [N, K], for any N ≥ 1."""
        ...


def answer_in_pieces(
    answer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, largest: int, size_of: Callable[[int], int]
) -> np.ndarray:
    """Answers [N, K] of a library with fixed batch sizes, in pieces of at most `largest` images.

    A piece of n images is padded to `size_of(n)`.
    """
    pieces = [images[start : start + largest] for start in range(0, len(images), largest)]
    return np.concatenate([answer(pad(piece, size_of(len(piece))))[: len(piece)] for piece in pieces])


def pad(images: np.ndarray, batch: int) -> np.ndarray:
    """At least `batch` images: black ones are added at the end."""
    missing = max(0, batch - len(images))
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])


def next_power_of_two(num: int) -> int:
    return 1 << (num - 1).bit_length()


def probabilities(values: np.ndarray, *, temperature: float = 1.0, are_probabilities: bool = False) -> np.ndarray:
    """Finite logits [N, K], or probabilities already, → probabilities, float64 [N, K]: softmax(logits / temperature).

    `temperature` comes from the model's spec; probabilities are returned unchanged.
    """
    values = values.astype(np.float64)
    if are_probabilities:
        return values
    powers = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def without_temperature(values: np.ndarray, temperature: float) -> np.ndarray:
    """`values`, probabilities float64 [N, K] with a temperature, as they would be with a temperature of 1."""
    # A row's softmax is exp(z / T) / S, and 1 / S is common to its classes: the largest is 1, so that a power is left.
    powers = (values / values.max(axis=1, keepdims=True)) ** temperature
    return powers / powers.sum(axis=1, keepdims=True)


def best(values: np.ndarray, num: int) -> np.ndarray:
    """int64 [N, num]: the classes of the largest values [N, K], the largest first; of equal ones the lower index."""
    return np.argsort(-values, axis=1, kind="stable")[:, :num]
