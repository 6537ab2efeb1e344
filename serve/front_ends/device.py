"""The process that runs the model for all front ends of a device: all that has come is its next batch.

One thread reads what front ends ask (shared_memory.py), stacks up to `max_batch` images, runs the model and answers.
While the model runs the next batch gathers in the connections, and no timer holds it back. Another thread reads the
model's file again. A front end that breaks the rules loses its connection; nobody else notices.
"""

import json
import logging
import os
import selectors
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from time import monotonic
from typing import Any

import numpy as np

from common.refusal import Refusal
from export.runtimes.runtime import Runtime
from serve.front_ends.line import Line, Serving
from serve.front_ends.shared_memory import CONNECT, RELOAD, Broken, make_memory, shape_of
from serve.model.check import Load, prepare
from serve.request.batcher import Served
from serve.request.limits import Limits
from serve.request.uvicorn_internals import Process

_MOST_EACH = 8  # connections of one front end: two at a reload, some for its checks
_log = logging.getLogger(__name__)


class Device:
    """All connections of one device process."""

    def __init__(
        self,
        served: Served,
        doors: Sequence[socket.socket],
        limits: Limits,
        *,
        load: Load,
    ) -> None:
        """`doors` are those of the front ends, one each. Refuses where there is no memory for the slots of all."""
        self._doors, self._limits, self._load = doors, limits, load
        self.observe_batch: Callable[[int], None] = lambda num_images: None
        self.observe_run: Callable[[Runtime], None] = lambda runtime: None  # which has computed a batch
        self._refuse_without_room(served)
        self._model = Serving(served, limits)
        self._lines: set[Line] = set()
        self._waiting: deque[tuple[Line, np.ndarray]] = deque()  # requests that are not in a batch yet
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()  # what is written into `_bell` ends a wait
        self._askers: SimpleQueue[socket.socket | None] = SimpleQueue()  # None: a signal asks
        self._is_stopping = False

    def run(self, *, on_start: Callable[[], None] = lambda: None) -> None:
        """Until it is told to stop and its last front end has gone."""
        for end in (self._alarm, self._bell, *self._doors):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ, self._wake)
        for door in self._doors:
            self._selector.register(door, selectors.EVENT_READ, partial(self._open, door))
        threading.Thread(target=self._reload_all, name="reload", daemon=True).start()
        with self._selector:
            on_start()
            while not (self._is_stopping and not self._lines):
                for key, events in self._selector.select(0 if self._waiting else None):
                    key.data(events)
                if self._waiting:
                    self._run_batch()
        self._alarm.close()
        self._bell.close()

    def heed_signals(self) -> None:
        """SIGTERM stops, SIGHUP reads the model's file again. Ctrl-C is for front ends, whose last jobs come here."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        signal.signal(signal.SIGHUP, lambda number, frame: self._askers.put(None))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def stop(self) -> None:
        """Serve until the last front end has gone."""
        self._is_stopping = True
        self._ring()

    def _ring(self) -> None:
        with suppress(OSError):  # full: it is awake
            self._bell.send(b"!")

    # What front ends ask

    def _open(self, door: socket.socket, events: int) -> None:
        """A front end is at its door, with a socket for the answer."""
        try:
            purpose, files, _, _ = socket.recv_fds(door, 2, 1)
        except BlockingIOError:
            return
        if not purpose:  # nobody can come there any more
            self._selector.unregister(door)
            return
        for file in files:
            try:
                connection = socket.socket(fileno=file)
            except OSError:
                os.close(file)
                continue
            if purpose == CONNECT and sum(line.door is door for line in self._lines) < _MOST_EACH:
                self._add(connection, door)
            elif purpose == RELOAD and self._askers.qsize() < _MOST_EACH:
                self._askers.put(connection)
            else:
                _log.warning("a connection of a front end is refused: it has too many, or none of a kind that is known")
                connection.close()

    def _add(self, connection: socket.socket, door: socket.socket) -> None:
        line = Line(connection, door, self._model, self._limits)
        self._lines.add(line)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, line))
        self._attempt(line, line.send)

    def _serve(self, line: Line, events: int) -> None:
        if events & selectors.EVENT_WRITE and line.is_open:
            self._attempt(line, line.send)
        if events & selectors.EVENT_READ and line.is_open:
            self._attempt(line, self._read, line)

    def _read(self, line: Line) -> None:
        if len(requests := line.read()):
            self._waiting.append((line, requests))

    def _attempt(self, line: Line, do: Callable[..., None], *args: Any) -> None:
        """What goes wrong with a line is its own end."""
        try:
            do(*args)
        except (EOFError, OSError):
            return self._close(line)
        except Broken as broken:
            _log.warning("a connection of a front end is closed: %s", broken)
            return self._close(line)
        if line.is_awaited != bool(line.unsent):
            line.is_awaited = bool(line.unsent)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.unsent else 0)
            self._selector.modify(line.connection, wanted, partial(self._serve, line))

    def _close(self, line: Line) -> None:
        if line.is_open:
            self._lines.discard(line)
            self._selector.unregister(line.connection)
            line.close()

    # The model

    def _run_batch(self) -> None:
        """The images that came first, `max_batch` at most."""
        taken, num_left = [], self._limits.max_batch
        while self._waiting and num_left:
            line, requests = self._waiting.popleft()
            if not line.is_open:
                continue
            if len(requests) > num_left:
                self._waiting.appendleft((line, requests[num_left:]))
                requests = requests[:num_left]
            taken.append((line, requests))
            num_left -= len(requests)
        for model, parts in groupby(taken, key=lambda part: part[0].model):
            self._run(model.runtime, list(parts), len(model.served.model.spec.labels))

    def _run(self, runtime: Runtime, parts: Sequence[tuple[Line, np.ndarray]], num_labels: int) -> None:
        images = [line.images(requests) for line, requests in parts]
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        self.observe_batch(len(batch))
        start, logits = monotonic(), None
        try:
            logits = runtime(batch)
            self.observe_run(runtime)
            if logits.shape != (len(batch), num_labels):
                raise RuntimeError(f"logits of shape {logits.shape} for {len(batch)} images and {num_labels} labels")
        except Exception:  # whatever a runtime raises is the answer of all that were in the batch
            _log.exception("the model fails on %d images", len(batch))
            logits = None
        seconds, first = monotonic() - start, 0
        for line, requests in parts:
            rows = None if logits is None else logits[first : first + len(requests)]
            first += len(requests)
            self._attempt(line, line.answer, requests, rows, seconds)

    # A model whose file is read again

    def _reload_all(self) -> None:
        while True:
            asker = self._askers.get()
            try:
                said = {"number": self._reload()}
            except Refusal as refusal:
                said = {"refusal": str(refusal)}
            if asker:
                with asker, suppress(OSError):
                    asker.sendall(json.dumps(said).encode())

    def _reload(self) -> int:
        """Load, check and warm up beside the old model, then swap. Refuses a bad one; the old one goes on."""
        try:
            _log.info("reading the model's file again")
            served = prepare(self._load, self._limits.max_batch)
            self._refuse_without_room(served)
        except Refusal as refusal:
            _log.error("the old model goes on: %s", refusal)
            raise
        self._model = model = Serving(served, self._limits)
        _log.warning("now serving %s %s", served.model.name, served.model.digest)
        self._ring()
        return model.number

    def _wake(self, events: int) -> None:
        with suppress(BlockingIOError):
            self._alarm.recv(64)
        for line in [line for line in self._lines if line.model is not self._model]:
            self._attempt(line, line.tell)

    def _refuse_without_room(self, served: Served) -> None:
        shape = shape_of(served.model, self._limits)
        num_slots = shape.num_slots * len(self._doors)
        os.close(make_memory(shape_of(served.model, self._limits, num_slots=num_slots)))


class DeviceServer:
    """What a process of serve/processes/supervisor.py runs, as it runs a `uvicorn.Server`."""

    started = False

    def __init__(self, make: Callable[[Sequence[socket.socket]], Device]) -> None:
        self._make = make

    def run(self, sockets: list[socket.socket]) -> None:
        device = self._make(sockets)
        device.heed_signals()
        device.run(on_start=self._start)

    def _start(self) -> None:
        self.started = True


class DeviceWorker(Process):
    """A process with a `Device`, which the factory of its settings makes."""

    @property
    def server(self) -> DeviceServer:  # type: ignore[override]
        if not isinstance(self._server, DeviceServer):
            self._server = DeviceServer(self.config.app)  # type: ignore[arg-type, assignment]
        return self._server  # type: ignore[return-value]
