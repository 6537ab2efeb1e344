"""What the process of a device does for a batch beside running the model, in processor time."""

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.simulated import Simulated
from serve.front_ends.device import Device
from serve.front_ends.link import Dialer, Link
from serve.request.batcher import Served
from serve.request.limits import Limits

FRONT_ENDS, IMAGES = (1, 2, 4, 8, 16), (1, 4, 16)  # in a batch, and of each of them


class Stopped:
    """A runtime that costs nothing and stops in each batch until it may go on; `spent` is the time of its thread."""

    platform = description = library = "stopped"

    def __init__(self, like: Simulated) -> None:
        self.model = like.model
        self.spent: list[float] = []
        self.arrived, self.may_go = threading.Semaphore(0), threading.Semaphore(0)
        self._logits = np.zeros((max(FRONT_ENDS) * max(IMAGES), len(self.model.spec.labels)), np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.spent.append(time.thread_time())
        self.arrived.release()
        self.may_go.acquire()
        return self._logits[: len(images)]


def hand_over(like: Simulated, max_batch: int, times: int) -> dict[str, Any]:
    """Microseconds of a batch, of each front end that has images in it and of each image; and what that is drawn from.

    Images lie in wait in all connections while the batch before is in the model, so each turn of the loop is one batch.
    """
    runtime, limits = Stopped(like), Limits(max_batch=max_batch)
    doors = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(max(FRONT_ENDS))]
    device = Device(Served((runtime,)), [inside for _, inside in doors], limits, load=lambda: [])
    thread = threading.Thread(target=device.run)
    thread.start()
    links = [Dialer(outside, limits).connect().link for outside, _ in doors]
    rows = [
        (num, num_images, _batch_us(runtime, links[:num], num_images, times))
        for num in FRONT_ENDS
        for num_images in IMAGES
    ]
    for link in links:
        link.end()
    device.stop()
    thread.join()
    for end in (end for pair in doors for end in pair):
        end.close()
    causes = np.array([(1, num, num * num_images) for num, num_images, _ in rows], float)
    batch_us, front_end_us, image_us = np.linalg.lstsq(causes, np.array([us for *_, us in rows]), rcond=None)[0]
    return {"rows": rows, "batch_us": batch_us, "front_end_us": front_end_us, "image_us": image_us}


def _batch_us(runtime: Stopped, links: Sequence[Link], num_images: int, times: int) -> float:
    image = runtime.model.spec.image
    pixels = [np.zeros((image.height, image.width, image.channels), np.uint8)] * num_images
    links[0].send([(None, pixels[:1])])
    runtime.arrived.acquire()
    runtime.spent.clear()
    before: Sequence[Link] = links[:1]
    for _ in range(times):
        for link in links:
            link.send([(None, pixels)])
        runtime.may_go.release()
        runtime.arrived.acquire()
        _take(before)
        before = links
    runtime.may_go.release()
    _take(links)
    return 1e6 * float(np.median(np.diff(runtime.spent)))


def _take(links: Sequence[Link]) -> None:
    for link in links:
        while not (flights := link.receive(waits=True)):
            pass
        link.take(flights)
