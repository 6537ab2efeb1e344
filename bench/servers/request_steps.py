"""Without sockets, in a fresh process: the model alone, and the server's own parts, timed one on top of another.

A real request takes longer than their sum: the kernel's work, and the threads and caches that a model and a server
share on one core.
"""

import asyncio
import time
from collections.abc import Callable
from copy import copy
from email.utils import formatdate
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from bench.lab.rounds import median_ms
from bench.servers.simulated import Simulated
from common.image import decode
from export.runtimes.onnx_session import OnnxSession
from serve.request.access import EVERYBODY
from serve.request.batcher import Batcher
from serve.request.connection import Connection, Door
from serve.request.job import Job, Served
from serve.request.limits import Limits
from serve.request.predict import RequestHandler
from serve.watching.logs import RequestLog
from serve.watching.metrics import Metrics

BATCH_SIZE = 32  # requests at once, and images in a batch of the model
NUM_ROUNDS = 200
_QUEUE = "queue, batch, results, JSON"


def time_alone(model: Path, png: bytes, seconds: float) -> dict[str, float]:
    """Milliseconds of batches of 1 and 32: `model_1`, `model_32`; and of one image with its decoding."""
    runtime = OnnxSession(model, num_threads=1)
    spec = runtime.model.spec.image
    image = decode(png, spec)
    actions = {f"model_{size}": partial(runtime, np.repeat(image[None], size, 0)) for size in (1, BATCH_SIZE)}
    actions["decode_and_model_1"] = lambda: runtime(decode(png, spec)[None])
    return {name: median_ms(action, seconds, min_calls=1) for name, action in actions.items()}


def time_steps(model: Path, png: bytes) -> dict[str, float]:
    """Microseconds of processor time for each part of a request, the fastest of many rounds."""
    runtime = OnnxSession(model, num_threads=1)
    image = decode(png, runtime.model.spec.image)
    batch = np.repeat(image[None], BATCH_SIZE, 0)
    steps = {
        "model, in batches of 32": _fastest_us(lambda: runtime(batch), num_rounds=20),
        "decoding": _fastest_us(lambda: [decode(png, runtime.model.spec.image) for _ in range(BATCH_SIZE)]),
    }
    layers = uvloop.run(_time_layers(Simulated(model), png))
    steps |= {name: us - before for (name, us), before in zip(layers.items(), (0.0, *layers.values()), strict=False)}
    steps[_QUEUE] -= steps["decoding"]  # which this layer does too
    return steps


async def _time_layers(instant: Simulated, png: bytes) -> dict[str, float]:
    """A growing server: its connection alone, then its front, then metrics and log, then the batcher."""
    limits = Limits(decode_threads=0)
    batcher, door = Batcher(Served((instant,)), limits), Door(limits.max_connections)
    batcher.start()
    deadline = asyncio.get_running_loop().time() + 60
    job = await batcher.classify([png], top_k=5, deadline=deadline, receive=asyncio.Event().wait)  # type: ignore[arg-type]

    async def answer_at_once(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def finished(*_: Any, **__: Any) -> Job:
        return job

    prompt = copy(batcher)
    prompt.classify = finished  # type: ignore[method-assign]
    front = partial(RequestHandler, cast(ASGIApp, None), limits=Limits(), access=EVERYBODY)  # only predictions come
    observers = (Metrics(batcher, door), RequestLog(BytesIO()))
    layers = {
        "HTTP: uvicorn's protocol and one task": answer_at_once,
        "body, limits, headers, ids": front(batcher=prompt, observers=()),
        "metrics and log": front(batcher=prompt, observers=observers),
        _QUEUE: front(batcher=batcher, observers=observers),
    }
    times = {name: await _time_app(app, png) for name, app in layers.items()}
    await batcher.close()
    return times


class _Transport(asyncio.Transport):
    """A socket that accepts everything."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""  # since the last request

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass

    close = resume_reading  # after keep-alive, if the layers take that long


async def _time_app(app: ASGIApp, png: bytes) -> float:
    """Microseconds of one request among `BATCH_SIZE` that arrive at once, each on its own connection."""
    config = uvicorn.Config(app, log_config=None, access_log=False, http=Connection, ws="none", lifespan="off")
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
    connections = {_Transport(): Connection(config, state, {"door": Door(BATCH_SIZE)}) for _ in range(BATCH_SIZE)}
    for transport, connection in connections.items():
        connection.connection_made(transport)
    head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n\r\n"
    request = head.encode() + png
    times = []
    for _ in range(NUM_ROUNDS):
        start = time.process_time()
        for transport, connection in connections.items():
            transport.written = b""
            connection.data_received(request)
        while not all(transport.written for transport in connections):
            await asyncio.sleep(0)
        times.append(time.process_time() - start)
    if not all(transport.written.startswith(b"HTTP/1.1 200") for transport in connections):
        raise RuntimeError(f"the timed request failed: {next(iter(connections)).written[:300]!r}")
    for connection in connections.values():
        connection.connection_lost(ConnectionResetError())
    return 1e6 * min(times) / BATCH_SIZE


def _fastest_us(action: Callable[[], object], *, num_rounds: int = NUM_ROUNDS) -> float:
    """Microseconds of one image among `BATCH_SIZE`."""
    times = []
    for _ in range(num_rounds):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return 1e6 * min(times) / BATCH_SIZE
