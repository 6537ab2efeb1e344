"""A front end's side of a connection to its device process: images go out, and come back as logits."""

import array
import json
import os
import pickle
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.front_ends.shared_memory import (
    ANSWER_BYTES,
    ANSWER_FORM,
    CONNECT,
    FAILED,
    LENGTH,
    NEWS,
    RELOAD,
    REQUEST_FORM,
    Area,
    Greeting,
    Shape,
    make_memory,
    shape_of,
)
from serve.request.limits import Limits

_MOST_BYTES = 2**13  # of answers that are read at once
_PAUSE_S = 0.05  # before another attempt at a door that was shut
_REQUEST = struct.Struct(REQUEST_FORM)


class Gone(Exception):
    """The device process has ended, or this connection to it."""


@dataclass(slots=True, eq=False)
class Flight:
    """The images of one owner, which are answered together however many batches they were in."""

    owner: Any
    slots: list[int]
    num_left: int
    has_failed: bool = False


class Link:
    """One connection and its memory. One thread sends, one receives."""

    def __init__(self, connection: socket.socket, area: Area) -> None:
        self._connection = connection
        self._area = area
        self._free = deque(range(area.num_slots))
        self._generations = [0] * area.num_slots
        self._flights: list[Flight | None] = [None] * area.num_slots
        self._rest = b""  # of an answer that has not come whole
        self._lock = threading.Lock()  # between sending and the end
        self.is_up = True
        self.has_news = False  # there is a newer model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, parcels: Iterable[tuple[Any, Sequence[np.ndarray]]]) -> list[Any]:
        """Hand over each owner's images [H, W, C]; the owners for whom no slots are left. `Gone` hands over nothing."""
        left, requests = [], b""
        with self._lock:
            if not self.is_up:
                raise Gone
            for owner, images in parcels:
                if len(images) > len(self._free):
                    left.append(owner)
                else:
                    requests += self._put(owner, images)
            with suppress(OSError):  # who receives finds the end
                self._connection.sendall(requests)
        return left

    def _put(self, owner: Any, images: Sequence[np.ndarray]) -> bytes:
        """Write into free slots: the requests that name them."""
        slots = [self._free.popleft() for _ in images]
        try:
            for slot, image in zip(slots, images, strict=True):
                self._area.pixels[slot] = image
        except ValueError:
            self._free.extend(slots)
            raise
        flight, requests = Flight(owner, slots, len(slots)), b""
        for slot in slots:
            self._flights[slot] = flight
            self._generations[slot] = generation = (self._generations[slot] + 1) % 2**32
            requests += _REQUEST.pack(slot, generation)
        return requests

    def receive(self, *, waits: bool = False) -> list[Flight]:
        """Those whose last image is answered by now. `Gone` at the end."""
        try:
            came = self._connection.recv(_MOST_BYTES, 0 if waits else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            came = b""
        if not came:
            raise Gone
        came = self._rest + came
        end = len(came) // ANSWER_BYTES * ANSWER_BYTES
        self._rest, finished = came[end:], []
        for slot, generation, status in struct.iter_unpack(ANSWER_FORM, came[:end]):
            if slot == NEWS:
                self.has_news = True
                continue
            flight = self._flights[slot] if slot < self._area.num_slots else None
            if flight is None or generation != self._generations[slot]:
                self._connection.shutdown(socket.SHUT_RDWR)  # it makes no sense: the next call finds the end
                break
            self._flights[slot] = None
            flight.num_left -= 1
            flight.has_failed |= status == FAILED
            if not flight.num_left:
                finished.append(flight)
        return finished

    def take(self, flights: Sequence[Flight]) -> tuple[np.ndarray, list[float]]:
        """Logits [N, K] and seconds [N] of finished flights, whose slots are free from now on."""
        slots = [slot for flight in flights for slot in flight.slots]
        logits, seconds = self._area.logits[slots], self._area.seconds[slots].tolist()
        self._free.extend(slots)
        return logits, seconds

    def end(self) -> list[Flight]:
        """Close; what was under way."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # a thread that sends gives up
        with self._lock:
            self.is_up = False
            self._connection.close()
            flights = list(dict.fromkeys(flight for flight in self._flights if flight))
            self._flights = [None] * len(self._flights)
        return flights

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images → logits [N, K]; for a link on which nothing else is sent."""
        logits = []
        for start in range(0, len(images), self._area.num_slots):
            self.send([(None, [*images[start : start + self._area.num_slots]])])
            while not (finished := self.receive(waits=True)):
                pass
            if finished[0].has_failed:
                raise RuntimeError("the model failed; the log of the device process says why")
            logits.append(self.take(finished)[0])
        return np.concatenate(logits)


@dataclass(eq=False)
class Remote:
    """The model of a device process, as a runtime. What it holds ends with it."""

    model: Model
    platform: str
    description: str
    library: str
    number: int  # the newer model has the greater one
    link: Link
    again: "Dial"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """On a connection of its own, beside all that `link` has under way."""
        other = self.again.connect(num_slots=len(images))
        with other.link as link:
            if other.number != self.number:
                raise RuntimeError("another model serves by now")
            return link.run(images)


@dataclass(frozen=True)
class Dial:
    """Makes connections to a device process through its door, which outlives it."""

    door: socket.socket
    limits: Limits

    def connect(self, *, num_slots: int | None = None) -> Remote:
        """As soon as the device process answers; refuses where there is no memory for its slots."""
        while True:
            connection = self._knock(CONNECT)
            try:
                greeting = _read_greeting(connection)
                most = shape_of(greeting.model, self.limits)
                shape = shape_of(
                    greeting.model, self.limits, num_slots=min(num_slots or most.num_slots, most.num_slots)
                )
                link = Link(connection, _share_memory(connection, shape))
            except (OSError, EOFError):  # it ended in the middle
                connection.close()
                time.sleep(_PAUSE_S)
                continue
            except BaseException:
                connection.close()
                raise
            say = (greeting.model, greeting.platform, greeting.description, greeting.library)
            return Remote(*say, greeting.number, link, self)

    def reload(self) -> int:
        """Have the model's file read again: the number of what serves then. Refuses what the device process refuses."""
        with self._knock(RELOAD) as connection, connection.makefile("rb") as file:
            answer = file.read()
        if not answer:
            raise Refusal("the device process ended while it read the model's file again")
        said = json.loads(answer)
        if "refusal" in said:
            raise Refusal(said["refusal"])
        return said["number"]

    def _knock(self, purpose: bytes) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            socket.send_fds(self.door, [purpose], [theirs.fileno()])
        return ours


def _read_greeting(connection: socket.socket) -> Greeting:
    (length,) = struct.unpack(LENGTH, _read_exactly(connection, struct.calcsize(LENGTH)))
    return pickle.loads(_read_exactly(connection, length))  # of the process that the supervisor started for this


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        if not (came := connection.recv(num_bytes - len(content))):
            raise EOFError
        content += came
    return content


def _share_memory(connection: socket.socket, shape: Shape) -> Area:
    file = make_memory(shape)
    try:
        socket.send_fds(connection, [array.array("I", [shape.num_slots]).tobytes()], [file])
        return Area(file, shape)
    finally:
        os.close(file)
