import asyncio
import io
import socket
import threading
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from PIL import Image
from serving import PATIENCE_S, command, popen, read_greeting
from starlette.testclient import TestClient

from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from serve.request.app import make_app
from serve.request.connection import Connection
from serve.request.limits import Limits


@pytest.fixture(scope="session")
def exported(make_net, make_spec):
    """Two real, small nets as ONNX, alike in shape."""
    nets = (fold(make_net(seed=seed)) for seed in (0, 1))
    return [to_onnx(net, make_spec(), {"training": {}}).SerializeToString() for net in nets]


@pytest.fixture
def artefact(tmp_path, exported):
    """A plain.onnx."""
    path = tmp_path / "plain.onnx"
    path.write_bytes(exported[0])
    return path


@pytest.fixture
def runtime(artefact):
    return OnnxSession(artefact)


@pytest.fixture
def other_artefact(tmp_path, exported):
    """A plain.onnx of the same shape with other weights."""
    path = tmp_path / "other.onnx"
    path.write_bytes(exported[1])
    return path


@pytest.fixture
def other_runtime(other_artefact):
    return OnnxSession(other_artefact)


class Gated:
    """A runtime that holds every batch until its gate is open."""

    platform = description = library = "gated"

    def __init__(self, runtime):
        self.model, self.batches, self.spoil = runtime.model, [], None
        self._runtime, self._gate, self._arrivals = runtime, threading.Event(), SimpleQueue()

    def __call__(self, images):
        self.batches.append(len(images))
        self._arrivals.put(len(images))
        assert self._gate.wait(PATIENCE_S)
        logits = self._runtime(images)
        return logits + self.spoil(images) if self.spoil else logits

    async def entered(self):
        """Until a batch is at the gate."""
        await asyncio.to_thread(self.wait)

    def wait(self):
        self._arrivals.get(timeout=PATIENCE_S)

    def open(self):
        self._gate.set()

    def close(self):
        """From now on; what ran before, as a warm-up does, is forgotten."""
        self._gate.clear()
        self.batches.clear()
        self._arrivals = SimpleQueue()


@pytest.fixture
def gated(runtime):
    """Closed; a test that fails leaves no thread behind."""
    gated = Gated(runtime)
    yield gated
    gated.open()


@pytest.fixture
def client(runtime):
    limits = Limits(max_body_bytes=20_000, max_images=3, max_pixels=1_000_000)
    with TestClient(make_app(runtime, limits), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def pixels():
    """Five images [5, 8, 8, 3] that the net takes as they are."""
    return np.random.default_rng(5).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def encode():
    def encode(pixels, kind="PNG", **options):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=kind, **options)
        return file.getvalue()

    return encode


class _Live(uvicorn.Server):
    """A server in a thread of this process, which says when it listens."""

    def __init__(self, app, **settings):
        super().__init__(uvicorn.Config(app, port=0, log_level="warning", ws="none", **settings))
        self.listening = threading.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        self.listening.set()


@pytest.fixture
def live():
    """`with live(app) as url`: the app over real HTTP on a free port, with uvicorn's settings."""

    @contextmanager
    def live(app, **settings):
        server = _Live(app, **settings)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert server.listening.wait(PATIENCE_S)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)

    return live


@pytest.fixture
def served(live, runtime):
    """The url of a server whose connections are ours."""
    with live(make_app(runtime, Limits()), http=Connection) as url:
        yield url


@pytest.fixture
def connect():
    """`connect(url)` is an open socket to the server."""
    opened = []

    def connect(url):
        opened.append(socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def start():
    """`start(*argv)` is a server that listens, with its `url`; all are killed at the end.

    With `waits=False` it may not listen yet. `options` are those of `subprocess.Popen`.
    """
    servers = []

    def start(*argv, program=None, waits=True, **options):
        chosen = () if "--runtime" in argv else ("--runtime", "onnxruntime")
        server = popen(program or command("run.py", *argv, *chosen, "--port", 0), **options)
        servers.append(server)
        if waits:
            read_greeting(server)
        return server

    yield start
    for server in servers:
        server.kill()
        server.communicate()
