"""A server as a process of its own on core 0: started, asked until it answers, checked and ended."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.servers import PEERS, Server, Way
from common.files import read_whole
from common.refusal import Refusal

_CORE = "0"
_START_S = 90.0
_STOP_S = 20.0
_POLL_S = 0.1
# None of them may ask the network; every library that opens threads of its own gets the one core.
_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def running(server: Server, python: Path, model: Path, log: Path) -> Iterator[str]:
    """The URL of a started server; what it prints goes to `log`. Refuses one that does not answer in time."""
    port = _free_port()
    environment = {**os.environ, **_ENVIRONMENT, "MODEL": str(model)}
    if server.environment:
        environment["PYTHONPATH"] = str(PEERS)
    argv = ["taskset", "-c", _CORE, str(python), *server.arguments(model, port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        _wait_for_port(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def check_answers(url: str, way: Way, bodies: list[bytes], expected: list[int]) -> None:
    """Post every body once; refuses a class that is not the model's own. The first one may have to wait."""
    found = [way.find_index(_post(url + way.path, way.media_type, body)) for body in bodies]
    if found != expected:
        raise Refusal(f"{way.title} answers {found} where the model itself gives {expected}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _wait_for_port(process: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = read_whole(log).decode(errors="replace").strip().splitlines() or ["no message"]
            raise Refusal(f"ends with status {process.returncode}: {lines[-1][:300]}")
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(_POLL_S)
    raise Refusal(f"does not listen after {_START_S:g} s; see {log}")


def _post(url: str, media_type: str, body: bytes) -> object:
    """The JSON that comes back. A server that listens before its model is loaded is asked again."""
    until = time.monotonic() + _START_S
    while True:
        try:
            request = urllib.request.Request(url, body, {"Content-Type": media_type})
            with urllib.request.urlopen(request, timeout=_START_S) as answer:
                return json.load(answer)
        except OSError as error:  # an HTTP status is one too
            if time.monotonic() > until:
                raise Refusal(f"{url} gives no answer after {_START_S:g} s: {error}") from error
            time.sleep(_POLL_S)


def _end(process: subprocess.Popen) -> None:
    """Ask the first process to stop, then kill whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
