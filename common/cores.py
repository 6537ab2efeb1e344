"""The number of processor cores."""

import os
import sys


def num_cores() -> int:
    """The cores that this process may use on Linux; elsewhere all of the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
