"""From logits to the results of `POST /predict`."""

from collections.abc import Callable

import numpy as np
from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11

from common.spec import Spec
from export.runtimes.probabilities import best, probabilities


class ModelName(TypedDict):
    """Which model answered; `digest` is the sha256 of its file."""

    name: str
    digest: str


class Guess(TypedDict):
    """One class and the probability the model gives it."""

    label: str
    index: int
    probability: float


class Result(Guess):
    """The most probable class of one image, and the best `top_k`, the most probable first."""

    top: list[Guess]


class Prediction(TypedDict):
    """One result per image, in the order of the request."""

    model: ModelName
    results: list[Result]


def results_of(
    logits: np.ndarray,
    spec: Spec,
    top_k: list[int],
    *,
    are_probabilities: bool = False,
    observe: Callable[[np.ndarray, np.ndarray], None] = lambda order, ranked: None,
) -> list[Result]:
    """Finite logits [N, K], or probabilities, → N results; the i-th has `top_k[i]` classes, or all K.

    `observe` is called with the best two classes or more of each image, and their probabilities.
    """
    values = probabilities(logits, temperature=spec.temperature, are_probabilities=are_probabilities)
    order = best(logits, max(2, *top_k))  # no temperature moves a class
    ranked = np.take_along_axis(values, order, axis=1)
    observe(order, ranked)
    return [_result(*row, spec.labels) for row in zip(order.tolist(), ranked.tolist(), top_k, strict=True)]


def _result(order: list[int], probabilities: list[float], top_k: int, labels: tuple[str, ...]) -> Result:
    top: list[Guess] = [
        {"label": labels[index], "index": index, "probability": probability}
        for index, probability in zip(order[:top_k], probabilities, strict=False)
    ]
    return {**top[0], "top": top}
