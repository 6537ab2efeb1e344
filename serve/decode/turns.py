"""The order in which images are decoded, and the memory that all decoders may take at once."""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

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
        with self._file.open("rb+") as file:  # its locks end when it is closed
            start = self._find_free(file.fileno(), num_bytes)
            if start is None:
                _lock(file.fileno(), fcntl.F_OFD_SETLKW, self._num_bytes - num_bytes, num_bytes)
            yield

    def _find_free(self, file: int, num_bytes: int) -> int | None:
        """Lock `num_bytes` that are free, and return their start; None if there is no such range."""
        start = 0
        while start + num_bytes <= self._num_bytes:
            try:
                _lock(file, fcntl.F_OFD_SETLK, start, num_bytes)
                return start
            except BlockingIOError:
                kind, _, in_the_way, length, _ = _lock(file, fcntl.F_OFD_GETLK, start, num_bytes)
                start = start if kind == fcntl.F_UNLCK else in_the_way + length
        return None


_FLOCK = "hhqqi0q"  # of <fcntl.h>: type, whence, start, length, process


def _lock(file: int, what: int, start: int, length: int) -> tuple[int, ...]:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    return struct.unpack(_FLOCK, fcntl.fcntl(file, what, asked))
