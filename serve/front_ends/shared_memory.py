"""Memory for pixels and logits that a device process shares with a front end, and short messages about it.

A front end has one connection to its device process, which makes the memory of each connection, in slots of one image:

    front end        pixels into a free slot; a request that names it
    device process   the slots of all waiting requests → one batch → logits into the slots; an answer for each
    front end        logits out of the slots, which are free again

Memory and connection end with either process. The device process validates every number it receives, because a front
end may have been taken over.
"""

import fcntl
import math
import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np

from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.request.limits import Limits

# Sent to the door of a device process, with a socket for the answer. The number of slots follows CONNECT; 0 is all.
CONNECT, RELOAD = b"c", b"r"

# The answer to CONNECT is the memory's file, and where in it the greeting begins, a pickled dict.
# A request is a slot, an answer is a slot and a status.
MEMORY, REQUEST, ANSWER = struct.Struct("=Q"), struct.Struct("=I"), struct.Struct("=II")
DONE, FAILED = 0, 1  # logits are in the slot, or the model failed
NEWER_MODEL = 2**32 - 1  # in place of a slot: a newer model serves, on new connections


@dataclass(frozen=True)
class Shape:
    """The layout of one connection's memory."""

    num_slots: int
    slot: np.dtype  # of pixels [H, W, C], logits [K], and the seconds that their batch took

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot.itemsize


def shape_of(model: Model, limits: Limits) -> Shape:
    """A slot for each image that may wait for the model at once under `limits` (`Batcher.check_room`)."""
    image, labels = model.spec.image.shape, model.spec.labels
    fields = [("pixels", np.uint8, image), ("logits", np.float32, (len(labels),)), ("seconds", np.float32)]
    num_held = limits.max_held_bytes // math.prod(image)
    return Shape(min(limits.max_queue, max(limits.max_images, num_held)), np.dtype(fields, align=True))


class Area:
    """Memory that both processes map. A slot belongs to the front end until a request names it."""

    def __init__(self, file: int, shape: Shape) -> None:
        slots = np.ndarray(shape.num_slots, shape.slot, mmap.mmap(file, shape.num_bytes))
        self.num_slots = shape.num_slots
        self.pixels, self.logits, self.seconds = slots["pixels"], slots["logits"], slots["seconds"]


def make_memory(shape: Shape, greeting: bytes = b"") -> int:
    """A fully allocated memory file of fixed size; refuses if there is no room."""
    file = os.memfd_create("diracnet-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(file, 0, shape.num_bytes + len(greeting))  # a lack of memory is SIGBUS otherwise
        os.pwrite(file, greeting, shape.num_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(file)
        reason = (error.strerror or str(error)).lower()
        raise Refusal(
            f"cannot allocate {shape.num_bytes:,} bytes of shared memory for pixels ({reason}); "
            "lower --max-held-mb or --max-queue"
        ) from error
    return file
