"""Serve one model: `python serve/run.py plain.onnx`."""

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until a model is loaded
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from serve.config import ServeConfig


def serve(config: ServeConfig) -> int:
    """Serve a model over HTTP: a page at /, an API at /predict, its description at /docs, metrics at /metrics.

    SIGTERM finishes accepted requests; SIGHUP reads the model's file again and swaps it without losing a request.
    """
    with listen(config.host, config.port) as listener, ExitStack() as held:
        where = f"http://{_for_url(config.host)}:{listener.getsockname()[1]}"
        if config.grpc_port is not None:
            port = held.enter_context(reserved(config.host, config.grpc_port))
            config = replace(config, grpc_port=port)
            where += f", gRPC at {_for_url(config.host)}:{port}"
        from serve.processes.serving import run

        return run(config, listener, where)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; refuses a taken port or an address that is not this machine's."""
    with _refused(f"cannot listen on {host} port {port}", "--port"):
        return socket.create_server((host, port), family=_family(host, port))


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves a port for gRPC: only processes of this user that set SO_REUSEPORT can bind it. Gives its number.

    gRPC sets that option on all its sockets, so that workers can share the port. Two servers would share it unnoticed
    too; binding it once without the option detects another server.
    """
    if not (find_spec("grpc") and find_spec("tritonclient")):
        raise Refusal("--grpc-port needs gRPC, which is not installed: pip install -e '.[grpc]'")
    with ExitStack() as held:
        with _refused(f"cannot listen on {host} port {port} for gRPC", "--grpc-port"):
            holder = held.enter_context(socket.socket(_family(host, port)))
            with socket.socket(holder.family) as asking:
                asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past an earlier server's old sockets
                asking.bind((host, port))
                port = asking.getsockname()[1]
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind((host, port))
        yield port


def _family(host: str, port: int) -> int:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


@contextmanager
def _refused(what: str, flag: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"{what}: {reason.lower()}; choose another with {flag}") from error


def _for_url(host: str) -> str:
    """`host` as a browser on this machine needs it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(
        run_command(
            serve,
            ServeConfig,
            examples=(
                "python serve/run.py                 # the bundled Fashion-MNIST model",
                "python serve/run.py plain.onnx",
                "python serve/run.py plain.onnx plain-int8.onnx      # the faster one on this machine",
                "python serve/run.py plain.onnx plain-int8.onnx --cascade    # int8, and fp32 where that is in doubt",
                "python serve/run.py plain.onnx --host 0.0.0.0 --api-key-file key.txt --workers 4",
                "python serve/run.py plain.onnx --grpc-port 8001     # the Open Inference Protocol over gRPC too",
                "python serve/run.py plain.engine --devices 0 1 --max-batch 128",
                "python serve/run.py plain.engine --front-ends 8 --max-batch 128       # many cores feed one GPU",
                "python serve/run.py theirs.onnx --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --labels names.txt",
                "python serve/run.py plain.onnx --shadow newer.onnx --shadow-share 0.1      # compared in GET /model",
                "kill -HUP PID                       # read the model's file again",
                "curl --data-binary @image.png localhost:8000/predict",
            ),
        )
    )
