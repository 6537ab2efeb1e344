"""A loaded model, and the images of one request on their way through it."""

import asyncio
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from starlette.types import Message

from export.runtimes.runtime import Model, Runtime
from serve.decode.weigh import Weight
from serve.request.answer import ModelName, Result

Decoded = np.ndarray | Exception  # uint8 [H, W, C], or why there are none: a Refusal if it is the image's fault


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

    @cached_property
    def image_bytes(self) -> int:
        """Of one image's pixels."""
        image = self.model.spec.image
        return image.height * image.width * image.channels


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
