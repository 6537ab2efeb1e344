"""Numbers that the workers of a server count together: an array in a file for each of them, read by all.

The library behind /metrics does the same for its own counters, one number at a time; here a batch's are added at once.
"""

import logging
import os
from pathlib import Path

import numpy as np

# Where this module and prometheus_client find the folder in which processes count together; for the library it must
# stand before its import.
COUNTS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_log = logging.getLogger(__name__)


class Counts:
    """`own` float64 [size], which starts at zero and which this process alone changes; counts are exact to 2^53."""

    def __init__(self, name: str, size: int) -> None:
        folder = os.environ.get(COUNTS_VARIABLE)
        self._path = Path(folder, f"{name}.{os.getpid()}.counts") if folder else None
        self.own = _in_file(self._path, size) if self._path else np.zeros(size)

    def of_all(self) -> np.ndarray:
        """[processes, size]: this one's, and those of workers beside it or before them."""
        return np.array([self.own, *self._others(are_alive=False)])

    def of_living(self) -> np.ndarray:
        """The same without processes that have ended: for what is now."""
        return np.array([self.own, *self._others(are_alive=True)])

    def _others(self, *, are_alive: bool) -> list[np.ndarray]:
        if self._path is None:
            return []
        name = self._path.name.split(".")[0]
        paths = [path for path in self._path.parent.glob(f"{name}.*.counts") if path != self._path]
        arrays = [np.fromfile(path) for path in paths if not are_alive or _is_alive(int(path.name.split(".")[1]))]
        return [array for array in arrays if len(array) == len(self.own)]


def _in_file(path: Path, size: int) -> np.ndarray:
    """An array whose changes other processes see; in memory alone where there is no room for it on the disk."""
    num_bytes = size * np.dtype(np.float64).itemsize
    try:
        with path.open("a+b") as file:  # what an ended process of the same number counted goes on
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # or a full disk would end the process at some later count
        return np.asarray(np.memmap(path, np.float64, mode="r+", shape=(size,)))
    except OSError as error:
        _log.warning("other workers do not see what this one counts of its answers: %s", error.strerror or error)
        return np.zeros(size)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
