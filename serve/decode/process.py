"""Images that take long are decoded in a process, which can be ended when one takes too long: a thread cannot."""

import logging
import os
import signal
import subprocess
from typing import Any

import numpy as np

from common.child import start
from common.image import TooManyPixels
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.decode.worker import PIXELS, TOO_MANY
from serve.request.access import KEY_VARIABLE

_START_S = 60.0  # far beyond any start
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # of glibc: what an image took goes back to the system after it
_log = logging.getLogger(__name__)


class TookTooLong(Refusal):
    """The decoder was ended."""


class Decoder:
    """One process, started for its first image and anew for the next after it was ended. For one thread."""

    def __init__(self, limit_s: float, *, patience_s: float) -> None:
        """An image may take `limit_s` of processor time; after `patience_s` by the clock nobody waits for it."""
        self._limit_s, self._patience_s = limit_s, patience_s
        self._process: subprocess.Popen[Any] | None = None

    def __call__(self, content: bytes, spec: ImageSpec, *, max_pixels: int, num_bytes: int) -> np.ndarray | Refusal:
        """uint8 [H, W, C], decoded with `num_bytes` of memory, or why there is none."""
        try:
            process = self._process or self._start()
            answer = self._ask(process, (spec, max_pixels, num_bytes, self._limit_s), content)
        except BaseException:
            self.close()
            raise
        if isinstance(answer, Refusal):
            self.close()
            return answer
        kind, rest = answer[:1], answer[1:]
        if kind == PIXELS:
            return np.frombuffer(rest, np.uint8).reshape(spec.height, spec.width, spec.channels)
        return (TooManyPixels if kind == TOO_MANY else Refusal)(rest.decode(errors="replace"))

    def kill(self) -> None:
        """From another thread: what is under way ends at once, and a call gives a Refusal."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process:
            self._connection.close()
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[Any]:
        environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | _MEMORY
        self._process, self._connection = start("serve.decode.worker", env=environment)
        if not self._connection.poll(_START_S):
            raise TimeoutError(f"a decoder does not start within {_START_S:g} s")
        self._connection.recv_bytes()
        return self._process

    def _ask(self, process: subprocess.Popen[Any], how: tuple[Any, ...], content: bytes) -> bytes | Refusal:
        """The answer of the process; a Refusal if it takes too long or ends."""
        status = None
        try:
            self._connection.send(how)
            self._connection.send_bytes(content)
            if self._connection.poll(self._patience_s):
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            status = process.wait()
        if status not in (None, -signal.SIGPROF):
            _log.warning("a decoder ended with status %d on an image of %d bytes", status, len(content))
            return Refusal("the image crashes its decoder; save it again")
        _log.warning("a decoder is replaced: an image of %d bytes took longer than it may", len(content))
        return TookTooLong(f"the image takes longer than {self._limit_s:g} s to decode; send a smaller one")
