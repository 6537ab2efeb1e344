"""python bench/servers/simulated.py PLAIN: serve/run.py with a simulated device: t0 + n t1 for n images, and no core.

Every answer is the same, whatever the images: measured is the work around the model. `hand_over` measures the process
of the device alone.
"""

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from common.cli import run_command
from export.runtimes.onnx_session import OnnxSession
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.front_ends.device import Device
from serve.front_ends.link import Dialer, Link
from serve.model.load import Roles
from serve.request.job import Served
from serve.request.limits import Limits

TIMES = "DIRACNET_SIMULATED_US"  # "t0,t1" in microseconds
FRONT_ENDS, IMAGES = (1, 2, 4, 8, 16), (1, 4, 16)  # in a batch, and of each of them
EXAMPLES = ("DIRACNET_SIMULATED_US=200,4 python bench/servers/simulated.py models/fashion-mnist.onnx --front-ends 2",)


class Simulated:
    """A runtime that gives every image the same logits, after `wait` of the number of images; by default at once."""

    platform = description = library = "simulated"

    def __init__(self, path: Path, wait: Callable[[int], object] = lambda num_images: None) -> None:
        self.model, self._wait = OnnxSession(path, num_threads=1).model, wait
        logits = np.arange(len(self.model.spec.labels), dtype=np.float32)
        self._logits = np.broadcast_to(logits, (1_000_000, len(logits)))  # more than any batch; one row of memory

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._wait(len(images))
        return self._logits[: len(images)]


def load(roles: Roles, home: Path | None = None) -> Sequence[Runtime]:
    """The simulated device, with the times that the environment gives, instead of the model in the file."""
    fixed_s, each_s = (float(text) * 1e-6 for text in os.environ[TIMES].split(","))
    return [Simulated(roles.served.model_paths[0], lambda num_images: time.sleep(fixed_s + num_images * each_s))]


def serve(config: ServeConfig) -> int:
    """The server, whole or in front ends and a device process."""
    from bench.servers import simulated  # a class of __main__ would have no name in other processes
    from serve.processes import serving
    from serve.run import listen

    with listen(config.host, config.port) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving.load = lambda config: list(load(Roles(config)))
        return serving.run(config, listener, url, load_on_device=simulated.load)


class Gate:
    """Stops each batch until it may go on; `spent` is the processor time of the model's thread at each."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.arrived, self.may_go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, num_images: int) -> None:
        self.spent.append(time.thread_time())
        self.arrived.release()
        self.may_go.acquire()


def hand_over(path: Path, max_batch: int, times: int) -> dict[str, Any]:
    """Processor time of the device process for a batch, beside running the model: the measured `rows`, and a fit.

    The fit is microseconds of a batch, of each front end that has images in it and of each image. Images wait in all
    connections while the model runs the batch before, so each turn of the loop is one batch.
    """
    gate, limits = Gate(), Limits(max_batch=max_batch)
    runtime = Simulated(path, gate)
    pixels = np.zeros(runtime.model.spec.image.shape, np.uint8)
    doors = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(max(FRONT_ENDS))]
    device = Device(Served((runtime,)), [inside for _, inside in doors], limits, load=lambda: [])
    thread = threading.Thread(target=device.run)
    thread.start()
    links = [Dialer(outside).connect().link for outside, _ in doors]
    rows = [
        {"num": num, "us": [_batch_us(gate, links[:num], images * [pixels], times) for images in IMAGES]}
        for num in FRONT_ENDS
    ]
    for link in links:
        link.end()
    device.stop()
    thread.join()
    for end in itertools.chain(*doors):
        end.close()
    causes = np.array([(1, num, num * images) for num in FRONT_ENDS for images in IMAGES], float)
    costs = np.linalg.lstsq(causes, np.array([us for row in rows for us in row["us"]]), rcond=None)[0].tolist()
    return {"rows": rows, **dict(zip(("batch_us", "front_end_us", "image_us"), costs, strict=True))}


def _batch_us(gate: Gate, links: Sequence[Link], pixels: list[np.ndarray], times: int) -> float:
    """The median time of the device's thread for a batch of these `pixels` from each of `links`."""
    links[0].send([(None, pixels[:1])])
    gate.arrived.acquire()
    gate.spent.clear()
    before: Sequence[Link] = links[:1]
    for _ in range(times):
        for link in links:
            link.send([(None, pixels)])
        gate.may_go.release()
        gate.arrived.acquire()
        _take(before)
        before = links
    gate.may_go.release()
    _take(links)
    return 1e6 * float(np.median(np.diff(gate.spent)))


def _take(links: Sequence[Link]) -> None:
    for link in links:
        while not (flights := link.receive(waits=True)):
            pass
        link.take(flights)


if __name__ == "__main__":
    sys.exit(run_command(serve, ServeConfig, examples=EXAMPLES))
