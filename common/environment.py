"""What this process runs on: the processor, the cores that it may use, and the versions of packages."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path


def num_cores() -> int:
    """The cores that this process may use on Linux; elsewhere all of the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, if the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions(*packages: str) -> dict[str, str]:
    """Of those `packages` that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # which takes as long as all else of --help

    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
