"""Open connections: counted, and bounded by the command line and by the files that the process may open."""

import logging
import sys
from collections.abc import Callable
from time import monotonic

_log = logging.getLogger(__name__)

SPARE_FILES = 128  # for models, logs, libraries, and connections that are being refused
MAX_TURNED_AWAY = SPARE_FILES // 2  # connections beyond the limit that are told why; any more are cut off
_QUIET_S = 60.0  # between two log lines about a full server


class Door:
    """The connections of one process."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self.num_open = 0
        self.on_change: Callable[[int], None] = lambda num_open: None
        self.on_refuse: Callable[[], None] = lambda: None
        self._last_line = float("-inf")

    @property
    def is_full(self) -> bool:
        """Whether more connections are open than allowed, including the newest."""
        return self.num_open > self.max_connections

    @property
    def is_overrun(self) -> bool:
        """Whether there is no room left to refuse a connection with an answer."""
        return self.num_open > self.max_connections + MAX_TURNED_AWAY

    def enter(self) -> None:
        """Count a new connection."""
        self.num_open += 1
        self.on_change(self.num_open)
        if self.is_full:
            self.on_refuse()
            self._say_full()

    def leave(self) -> None:
        """Count a closed connection."""
        self.num_open -= 1
        self.on_change(self.num_open)

    def _say_full(self) -> None:
        now = monotonic()
        if now - self._last_line > _QUIET_S:
            self._last_line = now
            _log.warning(
                "%d connections are open, as many as may be, and more are refused; the next %g s say so no more",
                self.max_connections,
                _QUIET_S,
            )


def fit_to_files(max_connections: int) -> int:
    """`max_connections`, or as many as the process may open files for, once its limit is raised as far as possible."""
    if sys.platform == "win32":
        return max_connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    fitting = max(1, soft - SPARE_FILES)
    _log.warning(
        "%d connections at once instead of %d: a process may open %d files here; raise the limit with ulimit -n",
        fitting,
        max_connections,
        soft,
    )
    return fitting
