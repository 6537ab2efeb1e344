"""A loaded model, the images of one request on their way through it, and their results."""

import asyncio
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from starlette.types import Message
from typing_extensions import TypedDict  # pydantic reads no other one on Python 3.11

from export.runtimes.runtime import Model, Runtime
from serve.decode.weigh import Weight

Decoded = np.ndarray | Exception  # uint8 [H, W, C], or why there are none: a Refusal if it is the image's fault


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


@dataclass(frozen=True, eq=False)
class Served:
    """One loaded model: a runtime for each device."""

    runtimes: tuple[Runtime, ...]

    @property
    def model(self) -> Model:
        return self.runtimes[0].model

    @cached_property
    def name(self) -> ModelName:
        """How answers name it."""
        return {"name": self.model.name, "digest": self.model.digest}


@dataclass(slots=True, eq=False)
class Job:
    """The images of one request. `served` computes all of them, even if the model is swapped meanwhile.

    `contents` are files to decode, or pixels uint8 [N, H, W, C] of the model's size. When the job is given up, empty
    lists replace them and `pixels`.
    """

    contents: list[bytes] | np.ndarray
    num_images: int
    served: Served
    top_k: int
    future: "asyncio.Future[list[Result]]"
    accepted: float
    pixels: list[Decoded | None]
    num_undecoded: int = 0  # images that decoders have not finished
    num_in_work: int = 0  # images that are being decoded
    decode_start: float = 0.0  # when the first of these began
    weights: list[Weight] = field(default_factory=list)
    is_given_up: bool = False
    is_probe: bool = False  # the server's own check, which no count of answers includes
    outcome: list[Result] | Exception = field(default_factory=list)
    logits: np.ndarray = field(init=False)  # [N, K], once the outcome is there
    decode_s: float = 0.0
    queue_s: float = 0.0
    model_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    watch: "asyncio.Future[Message] | None" = None


def result_of(order: list[int], probabilities: list[float], top_k: int, labels: tuple[str, ...]) -> Result:
    """The best classes of one image, the most probable first, and their probabilities → the first `top_k` of them."""
    top: list[Guess] = [
        {"label": labels[index], "index": index, "probability": probability}
        for index, probability in zip(order[:top_k], probabilities, strict=False)
    ]
    return {**top[0], "top": top}
