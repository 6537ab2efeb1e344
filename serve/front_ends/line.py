"""A device process's side of one connection: what a front end asks is checked here, and nothing of it is trusted."""

import os
import pickle
import socket
import struct
from time import monotonic_ns

import numpy as np

from serve.front_ends.shared_memory import (
    ANSWER_BYTES,
    ANSWER_FORM,
    DONE,
    FAILED,
    LENGTH,
    NEWS,
    REQUEST_BYTES,
    Area,
    Broken,
    Greeting,
    open_area,
    shape_of,
)
from serve.request.batcher import Served
from serve.request.limits import Limits

_MOST_BYTES = 2**13  # of requests that are read at once
_NONE = np.empty((0, 2), np.uint32)


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
