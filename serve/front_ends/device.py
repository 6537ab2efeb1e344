"""The process that runs the model for all front ends of a device.

One thread reads requests (shared_memory.py), stacks up to `max_batch` images, runs the model and answers. While the
model runs, the next batch gathers in the connections; there is no timer. Another thread reads the model's file again.
A front end that sends an invalid message loses its connection; the others are not affected.
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
from dataclasses import replace
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from time import monotonic
from typing import Any

import numpy as np
import uvicorn

from common.refusal import Refusal
from export.runtimes.runtime import Runtime
from serve.front_ends.peer import DeviceModel, Peer
from serve.front_ends.shared_memory import CONNECT, RELOAD, ProtocolError, make_memory, shape_of
from serve.model.check import Load, prepare
from serve.request.job import Served
from serve.request.limits import Limits

_MOST_EACH = 8  # connections of one front end: two during a reload, and some for its checks
_log = logging.getLogger(__name__)


class Device:
    """All connections of one device process."""

    def __init__(self, served: Served, doors: Sequence[socket.socket], limits: Limits, *, load: Load) -> None:
        """Each front end has one of `doors`. Refuses if there is no memory for the slots of all."""
        self._doors, self._limits, self._load = doors, limits, load
        self.observe_batch: Callable[[int], None] = lambda num_images: None
        self.observe_run: Callable[[Runtime], None] = lambda runtime: None
        self._refuse_without_room(served)
        self._model = DeviceModel(served, limits)
        self._peers: set[Peer] = set()
        self._waiting: deque[tuple[Peer, np.ndarray]] = deque()  # requests not in a batch yet
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()  # a byte written to `_bell` ends a wait
        self._askers: SimpleQueue[socket.socket | None] = SimpleQueue()  # None: a signal asks
        self._is_stopping = False

    def run(self, *, on_start: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop and the last front end has disconnected."""
        for end in (self._alarm, self._bell, *self._doors):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ, self._wake)
        for door in self._doors:
            self._selector.register(door, selectors.EVENT_READ, partial(self._open, door))
        threading.Thread(target=self._reload_all, name="reload", daemon=True).start()
        with self._selector:
            on_start()
            while not (self._is_stopping and not self._peers):
                for key, events in self._selector.select(0 if self._waiting else None):
                    key.data(events)
                if self._waiting:
                    self._run_batch()
        self._alarm.close()
        self._bell.close()

    def heed_signals(self) -> None:
        """SIGTERM stops, SIGHUP reads the model's file again. Ctrl-C is for front ends, whose last jobs run here."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        signal.signal(signal.SIGHUP, lambda number, frame: self._askers.put(None))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def stop(self) -> None:
        """End once the last front end has disconnected."""
        self._is_stopping = True
        self._ring()

    def _ring(self) -> None:
        with suppress(OSError):  # full: it is awake
            self._bell.send(b"!")

    # Connections

    def _open(self, door: socket.socket, events: int) -> None:
        """A front end sends a purpose and a socket for the answer."""
        try:
            purpose, files, _, _ = socket.recv_fds(door, 2, 1)
        except BlockingIOError:
            return
        if not purpose:  # the front end has closed the door
            self._selector.unregister(door)
            return
        for file in files:
            try:
                connection = socket.socket(fileno=file)
            except OSError:
                os.close(file)
                continue
            if purpose == CONNECT and sum(peer.door is door for peer in self._peers) < _MOST_EACH:
                self._add(connection, door)
            elif purpose == RELOAD and self._askers.qsize() < _MOST_EACH:
                self._askers.put(connection)
            else:
                _log.warning("a connection of a front end is refused: it has too many, or its purpose is unknown")
                connection.close()

    def _add(self, connection: socket.socket, door: socket.socket) -> None:
        peer = Peer(connection, door, self._model)
        self._peers.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, peer))
        self._attempt(peer, peer.send)

    def _serve(self, peer: Peer, events: int) -> None:
        if events & selectors.EVENT_WRITE and peer.is_open:
            self._attempt(peer, peer.send)
        if events & selectors.EVENT_READ and peer.is_open:
            self._attempt(peer, self._read, peer)

    def _read(self, peer: Peer) -> None:
        if len(requests := peer.read()):
            self._waiting.append((peer, requests))

    def _attempt(self, peer: Peer, do: Callable[..., None], *args: Any) -> None:
        """Close only this connection if it fails."""
        try:
            do(*args)
        except (EOFError, OSError):
            return self._close(peer)
        except ProtocolError as broken:
            _log.warning("a connection of a front end is closed: %s", broken)
            return self._close(peer)
        if peer.is_awaited != bool(peer.unsent):
            peer.is_awaited = bool(peer.unsent)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
            self._selector.modify(peer.connection, wanted, partial(self._serve, peer))

    def _close(self, peer: Peer) -> None:
        if peer.is_open:
            self._peers.discard(peer)
            self._selector.unregister(peer.connection)
            peer.close()

    # The model

    def _run_batch(self) -> None:
        """Run the oldest images, at most `max_batch`."""
        taken, num_left = [], self._limits.max_batch
        while self._waiting and num_left:
            peer, requests = self._waiting.popleft()
            if not peer.is_open:
                continue
            if len(requests) > num_left:
                self._waiting.appendleft((peer, requests[num_left:]))
                requests = requests[:num_left]
            taken.append((peer, requests))
            num_left -= len(requests)
        for model, parts in groupby(taken, key=lambda part: part[0].model):
            self._run(model.runtime, list(parts), len(model.served.model.spec.labels))

    def _run(self, runtime: Runtime, parts: Sequence[tuple[Peer, np.ndarray]], num_labels: int) -> None:
        images = [peer.images(requests) for peer, requests in parts]
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        self.observe_batch(len(batch))
        start, logits = monotonic(), None
        try:
            logits = runtime(batch)
            self.observe_run(runtime)
            if logits.shape != (len(batch), num_labels):
                raise RuntimeError(f"logits of shape {logits.shape} for {len(batch)} images and {num_labels} labels")
        except Exception:  # any error of a runtime is the answer to the whole batch
            _log.exception("the model fails on %d images", len(batch))
            logits = None
        seconds, first = monotonic() - start, 0
        for peer, requests in parts:
            rows = None if logits is None else logits[first : first + len(requests)]
            first += len(requests)
            self._attempt(peer, peer.answer, requests, rows, seconds)

    # Reloading

    def _reload_all(self) -> None:
        while True:
            asker = self._askers.get()
            try:
                reply = {"number": self._reload()}
            except Refusal as refusal:
                reply = {"refusal": str(refusal)}
            if asker:
                with asker, suppress(OSError):
                    asker.sendall(json.dumps(reply).encode())

    def _reload(self) -> int:
        """Load, check and warm up beside the old model, then swap. Refuses a bad model; the old one keeps serving."""
        try:
            _log.info("reading the model's file again")
            served = prepare(self._load, self._limits.max_batch)
            self._refuse_without_room(served)
        except Refusal as refusal:
            _log.error("the old model keeps serving: %s", refusal)
            raise
        self._model = model = DeviceModel(served, self._limits)
        _log.warning("now serving %s %s", served.model.name, served.model.digest)
        self._ring()
        return model.number

    def _wake(self, events: int) -> None:
        with suppress(BlockingIOError):
            self._alarm.recv(64)
        for peer in [peer for peer in self._peers if peer.model is not self._model]:
            self._attempt(peer, peer.tell)

    def _refuse_without_room(self, served: Served) -> None:
        shape = shape_of(served.model, self._limits)
        os.close(make_memory(replace(shape, num_slots=shape.num_slots * len(self._doors))))


class DeviceServer:
    """The server of a `Worker` of serve/processes/supervisor.py, in place of a `uvicorn.Server`."""

    started = False

    def __init__(self, config: uvicorn.Config) -> None:
        """`config.app` makes a `Device` from its front ends' sockets."""
        self._make: Any = config.app

    def run(self, sockets: list[socket.socket]) -> None:
        device: Device = self._make(sockets)
        device.heed_signals()
        device.run(on_start=self._start)

    def _start(self) -> None:
        self.started = True
