"""Whose turn it is to be decoded, and how much memory all decoders take at once."""

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
    """Numbered parts of owners that wait for threads: the earliest due first, equal ones as they came.

    Due is when a part came plus what it weighs, so what is small overtakes what is large, but only so much later.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Owner, int]] = []
        self._numbers = count()
        self._lock = threading.Lock()
        self._news: SimpleQueue[bool] = SimpleQueue()  # one entry for each part that came; False: the end

    def put(self, due: float, owner: Owner, part: int) -> None:
        with self._lock:
            heappush(self._waiting, (due, next(self._numbers), owner, part))
        self._news.put(True)

    def get(self) -> tuple[Owner, int] | None:
        """Whose turn it is, as soon as there is one; None at the end."""
        while self._news.get():
            with self._lock:
                if self._waiting:  # unless what came was dropped
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
        """Hold so much of it, which is not more than all, as soon as it is free."""
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
    """The same for all processes that name one file, of Linux: a lock on a byte of it stands for a byte of memory.

    The system takes the locks of a process that ends, however it ends.
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
        """The start of so many bytes, which are locked now; None where nowhere so many are free."""
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
