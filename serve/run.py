"""Serve one model: `python serve/run.py plain.onnx`."""

import signal
import socket
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it waits until a model is loaded
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from serve.config import ServeConfig
from serve.v2.rpc.port import reserved


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
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"cannot listen on {host} port {port}: {reason.lower()}; choose another with --port") from error


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
