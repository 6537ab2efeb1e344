"""Images that take long are decoded in a process, which can be killed when one takes too long; a thread cannot.

All such processes together keep to a budget of memory, in one server or in all of the host.
"""

import fcntl
import logging
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from common.child import Child, ProcessFailed
from common.image import TooManyPixels
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.decode.worker import PIXELS, TOO_MANY
from serve.request.access import KEY_VARIABLE

_START_S = 60.0  # far beyond any start
_STARTS = 64  # places at which a range of locks may begin
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # of glibc: what an image took goes back to the system after it
_log = logging.getLogger(__name__)


class TookTooLong(Refusal):
    """The decoder was ended."""


class Decoder:
    """One process, started for its first image and anew for the next after it was ended. For one thread."""

    def __init__(self, limit_s: float, *, patience_s: float, on_end: Callable[[], None] = lambda: None) -> None:
        """An image may take `limit_s` of processor time, `patience_s` by the clock; `on_end`: it has ended on one."""
        self._limit_s, self._patience_s, self._on_end = limit_s, patience_s, on_end
        self._child: Child | None = None

    def __call__(self, content: bytes, spec: ImageSpec, *, max_pixels: int, num_bytes: int) -> np.ndarray:
        """uint8 [H, W, C], decoded with `num_bytes` of memory; refuses an image that cannot be."""
        try:
            child = self._child or self._start()
            answer = self._ask(child, (spec, max_pixels, num_bytes, self._limit_s), content)
        except BaseException:
            self.close()
            raise
        kind, rest = answer[:1], answer[1:]
        if kind == PIXELS:
            return np.frombuffer(rest, np.uint8).reshape(spec.shape)
        raise (TooManyPixels if kind == TOO_MANY else Refusal)(rest.decode(errors="replace"))

    def kill(self) -> None:
        """Called from another thread: ends a decode under way at once, which then refuses its image."""
        if child := self._child:
            child.kill()

    def close(self) -> None:
        """Kill the process, even while it decodes."""
        child, self._child = self._child, None
        if child:
            child.close()

    def _start(self) -> Child:
        environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | _MEMORY
        self._child = Child("serve.decode.worker", name="a decoder", env=environment)
        self._child.receive(_START_S)
        return self._child

    def _ask(self, child: Child, how: tuple[object, ...], content: bytes) -> bytes:
        """The answer of the process; refuses the image if it takes too long or ends."""
        try:
            child.send(how)
            child.send(content)
            return child.receive(self._patience_s)
        except ProcessFailed as failure:
            status = failure.status
        self._on_end()
        if status not in (None, -signal.SIGPROF):
            _log.warning("a decoder ended with status %d on an image of %d bytes", status, len(content))
            raise Refusal("the image crashes its decoder; save it again")
        _log.warning("a decoder is replaced: an image of %d bytes took longer than it may", len(content))
        raise TookTooLong(f"the image takes longer than {self._limit_s:g} s to decode; send a smaller one")


class Budget:
    """An amount of memory that threads share."""

    def __init__(self, num_bytes: int) -> None:
        self._free = num_bytes
        self._change = threading.Condition()

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Wait for `num_bytes`, at most all of it, and hold them."""
        with self._change:
            self._change.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._change:
                self._free += num_bytes
                self._change.notify_all()


class HostBudget(Budget):
    """One amount for all processes that share a file, on Linux: each byte locked in it is a byte of memory.

    The system releases the locks of a process when it ends, however it ends.
    """

    def __init__(self, file: Path, num_bytes: int) -> None:
        self._file, self._num_bytes = file, num_bytes

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        last = self._num_bytes - num_bytes  # where such a range may begin
        with self._file.open("rb+") as file:  # its locks end when it is closed
            for start in range(0, last + 1, max(1, self._num_bytes // _STARTS)):
                with suppress(BlockingIOError):
                    _lock(file.fileno(), fcntl.F_OFD_SETLK, start, num_bytes)
                    break
            else:
                _lock(file.fileno(), fcntl.F_OFD_SETLKW, last, num_bytes)
            yield


def _lock(file: int, command: int, start: int, length: int) -> None:
    fields = (fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    fcntl.fcntl(file, command, struct.pack("hhqqi0q", *fields))  # type, whence, start, length, process: <fcntl.h>
