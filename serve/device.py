"""The process that runs the model for all front ends of a device: all that has come is its next batch.

One thread reads what front ends ask (serve/shared.py), stacks up to `max_batch` images, runs the model and answers.
While the model runs the next batch gathers in the connections, and no timer holds it back. Another thread reads the
model's file again. A front end that breaks the rules loses its connection; nobody else notices.
"""

import json
import logging
import os
import pickle
import selectors
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from time import monotonic, monotonic_ns
from typing import Any

import numpy as np
from uvicorn.supervisors.multiprocess import Process

from export.runtimes.runtime import Runtime
from serve.batcher import Served
from serve.limits import Limits
from serve.reload import Load, prepare
from serve.shared import (
    ANSWER_BYTES,
    ANSWER_FORM,
    CONNECT,
    DONE,
    FAILED,
    LENGTH,
    NEWS,
    RELOAD,
    REQUEST_BYTES,
    Area,
    Broken,
    Greeting,
    make_memory,
    open_area,
    shape_of,
)
from train.refusal import Refusal

_MOST_BYTES = 2**13  # of requests that are read at once
_MOST_EACH = 8  # connections of one front end: two at a reload, some for its checks
_NONE = np.empty((0, 2), np.uint32)
_log = logging.getLogger(__name__)


class Serving:
    """What serves: a runtime, and what front ends are told of it."""

    def __init__(self, served: Served, limits: Limits) -> None:
        (self.runtime,) = served.runtimes
        self.served = served
        self.number = monotonic_ns()  # so that it grows when a process takes the place of another one
        self.most_slots = shape_of(served.model, limits).num_slots
        told = (self.runtime.platform, self.runtime.description, self.runtime.library)
        greeting = pickle.dumps(Greeting(self.number, served.model, *told))
        self.greeting = struct.pack(LENGTH, len(greeting)) + greeting


class Line:
    """This side of one connection, all of whose jobs are for one model. Trusts nothing that it reads."""

    def __init__(self, connection: socket.socket, door: socket.socket, model: Serving, limits: Limits) -> None:
        connection.setblocking(False)
        self.connection, self.door, self.model, self._limits = connection, door, model, limits
        self._area: Area | None = None
        self._rest = b""  # of a request that has not come whole
        self.unsent = model.greeting  # that the connection has not taken yet
        self._most_unsent = len(model.greeting)
        self._is_told = False  # of a newer model
        self.is_awaited = False  # until it takes what is unsent
        self.is_open = True

    def read(self) -> np.ndarray:
        """Requests [n, 2] that have come: slot, generation. `Broken` for what nobody may ask, `EOFError` at the end."""
        if self._area is None:
            self._take_memory()
            return _NONE
        try:
            came = self.connection.recv(_MOST_BYTES)
        except BlockingIOError:
            return _NONE
        if not came:
            raise EOFError
        came = self._rest + came
        num = len(came) // REQUEST_BYTES
        self._rest = came[num * REQUEST_BYTES :]
        requests = np.frombuffer(came, np.uint32, 2 * num).reshape(num, 2)
        self._check(requests[:, 0].astype(np.intp), requests[:, 1])
        return requests

    def _take_memory(self) -> None:
        """The first message: how many slots there are, and their memory."""
        try:
            content, files, _, _ = socket.recv_fds(self.connection, 4, 1)
        except BlockingIOError:
            return
        try:
            if not content:
                raise EOFError
            if len(content) != 4 or len(files) != 1:
                raise Broken(f"it sent {len(content)} bytes and {len(files)} files in place of its memory")
            (num_slots,) = struct.unpack("=I", content)
            if not 1 <= num_slots <= self.model.most_slots:
                raise Broken(f"it has {num_slots} slots, and may have 1 to {self.model.most_slots}")
            shape = shape_of(self.model.served.model, self._limits, num_slots=num_slots)
            self._area = open_area(files[0], shape)
        finally:
            for file in files:
                os.close(file)
        self._next = np.ones(num_slots, np.uint32)  # generation of each slot
        self._is_busy, self._num_busy = np.zeros(num_slots, bool), 0
        self._most_unsent += ANSWER_BYTES * (num_slots + 1)

    def _check(self, slots: np.ndarray, generations: np.ndarray) -> None:
        """Each of these slots may be written now."""
        try:
            self._is_busy[slots] = True
        except IndexError:
            raise Broken(f"it names slot {slots.max()} of {len(self._is_busy)}") from None
        self._num_busy += len(slots)
        if np.count_nonzero(self._is_busy) != self._num_busy:
            raise Broken("it wrote a slot twice before the answer")
        if (self._next[slots] != generations).any():
            raise Broken("it names a slot as it was at another time")
        self._next[slots] = generations + np.uint32(1)

    def images(self, requests: np.ndarray) -> np.ndarray:
        """A copy [n, H, W, C]: what its owner writes there from now on changes nothing."""
        assert self._area
        return self._area.pixels[requests[:, 0]]

    def answer(self, requests: np.ndarray, logits: np.ndarray | None, seconds: float) -> None:
        """Logits [n, K], or None where the model failed."""
        assert self._area
        slots = requests[:, 0].astype(np.intp)  # once, and not for each use
        if logits is not None:
            self._area.logits[slots] = logits
        self._area.seconds[slots] = seconds
        answers = np.empty((len(slots), 3), np.uint32)
        answers[:, :2], answers[:, 2] = requests, FAILED if logits is None else DONE
        self._is_busy[slots] = False
        self._num_busy -= len(slots)
        self.send(answers.tobytes())

    def tell(self) -> None:
        """There is a newer model; said once."""
        if not self._is_told:
            self._is_told = True
            self.send(struct.pack(ANSWER_FORM, NEWS, 0, 0))

    def send(self, content: bytes = b"") -> None:
        """As much as the connection takes now; the rest stays in `unsent`."""
        content = self.unsent + content
        try:
            self.unsent = content[self.connection.send(content) :]
        except BlockingIOError:
            self.unsent = content
        if len(self.unsent) > self._most_unsent:
            raise Broken("it does not read its answers")

    def close(self) -> None:
        """Also gives the memory back, whoever still holds this."""
        self.is_open, self._area = False, None
        self.connection.close()


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
    """What a process of serve/supervisor.py runs, as it runs a `uvicorn.Server`."""

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
