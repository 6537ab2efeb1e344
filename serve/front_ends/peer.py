"""A device process's side of a connection to a front end. It validates every message."""

import os
import pickle
import socket
import struct
from dataclasses import replace
from time import monotonic_ns

import numpy as np

from serve.front_ends.shared_memory import (
    ANSWER_BYTES,
    ANSWER_FORM,
    DONE,
    FAILED,
    LENGTH,
    NEWER_MODEL,
    REQUEST_BYTES,
    Area,
    Greeting,
    ProtocolError,
    open_area,
    shape_of,
)
from serve.request.job import Served
from serve.request.limits import Limits

_MOST_BYTES = 2**13  # of requests read at once
_NONE = np.empty((0, 2), np.uint32)


class DeviceModel:
    """The model of a device process: its runtime, and the greeting that describes it to front ends."""

    def __init__(self, served: Served, limits: Limits) -> None:
        (self.runtime,) = served.runtimes
        self.served = served
        self.number = monotonic_ns()  # also grows from one process to its replacement
        self.shape = shape_of(served.model, limits)  # with the most slots that a connection may have
        names = self.runtime.platform, self.runtime.description, self.runtime.library
        greeting = pickle.dumps(Greeting(self.number, served.model, *names))
        self.greeting = struct.pack(LENGTH, len(greeting)) + greeting


class Peer:
    """One connection of a front end. All its images are for one model."""

    def __init__(self, connection: socket.socket, door: socket.socket, model: DeviceModel) -> None:
        connection.setblocking(False)
        self.connection, self.door, self.model = connection, door, model
        self._area: Area | None = None
        self._rest = b""  # the beginning of an incomplete request
        self.unsent = model.greeting  # not taken by the connection yet
        self._most_unsent = len(model.greeting)
        self._knows_newer_model = False
        self.is_awaited = False  # whether the device waits until it takes `unsent`
        self.is_open = True

    def read(self) -> np.ndarray:
        """The requests [n, 2] that have arrived: slot, generation. Raises `ProtocolError`, or `EOFError` at the end."""
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
        """The first message: the number of slots, and their memory."""
        try:
            content, files, _, _ = socket.recv_fds(self.connection, 4, 1)
        except BlockingIOError:
            return
        try:
            if not content:
                raise EOFError
            if len(content) != 4 or len(files) != 1:
                raise ProtocolError(f"it sent {len(content)} bytes and {len(files)} files in place of its memory")
            (num_slots,) = struct.unpack("=I", content)
            most_slots = self.model.shape.num_slots
            if not 1 <= num_slots <= most_slots:
                raise ProtocolError(f"it has {num_slots} slots, and may have 1 to {most_slots}")
            shape = replace(self.model.shape, num_slots=num_slots)
            self._area = open_area(files[0], shape)
        finally:
            for file in files:
                os.close(file)
        self._next = np.ones(num_slots, np.uint32)  # generation of each slot
        self._is_busy, self._num_busy = np.zeros(num_slots, bool), 0
        self._most_unsent += ANSWER_BYTES * (num_slots + 1)

    def _check(self, slots: np.ndarray, generations: np.ndarray) -> None:
        """Refuses slots that do not exist, are busy, or have another generation."""
        try:
            self._is_busy[slots] = True
        except IndexError:
            raise ProtocolError(f"it names slot {slots.max()} of {len(self._is_busy)}") from None
        self._num_busy += len(slots)
        if np.count_nonzero(self._is_busy) != self._num_busy:
            raise ProtocolError("it wrote a slot twice before the answer")
        if (self._next[slots] != generations).any():
            raise ProtocolError("it names a slot as it was at another time")
        self._next[slots] = generations + np.uint32(1)

    def images(self, requests: np.ndarray) -> np.ndarray:
        """A copy [n, H, W, C], which the front end can no longer change."""
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
        """Say once that there is a newer model."""
        if not self._knows_newer_model:
            self._knows_newer_model = True
            self.send(struct.pack(ANSWER_FORM, NEWER_MODEL, 0, 0))

    def send(self, content: bytes = b"") -> None:
        """Send as much as the connection takes now; the rest stays in `unsent`."""
        content = self.unsent + content
        try:
            self.unsent = content[self.connection.send(content) :]
        except BlockingIOError:
            self.unsent = content
        if len(self.unsent) > self._most_unsent:
            raise ProtocolError("it does not read its answers")

    def close(self) -> None:
        """Also releases the memory, even if this object is still referenced."""
        self.is_open, self._area = False, None
        self.connection.close()
