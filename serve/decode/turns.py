"""The order in which images are decoded, and the memory that all decoders may take at once."""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from heapq import heapify, heappop, heappush
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

_STARTS = 64  # places at which a range of locks may begin
Owner = TypeVar("Owner")


class Turns(Generic[Owner]):
    """A queue of numbered parts of owners: the earliest due first, equal ones in order of arrival.

    A part is due at its arrival plus its weight, so small parts overtake large ones, but only for a while.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Owner, int]] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._news: SimpleQueue[bool] = SimpleQueue()  # True for each part that was put; False: the end

    def put(self, due: float, owner: Owner, part: int) -> None:
        with self._lock:
            heappush(self._waiting, (due, next(self._numbers), owner, part))
        self._news.put(True)

    def get(self) -> tuple[Owner, int] | None:
        """The next part, waiting for one; None at the end."""
        while self._news.get():
            with self._lock:
                if self._waiting:  # unless the part was dropped
                    _, _, owner, part = heappop(self._waiting)
                    return owner, part
        return None

    def drop(self, owner: Owner) -> None:
        """Forget all parts of `owner`."""
        with self._lock:
            self._waiting = [entry for entry in self._waiting if entry[2] is not owner]
            heapify(self._waiting)

    def end(self) -> None:
        """One thread gets None."""
        self._news.put(False)


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
