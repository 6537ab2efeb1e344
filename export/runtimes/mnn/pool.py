"""A batch divided among processes that run MNN, one thread each.

MNN holds Python's global lock while it computes, and its own threads share every layer's activations. Processes share
nothing and leave the caller's other threads running, and a crash ends one call instead of the server.
"""

import sys
import threading
import weakref
from contextlib import suppress
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, cast

import numpy as np

from common.child import start

_START_S = 60.0  # far beyond any start


class WorkerFailed(RuntimeError):
    """A process of MNN did not start, or ended before it answered."""


class MnnPool:
    """Images uint8 [N, H, W, C] → logits float32 [N, K], from several threads one after another.

    A call in which a process fails raises `WorkerFailed`, and the next one starts all of them anew. They end with the
    last reference to the pool, or with this process, however it ends.
    """

    def __init__(self, converted: Path, sizes: tuple[int, int, int], *, num_workers: int) -> None:
        """`converted` is in MNN's own format, and may be deleted afterwards. Raises `WorkerFailed` or OSError.

        `sizes` are height, width and channels of an image.
        """
        self._sizes = sizes
        self._num_workers = num_workers
        self._workers: list[_Worker] = []
        self._file = FileIO(converted)  # what is open can be read again, whatever becomes of its name
        self._turn = threading.Lock()
        weakref.finalize(self, _end_all, self._workers, self._file)
        self._start()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != self._sizes:
            raise ValueError(f"images must be [N, {', '.join(map(str, self._sizes))}], got {list(images.shape)}")
        with self._turn:
            if not self._workers:
                self._start()
            try:
                return self._share(images)
            except BaseException:  # an answer that was not read must not be that of the next call
                _end_all(self._workers)
                raise

    def _share(self, images: np.ndarray) -> np.ndarray:
        parts = np.array_split(images, min(len(images), self._num_workers))
        working = self._workers[: len(parts)]
        for worker, part in zip(working, parts, strict=True):
            worker.send(part)
        answers = [np.frombuffer(worker.receive(), np.float32) for worker in working]
        return np.concatenate(answers).reshape(len(images), -1)

    def _start(self) -> None:
        """All at the same time."""
        until = monotonic() + _START_S
        try:
            for _ in range(self._num_workers):
                self._workers.append(_Worker(self._file.fileno(), self._sizes))
            for worker in self._workers:
                worker.wait_until_loaded(until)
        except BaseException:
            _end_all(self._workers)
            raise


class _Worker:
    """One process, and the socket to it."""

    def __init__(self, file: int, sizes: tuple[int, int, int]) -> None:
        self._process, self._connection = start("export.runtimes.mnn.pool", f"/dev/fd/{file}", *sizes, pass_fds=(file,))

    def wait_until_loaded(self, until: float) -> None:
        if not self._connection.poll(max(0.0, until - monotonic())):
            raise WorkerFailed(f"a process of MNN does not start within {_START_S:g} s")
        self.receive()

    def send(self, images: np.ndarray) -> None:
        try:
            self._connection.send_bytes(images.tobytes())
        except OSError as error:
            raise self._failed() from error

    def receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._failed() from error

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _failed(self) -> WorkerFailed:
        return WorkerFailed(f"a process of MNN ended with status {self._process.wait()}")


def _end_all(workers: list[_Worker], *files: FileIO) -> None:
    while workers:
        workers.pop().end()
    for file in files:
        file.close()


def run(converted: str, *sizes: str) -> None:
    """A process of the pool: a module of MNN with one thread, which answers until the parent is gone.

    `converted` is a file in MNN's own format; exit status 1 if it is invalid. `sizes` are height, width and channels of
    an image. Descriptor 0 is a socket to the parent, which sends images uint8 [N, H, W, C] and gets logits float32
    [N, K], both as bytes in C order; an empty message at the start says that the model is loaded.
    """
    module = _load(converted)
    connection, shape = Connection(0), (-1, *map(int, sizes))
    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            images = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(shape)
            (logits,) = module.forward([_to_input(images)])
            connection.send_bytes(logits.read())


def _load(converted: str) -> Any:
    from MNN import nn as mnn_nn

    nn = cast(Any, mnn_nn)  # takes its names from an extension module
    manager = nn.create_runtime_manager(({"backend": 0, "numThread": 1, "precision": "high"},))
    try:
        return nn.load_module_from_file(converted, ["images"], ["logits"], runtime_manager=manager)
    except SystemError:  # for every invalid file
        sys.exit(1)


def _to_input(images: np.ndarray) -> Any:
    from MNN import expr as mnn_expr

    expr = cast(Any, mnn_expr)
    # Called NCHW although channels are last: MNN would move what is called NHWC, and the graph does it itself.
    return expr.const(images, list(images.shape), expr.NCHW, expr.dtype.uint8)
