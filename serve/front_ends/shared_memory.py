"""What a front end and a device process share: memory for pixels and logits, and messages of a few bytes about it.

A front end has one connection to its device process, and for each connection memory of its own, in slots of one image:

    front end        pixels into a free slot; a request that names it
    device process   the slots of all requests that wait → one batch → logits into the slots; an answer for each
    front end        logits out of the slots, which are free again

Memory and connection end with either process. The device process trusts no number that it is sent: another process of
the same host may have taken a front end over.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass

import numpy as np

from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.request.limits import Limits

# What a device process is asked for at its door, beside a socket for the answer.
CONNECT, RELOAD = b"c", b"r"

# A request is slot and generation, an answer slot, generation and status; all are uint32 in the machine's order.
REQUEST_FORM, ANSWER_FORM = "=II", "=III"  # for `struct`
REQUEST_BYTES, ANSWER_BYTES = 8, 12
DONE, FAILED = 0, 1  # of an answer: logits are in the slot, or the model failed
NEWS = 2**32 - 1  # in place of a slot: a newer model serves, which has connections of its own
LENGTH = "=I"  # what comes before a greeting, for `struct`

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Greeting:
    """What a device process says first, pickled: the model of this connection. A newer one has a greater `number`."""

    number: int
    model: Model
    platform: str
    description: str
    library: str


class Broken(Exception):
    """What came is not what a front end sends."""


@dataclass(frozen=True)
class Shape:
    """Of the memory of one connection."""

    num_slots: int
    image: tuple[int, int, int]  # height, width, channels
    num_labels: int

    @property
    def pixel_bytes(self) -> int:
        """Of all slots, up to where a float32 may begin."""
        height, width, channels = self.image
        return -(-self.num_slots * height * width * channels // 4) * 4

    @property
    def num_bytes(self) -> int:
        return self.pixel_bytes + 4 * self.num_slots * (self.num_labels + 1)


def shape_of(model: Model, limits: Limits, *, num_slots: int | None = None) -> Shape:
    """A slot for each image that `limits` let wait for the model at once (`Batcher.check_room`), or `num_slots`."""
    image = (model.spec.image.height, model.spec.image.width, model.spec.image.channels)
    image_bytes = image[0] * image[1] * image[2]
    most = min(limits.max_queue, max(limits.max_images, limits.max_held_bytes // image_bytes))
    return Shape(num_slots or most, image, len(model.spec.labels))


class Area:
    """Memory that both processes see. A slot belongs to the front end until it is named in a request."""

    def __init__(self, file: int, shape: Shape) -> None:
        memory = mmap.mmap(file, shape.num_bytes)
        self.num_slots = shape.num_slots
        self.pixels = np.ndarray((shape.num_slots, *shape.image), np.uint8, memory)
        self.logits = np.ndarray((shape.num_slots, shape.num_labels), np.float32, memory, shape.pixel_bytes)
        # How long the model took for the batch of each slot.
        self.seconds = np.ndarray(shape.num_slots, np.float32, memory, shape.num_bytes - 4 * shape.num_slots)


def make_memory(shape: Shape) -> int:
    """A file in memory, all of it there already, whose size nobody can change; refuses where there is no room."""
    file = os.memfd_create("diracnet-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(file, 0, shape.num_bytes)  # what is missing is found now, not by a signal later
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(file)
        raise Refusal(
            f"{shape.num_bytes:,} bytes of shared memory for pixels cannot be had ({(error.strerror or '').lower()}); "
            "lower --max-held-mb or --max-queue"
        ) from error
    return file


def open_area(file: int, shape: Shape) -> Area:
    """The memory that a front end sent. `Broken` where it has another size, or one that could still change."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Broken("what it sent is not memory") from error
    num_bytes = os.fstat(file).st_size
    if seals & _SEALS != _SEALS or num_bytes != shape.num_bytes:
        raise Broken(f"its memory has {num_bytes:,} bytes and seals {seals}, not {shape.num_bytes:,} and {_SEALS}")
    return Area(file, shape)
