"""Work in a process of its own: what it returns, and what it costs in seconds and in memory beyond its imports."""

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *args: Any, core: int | None = None) -> Result:
    """`function(*args)` in a new Python process, on one core if given; an exception is raised here."""
    pin = {} if core is None else {"initializer": os.sched_setaffinity, "initargs": (0, {core})}
    with ProcessPoolExecutor(1, get_context("spawn"), **pin) as pool:
        return pool.submit(function, *args).result()


def cost_of(modules: Sequence[str], work: Callable[..., object], *args: Any) -> dict[str, float]:
    """The cost of `work(*args)` in a fresh process that has imported `modules`; what it prints is dropped.

    Seconds without the imports, and resident memory: the peak after the imports, at the end, and the difference.
    """
    return in_fresh_process(_measure, modules, work, args)


def _measure(modules: Sequence[str], work: Callable[..., object], args: tuple[Any, ...]) -> dict[str, float]:
    for module in modules:
        import_module(module)
    imported, start = memory_bytes(), time.perf_counter()
    with redirect_stdout(io.StringIO()):
        work(*args)
    seconds, peak = time.perf_counter() - start, memory_bytes()
    return {"seconds": seconds, "imported_bytes": imported, "peak_bytes": peak, "own_bytes": peak - imported}


def memory_bytes(field: str = "VmHWM", process: int | str = "self") -> int:
    """A field of /proc/PID/status: "VmRSS" is resident now, "VmHWM" the most ever."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def family_bytes(field: str = "VmHWM", process: int | str = "self") -> int:
    """`memory_bytes` of a process and of all that it started and that still run; what they share counts for each."""
    total = memory_bytes(field, process)
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            for child in children.read_text().split():
                with suppress(OSError, StopIteration):  # the child has ended
                    total += family_bytes(field, child)
    return total
