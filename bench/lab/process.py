"""Work in a process of its own: what it returns, and what it costs in seconds and in memory beyond its imports."""

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """One run in a fresh process. Memory is resident: VmHWM of /proc, which is what `ru_maxrss` reports."""

    seconds: float  # without imports
    imported_bytes: int  # the most until then
    peak_bytes: int  # the most ever

    @property
    def own_bytes(self) -> int:
        return self.peak_bytes - self.imported_bytes


def in_fresh_process(function: Callable[..., Result], *args: Any, core: int | None = None) -> Result:
    """`function(*args)` in a new Python process, on one core if given; an exception is raised here."""
    pin = {} if core is None else {"initializer": os.sched_setaffinity, "initargs": (0, {core})}
    with ProcessPoolExecutor(1, get_context("spawn"), **pin) as pool:
        return pool.submit(function, *args).result()


def cost_of(modules: Sequence[str], work: Callable[..., object], *args: Any) -> Cost:
    """The cost of `work(*args)` in a fresh process that has imported `modules`. What it prints is dropped."""
    return in_fresh_process(_measure, modules, work, args)


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


def _measure(modules: Sequence[str], work: Callable[..., object], args: tuple[Any, ...]) -> Cost:
    for module in modules:
        import_module(module)
    imported = memory_bytes()
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        work(*args)
    return Cost(time.perf_counter() - start, imported, memory_bytes())
