"""How many processor cores there are to work with."""

import os
import sys


def num_cores() -> int:
    """Those that this process may use, where the system tells; else those of the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
