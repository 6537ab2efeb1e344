"""A front end's side of a connection to its device process: sends images, receives logits."""

import os
import pickle
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.front_ends.shared_memory import ANSWER, CONNECT, FAILED, MEMORY, NEWER_MODEL, RELOAD, REQUEST, Area, Shape

_MOST_BYTES = 2**13  # of answers read at once
_PAUSE_S = 0.05  # before connecting again


class Disconnected(Exception):
    """The device process has ended, or this connection to it."""


@dataclass(slots=True, eq=False)
class Flight:
    """The images of one owner, which are answered together even if they were in several batches."""

    owner: Any
    slots: list[int]
    num_left: int
    has_failed: bool = False


class Link(AbstractContextManager["Link"]):
    """One connection and its memory. One thread sends, one receives."""

    def __init__(self, connection: socket.socket, area: Area) -> None:
        self._connection = connection
        self._area = area
        self._free = deque(range(area.num_slots))
        self._flights: list[Flight | None] = [None] * area.num_slots
        self._rest = b""  # the beginning of an incomplete answer
        self._lock = threading.Lock()  # held by `send` and `end`
        self.is_up = True
        self.has_newer_model = False

    def __exit__(self, *error: object) -> None:
        self.end()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, parcels: Iterable[tuple[Any, Sequence[np.ndarray]]]) -> list[Any]:
        """Send each owner's images [H, W, C]. Returns the owners for whom no slots are left.

        Raises `Disconnected` if nothing was sent.
        """
        left, requests = [], b""
        with self._lock:
            if not self.is_up:
                raise Disconnected
            for owner, images in parcels:
                if len(images) > len(self._free):
                    left.append(owner)
                else:
                    requests += self._put(owner, images)
            with suppress(OSError):  # `receive` finds the end
                self._connection.sendall(requests)
        return left

    def _put(self, owner: Any, images: Sequence[np.ndarray]) -> bytes:
        """Write images into free slots. Returns the requests that name them."""
        slots = [self._free.popleft() for _ in images]
        try:
            for slot, image in zip(slots, images, strict=True):
                self._area.pixels[slot] = image
        except ValueError:
            self._free.extend(slots)
            raise
        flight = Flight(owner, slots, len(slots))
        for slot in slots:
            self._flights[slot] = flight
        return struct.pack(f"={len(slots)}I", *slots)

    def receive(self, *, waits: bool = False) -> list[Flight]:
        """The flights whose last image has been answered. Raises `Disconnected` when the connection ends."""
        try:
            came = self._connection.recv(_MOST_BYTES, 0 if waits else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            came = b""
        if not came:
            raise Disconnected
        came = self._rest + came
        end = len(came) // ANSWER.size * ANSWER.size
        self._rest, finished = came[end:], []
        for slot, status in ANSWER.iter_unpack(came[:end]):
            if slot == NEWER_MODEL:
                self.has_newer_model = True
                continue
            flight, self._flights[slot] = self._flights[slot], None
            assert flight
            flight.num_left -= 1
            flight.has_failed |= status == FAILED
            if not flight.num_left:
                finished.append(flight)
        return finished

    def take(self, flights: Sequence[Flight]) -> tuple[np.ndarray, list[float]]:
        """Logits [N, K] and seconds [N] of finished flights; their slots are free from now on."""
        slots = [slot for flight in flights for slot in flight.slots]
        logits, seconds = self._area.logits[slots], self._area.seconds[slots].tolist()
        self._free.extend(slots)
        return logits, seconds

    def end(self) -> list[Flight]:
        """Close the connection. Returns the unfinished flights."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # a thread that sends gives up
        with self._lock:
            self.is_up = False
            self._connection.close()
            flights = list(dict.fromkeys(flight for flight in self._flights if flight))
            self._flights = [None] * len(self._flights)
        return flights

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images → logits [N, K], on a link without unfinished flights."""
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
class RemoteRuntime:
    """The model of a device process, as a runtime. Its connection and memory end with it."""

    number: int  # greater for a newer model
    model: Model
    platform: str
    description: str
    library: str
    link: Link
    dialer: "Dialer"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """On a separate connection, so that it does not interfere with the flights on `link`."""
        other = self.dialer.connect(num_slots=len(images))
        with other.link as link:
            if other.number != self.number:
                raise RuntimeError("another model serves now")
            return link.run(images)


@dataclass(frozen=True)
class Dialer:
    """Makes connections to a device process through its door, which outlives the process."""

    door: socket.socket

    def connect(self, *, num_slots: int = 0) -> RemoteRuntime:
        """With `num_slots`, or all that the limits allow. Waits for the device process; refuses if it has no memory."""
        while True:
            connection = self._knock(CONNECT + REQUEST.pack(num_slots))
            try:
                content, files, _, _ = socket.recv_fds(connection, 2**12, 1)
            except OSError:
                content, files = b"", []
            if files:
                return self._take_memory(connection, *files, *MEMORY.unpack(content))
            connection.close()
            if content:
                raise Refusal(content.decode())
            time.sleep(_PAUSE_S)  # the process ended meanwhile

    def _take_memory(self, connection: socket.socket, file: int, greeting_at: int) -> RemoteRuntime:
        try:
            content = os.pread(file, os.fstat(file).st_size - greeting_at, greeting_at)
            greeting = pickle.loads(content)  # from the process that the supervisor started
            slot = greeting.pop("slot")
            link = Link(connection, Area(file, Shape(greeting_at // slot.itemsize, slot)))
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(file)
        return RemoteRuntime(**greeting, link=link, dialer=self)

    def reload(self) -> int:
        """Have the model's file read again; the number of the new model. Refuses what the device process refuses."""
        with self._knock(RELOAD) as connection, connection.makefile("rb") as file:
            answer = file.read()
        if not answer:
            raise Refusal("the device process ended while it read the model's file again")
        reply = pickle.loads(answer)
        if isinstance(reply, Refusal):
            raise reply
        return reply

    def _knock(self, purpose: bytes) -> socket.socket:
        connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with remote:
            socket.send_fds(self.door, [purpose], [remote.fileno()])
        return connection
