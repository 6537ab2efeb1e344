"""What requests may ask of the server, each alone and all together."""

import math
from dataclasses import dataclass, replace

from common.image import MAX_PIXELS
from common.refusal import Refusal
from serve.decode.weigh import LIGHT


@dataclass(frozen=True)
class Limits:
    """What the server holds at most: `max_body_bytes` of one body, `max_held_bytes` of all, `max_queue` images."""

    max_body_bytes: int = 20 * 2**20
    max_held_bytes: int = 128 * 2**20  # of all requests that are not answered yet
    max_decoded_bytes: int = 384 * 2**20  # that all decoders take at once
    max_images: int = 64  # of one request
    max_pixels: int = MAX_PIXELS  # of each image, as its header announces
    max_batch: int = 32  # images that the model computes at once
    max_queue: int = 1024  # images accepted and not answered yet
    max_connections: int = 2048  # open at once
    deadline_s: float = 30.0  # from a request's first byte to its answer
    decode_threads: int = 1  # 0: the thread that runs the model decodes too
    decode_s: float = 10.0  # of processor time that one image may take
    probe_every_s: float = 60.0  # between two questions of the server to its own model; 0: it asks none

    @property
    def decode_processes(self) -> int:
        """For what is too heavy for a thread of the server; each is started when it is first needed."""
        return max(1, self.decode_threads)

    @property
    def heavy_bytes(self) -> int:
        """What these processes take at once: all but the threads' share."""
        return self.max_decoded_bytes - max(1, self.decode_threads) * LIGHT.num_bytes

    def of_each(self, num_processes: int) -> "Limits":
        """What each of so many processes may hold, for all to keep to these limits: a share, or one whole request.

        What single images are decoded with is one amount for all of them (`HostBudget`); threads have theirs each.
        """
        others = (num_processes - 1) * max(1, self.decode_threads) * LIGHT.num_bytes
        if self.heavy_bytes - others < LIGHT.num_bytes:
            least = self.max_decoded_bytes - self.heavy_bytes + others + LIGHT.num_bytes
            raise Refusal(
                f"max_decoded_bytes must be {least:,} for the decoders of {num_processes} processes, "
                f"got {self.max_decoded_bytes:,}"
            )
        return replace(
            self,
            max_held_bytes=max(self.max_body_bytes, self.max_held_bytes // num_processes),
            max_queue=max(self.max_images, self.max_queue // num_processes),
            max_decoded_bytes=self.max_decoded_bytes - others,
        )

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if name not in ("decode_threads", "probe_every_s")}
        wrong = [f"{name} must be positive, got {value}" for name, value in counts.items() if value <= 0]
        if not 0 <= self.probe_every_s < math.inf:
            wrong.append(f"probe_every_s must be 0 for never, or positive, got {self.probe_every_s}")
        if self.decode_threads < 0:
            wrong.append(f"decode_threads must not be negative, got {self.decode_threads}")
        if self.max_held_bytes < self.max_body_bytes:
            wrong.append(f"max_held_bytes must hold one body of {self.max_body_bytes:,}, got {self.max_held_bytes:,}")
        if self.heavy_bytes < LIGHT.num_bytes:
            least = (max(1, self.decode_threads) + 1) * LIGHT.num_bytes
            wrong.append(f"max_decoded_bytes must be {least:,} for its threads, got {self.max_decoded_bytes:,}")
        if self.max_queue < self.max_images:
            wrong.append(f"max_queue must hold one request of {self.max_images} images, got {self.max_queue}")
        if wrong:
            raise Refusal("; ".join(wrong))
