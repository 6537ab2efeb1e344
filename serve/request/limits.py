"""The most that single requests and all requests together may take."""

import logging
import math
import resource
from dataclasses import dataclass, replace

from common.image import MAX_PIXELS
from common.refusal import Refusal
from serve.config import ServeConfig
from serve.decode.weigh import LIGHT

SPARE_FILES = 128  # for models, logs, libraries, and connections that are being refused
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of one process. The defaults are those of the command line."""

    max_body_bytes: int = int(ServeConfig.max_body_mb * 1e6)  # of one request
    max_held_bytes: int = int(ServeConfig.max_held_mb * 1e6)  # of all requests that are not answered yet
    max_decoded_bytes: int = int(ServeConfig.max_decoded_mb * 1e6)  # of all decoders together
    max_images: int = ServeConfig.max_images  # of one request
    max_pixels: int = MAX_PIXELS  # of each image, by its header
    max_batch: int = ServeConfig.max_batch  # images that the model computes at once
    max_queue: int = ServeConfig.max_queue  # images accepted and not answered yet
    max_connections: int = ServeConfig.max_connections  # open at once
    deadline_s: float = ServeConfig.deadline_ms / 1000  # from a request's first byte to its answer
    drain_s: float = ServeConfig.drain_seconds  # for the requests under way when the server stops
    decode_threads: int = 1  # 0: the thread that runs the model decodes too
    decode_s: float = 10.0  # of processor time for one image
    probe_every_s: float = ServeConfig.probe_every  # between two checks of the model's own answers; 0: never

    @property
    def decode_processes(self) -> int:
        """For images that are too heavy for a thread; each is started when it is first needed."""
        return max(1, self.decode_threads)

    @property
    def heavy_bytes(self) -> int:
        """The memory that these processes may take at once: all but the threads' share."""
        return self.max_decoded_bytes - self.decode_processes * LIGHT.num_bytes

    def of_each(self, num_processes: int) -> "Limits":
        """The limits of each of `num_processes` that keep to these together: a share, or one whole request.

        Memory for heavy images is one amount for all processes (`HostBudget`); threads have a share each.
        """
        self._refuse_little_memory(num_processes)
        others = (num_processes - 1) * self.decode_processes * LIGHT.num_bytes
        return replace(
            self,
            max_held_bytes=max(self.max_body_bytes, self.max_held_bytes // num_processes),
            max_queue=max(self.max_images, self.max_queue // num_processes),
            max_decoded_bytes=self.max_decoded_bytes - others,
        )

    def _refuse_little_memory(self, num_processes: int) -> None:
        least, given = (num_processes * self.decode_processes + 1) * LIGHT.num_bytes, self.max_decoded_bytes
        if given < least:
            decoders = f"the decoders of {num_processes} processes" if num_processes > 1 else "its decoders"
            raise Refusal(f"max_decoded_bytes must be {least:,} for {decoders}, got {given:,}")

    def __post_init__(self) -> None:
        may_be_0 = ("decode_threads", "probe_every_s")
        given = vars(self).items()
        wrong = [
            f"{name} must be positive, got {value}" for name, value in given if value <= 0 and name not in may_be_0
        ]
        if not 0 <= self.probe_every_s < math.inf:
            wrong.append(f"probe_every_s must be 0 for never, or positive, got {self.probe_every_s}")
        if self.decode_threads < 0:
            wrong.append(f"decode_threads must not be negative, got {self.decode_threads}")
        if self.max_held_bytes < self.max_body_bytes:
            wrong.append(f"max_held_bytes must hold one body of {self.max_body_bytes:,}, got {self.max_held_bytes:,}")
        if self.max_queue < self.max_images:
            wrong.append(f"max_queue must hold one request of {self.max_images} images, got {self.max_queue}")
        if wrong:
            raise Refusal("; ".join(wrong))
        self._refuse_little_memory(1)


def fit_to_files(max_connections: int) -> int:
    """`max_connections`, or as many as the process may open files for, once its limit is raised as far as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    fitting = max(1, soft - SPARE_FILES)
    advice = "a process may open %d files here; raise the limit with ulimit -n"
    _log.warning(f"%d connections at once instead of %d: {advice}", fitting, max_connections, soft)
    return fitting
