"""The process that runs the model for all front ends of a device.

One event loop reads requests (shared_memory.py), stacks up to `max_batch` images, runs the model and answers. While the
model runs, the next batch gathers in the connections; there is no timer. A thread reads the model's file again.
"""

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from time import monotonic, monotonic_ns
from typing import Any

import numpy as np
import uvicorn

from common.refusal import Refusal
from export.runtimes.runtime import Model, Runtime
from serve.front_ends.shared_memory import (
    ANSWER,
    CONNECT,
    DONE,
    FAILED,
    MEMORY,
    NEWER_MODEL,
    RELOAD,
    REQUEST,
    Area,
    make_memory,
    shape_of,
)
from serve.model.check import LoadModel, in_daemon_thread, take_model
from serve.processes.signals import heed_signals
from serve.request.job import Served
from serve.request.limits import Limits

_MOST_EACH = 8  # connections of one front end: two during a reload, and some for its checks
_log = logging.getLogger(__name__)


class Device:
    """All connections of one device process."""

    def __init__(self, served: Served, doors: Sequence[socket.socket], limits: Limits, *, load: LoadModel) -> None:
        """Each front end has one of `doors`. Refuses if there is no memory for the slots of all."""
        self._doors, self._limits, self._load = doors, limits, load
        self.observe_batch: Callable[[int], None] = lambda num_images: None
        self.observe_run: Callable[[Runtime], None] = lambda runtime: None
        self._refuse_without_room(served.model)
        self._use(served)
        self._peers: set[_Peer] = set()
        self._waiting: deque[tuple[_Peer, np.ndarray]] = deque()  # slots not in a batch yet; then one is scheduled
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_connections: Counter[socket.socket] = Counter()  # by door, with those that wait for their memory
        self._num_reloads = 0
        self._is_stopping = False

    def run(self, *, on_start: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop and the last front end has disconnected."""
        asyncio.run(self._serve(on_start))

    def stop(self) -> None:
        """End once the last front end has disconnected; from any thread."""
        self._is_stopping = True
        if self._loop:
            self._loop.call_soon_threadsafe(self._end_if_idle)

    async def _serve(self, on_start: Callable[[], None]) -> None:
        self._loop, self._turn, self._ended = asyncio.get_running_loop(), asyncio.Lock(), asyncio.Event()
        for door in self._doors:
            door.setblocking(False)
            self._loop.add_reader(door, self._open, door)
        with heed_signals(before_stop=self.stop, reload=self.reload):
            on_start()
            self._end_if_idle()
            await self._ended.wait()

    def _end_if_idle(self) -> None:
        if self._is_stopping and not self._peers:
            self._ended.set()

    # Connections

    def _open(self, door: socket.socket) -> None:
        """A front end sends a purpose and a socket for the answer."""
        try:
            message, files, _, _ = socket.recv_fds(door, 1 + REQUEST.size, 1)
        except BlockingIOError:
            return
        purpose, num_slots = message[:1], int.from_bytes(message[1:], sys.byteorder)
        if not purpose:  # the front end has closed the door
            asyncio.get_running_loop().remove_reader(door)
        for file in files:
            try:
                connection = socket.socket(fileno=file)
            except OSError:
                os.close(file)
                continue
            if purpose == CONNECT and self._num_connections[door] < _MOST_EACH:
                self._num_connections[door] += 1
                self._begin(self._connect(connection, door, num_slots))
            elif purpose == RELOAD and self._num_reloads < _MOST_EACH:
                self._num_reloads += 1
                self._begin(self._answer_reload(connection))
            else:
                _log.warning("a connection of a front end is refused: it has too many, or its purpose is unknown")
                connection.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself would let it be collected
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket, door: socket.socket, num_slots: int) -> None:
        """Memory is allocated in a thread: 100 MB take the time of many batches."""
        connection.setblocking(False)
        loop, served, greeting, most = asyncio.get_running_loop(), self.served, self._greeting, self._shape.num_slots
        shape = replace(self._shape, num_slots=min(num_slots or most, most))
        try:
            file = await in_daemon_thread(partial(make_memory, shape, greeting))
            try:
                area = Area(file, shape)
                socket.send_fds(connection, [MEMORY.pack(shape.num_bytes)], [file])
            finally:
                os.close(file)
            await loop.connect_accepted_socket(lambda: _Peer(self, door, served, area), connection)
        except (Refusal, OSError, ValueError) as error:  # no memory, or not a socket for this
            _log.warning("a front end cannot connect: %s", error)
            self._num_connections[door] -= 1
            with connection, suppress(OSError):
                connection.send(str(error).encode())

    def add(self, peer: "_Peer") -> None:
        self._peers.add(peer)
        peer.tell(self.served)  # if there is a newer model since it was greeted

    def discard(self, peer: "_Peer") -> None:
        self._peers.discard(peer)
        self._num_connections[peer.door] -= 1
        self._end_if_idle()

    # The model

    def put(self, peer: "_Peer", slots: np.ndarray) -> None:
        """Queue images; the batch that is scheduled with the first includes all that are read in the same turn."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._run_batch)
        self._waiting.append((peer, slots))

    def _run_batch(self) -> None:
        """Run the oldest images, at most `max_batch`."""
        taken, num_left = [], self._limits.max_batch
        while self._waiting and num_left:
            peer, slots = self._waiting.popleft()
            if not peer.is_open:
                continue
            if len(slots) > num_left:
                self._waiting.appendleft((peer, slots[num_left:]))
                slots = slots[:num_left]
            taken.append((peer, slots))
            num_left -= len(slots)
        for served, parts in groupby(taken, key=lambda part: part[0].served):
            self._run(served, list(parts))
        if self._waiting:  # two turns, because connections are read in the first
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._run_batch)

    def _run(self, served: Served, parts: Sequence[tuple["_Peer", np.ndarray]]) -> None:
        (runtime,) = served.runtimes
        num_images = sum(len(slots) for _, slots in parts)
        start, logits = monotonic(), None
        try:
            self.observe_batch(num_images)
            images = [peer.images(slots) for peer, slots in parts]
            batch = images[0] if len(images) == 1 else np.concatenate(images)
            logits = runtime(batch)
            self.observe_run(runtime)
            expected = (num_images, len(served.model.spec.labels))
            if logits.shape != expected:
                raise RuntimeError(f"logits of shape {logits.shape} for {expected[0]} images and {expected[1]} labels")
        except Exception:  # any error of a runtime is the answer to the whole batch
            _log.exception("the model fails on %d images", num_images)
            logits = None
        seconds, first = monotonic() - start, 0
        for peer, slots in parts:
            rows = None if logits is None else logits[first : first + len(slots)]
            first += len(slots)
            peer.answer(slots, rows, seconds)

    # Reloading

    async def reload(self) -> None:
        """Load, check and warm up beside the old model, then swap. Refuses a bad model; the old one keeps serving."""
        async with self._turn:
            await take_model(self._load_with_room, self._limits.max_batch, self._use, "reading the model's file again")
            for peer in self._peers:
                peer.tell(self.served)

    def _load_with_room(self) -> Sequence[Runtime]:
        runtimes = self._load()
        self._refuse_without_room(runtimes[0].model)
        return runtimes

    def _refuse_without_room(self, model: Model) -> None:
        shape = shape_of(model, self._limits)
        os.close(make_memory(replace(shape, num_slots=shape.num_slots * len(self._doors))))

    async def _answer_reload(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            try:
                await self.reload()
                reply: int | Refusal = self._number
            except Refusal as refusal:
                reply = refusal
            finally:
                self._num_reloads -= 1
            connection.send(pickle.dumps(reply), socket.MSG_DONTWAIT)

    def _use(self, served: Served) -> None:
        """Describe `served` to all front ends that connect from now on."""
        (runtime,) = served.runtimes
        shape = shape_of(served.model, self._limits)
        number = monotonic_ns()  # also grows from one process to its replacement
        greeting = {name: getattr(runtime, name) for name in ("model", "platform", "description", "library")}
        self.served, self._shape, self._number = served, shape, number
        self._greeting = pickle.dumps({"slot": shape.slot, "number": number, **greeting})


class _Peer(asyncio.Protocol):
    """One connection of a front end, with its memory. It validates every message. All its images are for one model."""

    def __init__(self, device: Device, door: socket.socket, served: Served, area: Area) -> None:
        self._device, self.door, self.served = device, door, served
        self._area: Area | None = area
        self._rest = b""  # the beginning of an incomplete request
        self._is_busy, self._num_busy = np.zeros(area.num_slots, bool), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._device.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._area = None  # even if this object is still referenced
        self._device.discard(self)

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Requests have arrived."""
        data = self._rest + data
        num = len(data) // REQUEST.size
        self._rest = data[num * REQUEST.size :]
        slots = np.frombuffer(data, np.uint32, num).astype(np.intp)  # once, and not for each use
        self._num_busy += num
        try:
            self._is_busy[slots] = True
        except IndexError:
            return self._cut_off(f"it names slot {slots.max()} of {len(self._is_busy)}")
        if np.count_nonzero(self._is_busy) != self._num_busy:
            return self._cut_off("it wrote a slot twice before the answer")
        if num:
            self._device.put(self, slots)

    def images(self, slots: np.ndarray) -> np.ndarray:
        """A copy [n, H, W, C], which the front end can no longer change."""
        assert self._area
        return self._area.pixels[slots]

    def answer(self, slots: np.ndarray, logits: np.ndarray | None, seconds: float) -> None:
        """Logits [n, K], or None where the model failed."""
        assert self._area
        if logits is not None:
            self._area.logits[slots] = logits
        self._area.seconds[slots] = seconds
        answers = np.empty((len(slots), 2), np.uint32)
        answers[:, 0], answers[:, 1] = slots, FAILED if logits is None else DONE
        self._is_busy[slots] = False
        self._num_busy -= len(slots)
        self._transport.write(answers.tobytes())
        if self._transport.get_write_buffer_size() > ANSWER.size * len(self._is_busy):
            self._cut_off("it does not read its answers")

    def tell(self, served: Served) -> None:
        """Say that `served` is the model of new connections."""
        if self.served is not served and self.is_open:
            self._transport.write(ANSWER.pack(NEWER_MODEL, 0))

    def _cut_off(self, reason: str) -> None:
        """End this connection alone."""
        _log.warning("a connection of a front end is closed: %s", reason)
        self._transport.abort()


class DeviceServer:
    """The server of a `Worker` of serve/processes/supervisor.py, in place of a `uvicorn.Server`."""

    started = False

    def __init__(self, config: uvicorn.Config) -> None:
        """`config.app` makes a `Device` from its front ends' sockets."""
        self._make: Any = config.app

    def run(self, sockets: list[socket.socket]) -> None:
        device: Device = self._make(sockets)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for front ends, whose last jobs run here
        device.run(on_start=partial(setattr, self, "started", True))
