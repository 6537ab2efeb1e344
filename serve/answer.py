"""From logits to the answer of `POST /predict`."""

from dataclasses import dataclass

import numpy as np

from export.runtimes.runtime import Model
from serve.problems import NOT_A_NUMBER, Problem


@dataclass(frozen=True)
class ModelName:
    """Which model answered; `digest` is the sha256 of its file."""

    name: str
    digest: str


@dataclass(frozen=True)
class Guess:
    """One class and the probability the model gives it."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Result:
    """The most probable class of one image, and the best `top_k`, the most probable first."""

    label: str
    index: int
    probability: float
    top: list[Guess]


@dataclass(frozen=True)
class Prediction:
    """One result per image, in the order of the request."""

    model: ModelName
    results: list[Result]


def answer(model: Model, logits: np.ndarray, *, top_k: int) -> Prediction:
    """Logits [N, K] → the answer; `top_k` above K gives all K classes."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise Problem(NOT_A_NUMBER, f"image {bad[0]} overflows {model.name}; export the model in a higher precision")
    results = [_result(row, model.spec.labels, top_k) for row in softmax(logits)]
    return Prediction(ModelName(model.name, model.digest), results)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[N, K] → float64 [N, K], each row summing to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _result(probabilities: np.ndarray, labels: tuple[str, ...], top_k: int) -> Result:
    order = np.argsort(-probabilities, kind="stable")[:top_k]  # equal classes: the lower index first
    top = [Guess(labels[index], int(index), float(probabilities[index])) for index in order]
    return Result(top[0].label, top[0].index, top[0].probability, top)
