"""Several processes that share one socket: those that end are replaced, and failed starts are tried again."""

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from serve.request.uvicorn_internals import Process

_log = logging.getLogger(__name__)
_TURN_S = 0.1
_START_S = 120.0  # for a worker to load its model
_PING_S = 5.0  # for a worker that serves to say so
_STABLE_S = 10.0  # a worker that served so long may end without being suspected
_LONGEST_DELAY_S = 60.0
_AFTER_DRAIN_S = 3.0  # for a worker to leave once its requests are done or dropped


class Server(uvicorn.Server):
    """Prints `greeting` once it listens. Before that, a signal ends the process at once, as it has no requests."""

    def __init__(self, config: uvicorn.Config, greeting: str = "") -> None:
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self.greeting:
            print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        elif sig == signal.SIGTERM:
            self.should_exit = True  # uvicorn would raise it again after a clean end, which has status 0
        else:
            super().handle_exit(sig, frame)


class Worker(Process):
    """A process that serves `sockets` with what `make_server` makes there."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], make_server: Callable[[Any], Any] = Server
    ) -> None:
        super().__init__(config, sockets)
        self._make_server = make_server

    @property
    def server(self) -> uvicorn.Server:
        self._server = server = self._server or self._make_server(self.config)
        return server


Kinds = Mapping[str, Sequence[Callable[[], Process]]]  # of processes: their name in the log, and what makes each


@dataclass
class _Place:
    """One of the processes of a kind, and its replacements."""

    name: str
    make: Callable[[], Process]
    worker: Process | None = None
    started: float = 0.0
    is_ready: bool = False
    has_failed: bool = False  # the last one ended before it was ready
    delay_s: float = 0.0
    due: float = 0.0  # when the next one starts

    def look_after(self) -> None:
        """Start a worker when it is due; replace one that has ended, hangs or takes too long to start."""
        worker = self.worker
        if worker is None:
            if monotonic() >= self.due:
                self._start()
        elif not worker.process.is_alive():
            self._replace(worker, "died")
        elif self.is_ready:
            if not worker.ping(_PING_S):
                self._replace(worker, f"did not answer within {_PING_S:g} s")
        elif worker.is_ready(_TURN_S):
            self.is_ready = True
            _log.info("%s %s serves", self.name, worker.pid)
        elif monotonic() - self.started > _START_S:
            self._replace(worker, f"was not ready within {_START_S:g} s")

    def _start(self) -> None:
        """With SIGHUP blocked, which the process unblocks once it has read its model."""
        self.worker, self.started = self.make(), monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        self.worker.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _replace(self, worker: Process, why: str) -> None:
        """The next one starts at once at first, then after a delay that doubles each time."""
        worker.kill()
        worker.process.join()
        if worker.pid:
            mark_process_dead(worker.pid)  # what it counted stays; what it held is gone
        if self.is_ready and monotonic() - self.started >= _STABLE_S:
            self.delay_s = 0.0
        wait_s = self.delay_s if self.is_ready else max(1.0, self.delay_s)
        self.delay_s = min(_LONGEST_DELAY_S, max(1.0, 2 * self.delay_s))
        self.worker, self.has_failed, self.is_ready = None, not self.is_ready, False
        self.due = monotonic() + wait_s
        when = f"in {wait_s:g} s" if wait_s else "now"
        _log.warning("%s %s %s (status %s); another starts %s", self.name, worker.pid, why, worker.exitcode, when)


class Supervisor:
    """Starts workers and replaces those that end, after longer and longer delays.

    Each kind needs the kinds after it, so they are stopped in order. The last one has the model and gets SIGHUP.
    """

    def __init__(self, kinds: Kinds, *, drain_s: int, say_ready: Callable[[], None]) -> None:
        self._drain_s, self._say_ready = drain_s, say_ready
        self._groups = [[_Place(name, make) for make in makes] for name, makes in kinds.items()]
        self._is_ending = False  # no `Event`: a signal may come while `wait` holds the lock that `set` takes
        self._must_hurry = False
        self._is_hung_up = False

    def run(self) -> bool:
        """Until a signal ends it (True), or no process of a kind serves and none can start (False)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._hang_up)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            return self._watch()
        finally:
            for group in self._groups:
                self._end_group(group)

    def _watch(self) -> bool:
        places, is_said = [place for group in self._groups for place in group], False
        while True:
            sleep(_TURN_S)
            if self._is_ending:
                return True
            if self._is_hung_up:
                self._is_hung_up = False
                for worker in [place.worker for place in self._groups[-1]]:
                    if worker and worker.pid and worker.process.is_alive():
                        os.kill(worker.pid, signal.SIGHUP)
            for place in places:
                place.look_after()
            if not is_said and all(place.is_ready for place in places):
                is_said = True
                self._say_ready()
            for group in self._groups:
                if all(place.worker is None and place.has_failed for place in group):
                    _log.error("no %s serves, and none can start", group[0].name)
                    return False

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._must_hurry, self._is_ending = self._is_ending, True  # told twice

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._is_hung_up = True

    def _end_group(self, group: Sequence[_Place]) -> None:
        begun = [(place.worker, self._drain_s if place.is_ready else 0) for place in group if place.worker]
        start = monotonic()
        for worker, _ in begun:
            worker.terminate()
        for worker, patience_s in begun:
            until = start + patience_s + _AFTER_DRAIN_S
            while worker.process.is_alive() and monotonic() < until and not self._must_hurry:
                worker.process.join(_TURN_S)
            worker.process.kill()  # if it is still there
            worker.process.join()
