"""A contender in a process of its own, told by its parent when to run.

Thread pools, allocators and settings of one runtime cannot disturb another's, and a crash ends one row. Nothing is
imported at the top that a contender does not need.
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
        self._connection, child_end = context.Pipe()
        arguments = (child_end, open_answer, folder, image, num_threads)
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        with _environment(dict.fromkeys(THREAD_VARIABLES, str(num_threads))):
            self._process.start()
        child_end.close()  # or the end of the process would not close the pipe

    def wait_until_open(self) -> None:
        """Raises `WorkerFailed` where the contender could not be opened."""
        self._receive()

    def time(self, batch_size: int, seconds: float) -> float:
        """The median milliseconds of a call, over `seconds` and one call at least, after a pause."""
        return self._ask(_time, batch_size, seconds)

    def answer(self, num_images: int) -> Any:
        """The logits [num_images, K] of the images that every worker answers."""
        return self._ask(_answer, num_images)

    def peak_bytes(self) -> int | None:
        """The most memory of the process and of those it started; None where the system does not tell."""
        return self._ask(_peak_bytes)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, task: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self._connection.send((task, arguments))
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


def _run(connection: Connection, open_answer: Open, folder: Path, image: "ImageSpec", num_threads: int) -> None:
    """The process: open the contender, then do one task after another until the parent ends it."""
    from bench.rounds import Failure, attempt

    answer = attempt(partial(open_answer, folder, num_threads))
    connection.send(answer if isinstance(answer, Failure) else None)
    while not isinstance(answer, Failure):
        try:
            task, arguments = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(attempt(partial(task, answer, image, *arguments)))


def _time(answer: "Answer", image: "ImageSpec", batch_size: int, seconds: float) -> float:
    from time import sleep

    from bench.rounds import median_ms
    from fold.image_sets import random_images

    sleep(SETTLE_S)
    return median_ms(partial(answer, random_images(image, batch_size)), seconds, min_calls=1)


def _answer(answer: "Answer", image: "ImageSpec", num_images: int) -> Any:
    from fold.image_sets import random_images

    return answer(random_images(image, num_images))


def _peak_bytes(answer: "Answer", image: "ImageSpec") -> int | None:
    from bench.lab.process import family_bytes

    # getrusage would count what the parent held when it started the process.
    return family_bytes() if Path("/proc/self/status").exists() else None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that a process started inside inherits."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
