"""A runtime in a process of its own, told by its parent when to run.

Thread pools, allocators and settings of one runtime cannot disturb another's, and a crash ends one row. Nothing is
imported at the top that a runtime does not need.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.lab.process import family_bytes
from bench.lab.rounds import Failure, attempt, median_ms

if TYPE_CHECKING:
    import numpy as np

    from export.compare import Answer

# Read by OpenMP, MKL and OpenBLAS when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
PATIENCE_S = 180.0  # a compiler may need most of it
# Threads of the row before spin after its last call: 40 ms in ONNX Runtime 1.31, 100 ms in OpenBLAS.
SETTLE_S = 0.1

Open = Callable[[Path, int], "Answer"]  # (folder of the net's files, number of threads) → images to logits


class WorkerFailed(RuntimeError):
    """The runtime raised, its process ended, or it gave no answer in time."""


class Worker:
    """The process of one runtime; it loads while the parent goes on."""

    def __init__(self, open_answer: Open, folder: Path, num_threads: int) -> None:
        context = get_context("spawn")
        self._connection, child_end = context.Pipe()
        arguments = (child_end, open_answer, folder, num_threads)
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        child_end.close()  # or the end of the process would not close the pipe

    def ask(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """What `task` returns there for the runtime and `arguments`, or raises `WorkerFailed`."""
        with suppress(OSError):  # where the process has ended, which `wait` reports
            self._connection.send((task, arguments))
        return self.wait()

    def wait(self) -> Any:
        """The next result; the first one says that the runtime is open."""
        try:
            if not self._connection.poll(PATIENCE_S):
                self._process.kill()
                raise WorkerFailed(f"no answer in {PATIENCE_S:g} s")
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise WorkerFailed(f"its process ended with status {self._process.exitcode}") from error
        if isinstance(result, Failure):
            raise WorkerFailed(result)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _run(connection: Connection, open_answer: Open, folder: Path, num_threads: int) -> None:
    """The process: open the runtime, then do one task after another until the parent ends it."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(num_threads)))  # before any library is loaded
    answer = attempt(partial(open_answer, folder, num_threads))
    connection.send(answer if isinstance(answer, Failure) else None)
    while not isinstance(answer, Failure):
        try:
            task, arguments = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(attempt(partial(task, answer, *arguments)))


def median_call_ms(answer: "Answer", images: "np.ndarray", seconds: float) -> float:
    """A task: the median milliseconds of a call, over `seconds` and one call at least, after a pause."""
    time.sleep(SETTLE_S)
    return median_ms(partial(answer, images), seconds, min_calls=1)


def peak_bytes(answer: "Answer") -> int | None:
    """A task: the most memory of the process and of those it started; None where the system does not tell."""
    # getrusage would count what the parent held when it started the process.
    return family_bytes() if Path("/proc/self/status").exists() else None
