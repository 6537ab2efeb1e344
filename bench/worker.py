"""A contender in a process of its own, told by its parent when to run.

Thread pools, allocators and settings of one runtime cannot disturb another's, and a crash ends one row.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.spec import ImageSpec
    from export.compare import Answer

# Read by OpenMP, MKL and OpenBLAS when they are loaded, so set before the process starts.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
PATIENCE_S = 180.0  # a compiler may need most of it
# Threads of the row before spin after its last call: 40 ms in ONNX Runtime 1.31, 100 ms in OpenBLAS.
SETTLE_S = 0.1

Open = Callable[[Path, int], "Answer"]  # (folder of the net's files, number of threads) → images to logits


class WorkerFailed(RuntimeError):
    """The contender raised, ended or gave no answer in time."""


class Worker:
    """The process of one contender; it loads while the parent goes on."""

    def __init__(self, open_answer: Open, folder: Path, image: "ImageSpec", *, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, open_answer, folder, image, num_threads)
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        with _environment(dict.fromkeys(THREAD_VARIABLES, str(num_threads))):
            self._process.start()
        theirs.close()  # or the end of the process would not close the pipe

    def wait_until_open(self) -> None:
        """Raises `WorkerFailed` where the contender could not be opened."""
        self._receive()

    def time(self, batch_size: int, seconds: float) -> float:
        """The median milliseconds of a call, over `seconds` and one call at least, after a pause."""
        return self._ask("time", batch_size, seconds)

    def answer(self, num_images: int) -> Any:
        """The logits [num_images, K] of the images that every worker answers."""
        return self._ask("answer", num_images)

    def peak_bytes(self) -> int | None:
        """The most memory of the process and of those it started; None where the system does not tell."""
        return self._ask("peak_bytes")

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise WorkerFailed(self._end()) from error
        return self._receive()

    def _receive(self) -> Any:
        from bench.rounds import Failure

        try:
            if not self._connection.poll(PATIENCE_S):
                self._process.kill()
                raise WorkerFailed(f"no answer in {PATIENCE_S:g} s")
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerFailed(self._end()) from error
        if isinstance(result, Failure):
            raise WorkerFailed(result.reason)
        return result

    def _end(self) -> str:
        self._process.join()
        return f"its process ended with status {self._process.exitcode}"


class _Contender:
    """The other end: what a worker can be asked for."""

    def __init__(self, answer: "Answer", image: "ImageSpec") -> None:
        self._answer = answer
        self._image = image

    def time(self, batch_size: int, seconds: float) -> float:
        from time import sleep

        from bench.rounds import median_ms

        sleep(SETTLE_S)
        return median_ms(partial(self._answer, self._images(batch_size)), seconds, min_calls=1)

    def answer(self, num_images: int) -> Any:
        return self._answer(self._images(num_images))

    def peak_bytes(self) -> int | None:
        from bench.lab.process import family_bytes

        # getrusage would count what the parent held when it started the process.
        return family_bytes() if Path("/proc/self/status").exists() else None

    def _images(self, num: int) -> Any:
        from fold.image_sets import random_images

        return random_images(self._image, num)


def _run(connection: Connection, open_answer: Open, folder: Path, image: "ImageSpec", num_threads: int) -> None:
    """The process: open, then answer until the parent ends it."""
    from bench.rounds import Failure, attempt

    opened: _Contender | Failure = attempt(lambda: _Contender(open_answer(folder, num_threads), image))
    if isinstance(opened, Failure):
        connection.send(opened)
        return
    connection.send(None)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(attempt(lambda: getattr(opened, method)(*arguments)))  # noqa: B023


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a process started inside inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
