"""Serve one model: `python serve/run.py plain.onnx`."""

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import POSITIONAL, run_command
from train.refusal import Refusal

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist.onnx"


@dataclass(frozen=True)
class ServeConfig:
    """Which model is served, and where."""

    model: Annotated[Path | None, "plain.onnx or plain.engine (default: models/fashion-mnist.onnx)", POSITIONAL] = None
    host: Annotated[str, "address to listen on; 0.0.0.0 is every one of this machine"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 lets the system choose"] = 8000


def serve(config: ServeConfig) -> int:
    """Serve a model over HTTP: a page at /, an API at /predict, its description at /docs."""
    with listen(config.host, config.port) as listener:
        import uvicorn

        from export.runtimes.load import load_runtime
        from serve.app import make_app
        from serve.limits import Limits

        runtime = load_runtime(config.model or BUNDLED)
        url = f"http://{_for_url(config.host)}:{listener.getsockname()[1]}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                if self.started:
                    print(f"{runtime.model.name} ({runtime.model.digest[:12]}) on {runtime.description}")
                    print(f"serving at {url}  (Ctrl-C stops)", flush=True)

        app = make_app(runtime, Limits())
        server = Server(uvicorn.Config(app, log_level="warning", ws="none"))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has finished its requests and hands the signal on
            print("stopped", flush=True)
    return 0 if server.started else 1


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; refuses a taken port or an address that is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"cannot listen on {host} port {port}: {reason.lower()}; choose another with --port") from error


def _for_url(host: str) -> str:
    """What a browser on this machine calls `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(
        run_command(
            serve,
            ServeConfig,
            examples=(
                "python serve/run.py                 # the Fashion-MNIST model that comes along",
                "python serve/run.py plain.onnx",
                "curl --data-binary @image.png -H 'Content-Type: image/png' localhost:8000/predict",
            ),
        )
    )
