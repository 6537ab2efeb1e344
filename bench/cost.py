"""What a piece of work costs in a process of its own: seconds, and memory beside that of its imports."""

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
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


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)` in a Python that has nothing else in memory; an exception is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def cost_of(modules: Sequence[str], work: Callable[..., object], *args: Any) -> Cost:
    """What `work(*args)` costs in a fresh process that has imported `modules`. What it prints is dropped."""
    return in_fresh_process(_measure, modules, work, args)


def memory_bytes(field: str = "VmHWM", process: int | str = "self") -> int:
    """A field of /proc/PID/status: "VmRSS" is resident now, "VmHWM" the most ever."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def family_bytes(field: str = "VmHWM", process: int | str = "self") -> int:
    """`memory_bytes` of a process and of all that it started and that still run; what they share counts for each."""
    threads = Path(f"/proc/{process}/task").iterdir()
    children = [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
    return memory_bytes(field, process) + sum(family_bytes(field, child) for child in children)


def _measure(modules: Sequence[str], work: Callable[..., object], args: tuple[Any, ...]) -> Cost:
    for module in modules:
        import_module(module)
    imported = memory_bytes()
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        work(*args)
    return Cost(time.perf_counter() - start, imported, memory_bytes())
