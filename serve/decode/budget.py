"""The memory that all decoders may take at once, in one process or in all of the host."""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STARTS = 64  # places at which a range of locks may begin


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
