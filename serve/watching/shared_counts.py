"""Counts that the workers of a server share: each has an array in a file, and all read the files.

prometheus_client does the same for its own counters, one number at a time; here a whole batch is added at once.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Names the folder of the shared counts, for this module and for prometheus_client, which reads it when imported.
COUNTS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_log = logging.getLogger(__name__)


class Counts:
    """`own`, float64 [size], starts at zero and is changed by this process only; counts are exact to 2^53."""

    def __init__(self, name: str, size: int) -> None:
        folder = os.environ.get(COUNTS_VARIABLE)
        self._path = Path(folder, f"{name}.{os.getpid()}.counts") if folder else None
        self.own = _in_file(self._path, size) if self._path else np.zeros(size)

    def of_all(self) -> np.ndarray:
        """[processes, size]: of this process and all other workers, also those that have ended."""
        return np.array([self.own, *self._others(are_alive=False)])

    def of_living(self) -> np.ndarray:
        """The same without processes that have ended: for current values."""
        return np.array([self.own, *self._others(are_alive=True)])

    def _others(self, *, are_alive: bool) -> list[np.ndarray]:
        if self._path is None:
            return []
        name = self._path.name.split(".")[0]
        paths = [path for path in self._path.parent.glob(f"{name}.*.counts") if path != self._path]
        arrays = [np.fromfile(path) for path in paths if not are_alive or _is_alive(int(path.name.split(".")[1]))]
        return [array for array in arrays if len(array) == len(self.own)]


def buckets(edges: Sequence[float], counts: Sequence[float] | np.ndarray) -> list[tuple[str, float]]:
    """Of a Prometheus histogram, from the counts between `edges` and beyond the last one."""
    return list(zip([*map(str, edges), "+Inf"], np.cumsum(counts).tolist(), strict=True))


def _in_file(path: Path, size: int) -> np.ndarray:
    """An array in a file; in memory if the disk has no room for it."""
    num_bytes = size * np.dtype(np.float64).itemsize
    try:
        with path.open("a+b") as file:  # counts of an ended process with the same id continue
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # otherwise a full disk would kill the process later
        return np.asarray(np.memmap(path, np.float64, mode="r+", shape=(size,)))
    except OSError as error:
        _log.warning("other workers do not see the counts of this one: %s", error.strerror or error)
        return np.zeros(size)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:  # there is none, or one of another user, which is no worker
        return False
    return True
