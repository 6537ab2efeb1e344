"""Where gRPC is served: what must be known of it, and refused, before its packages are loaded."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from common.refusal import Refusal


@dataclass(frozen=True)
class RpcAddress:
    """Where calls are taken, and how long those under way may take once the server stops."""

    host: str
    port: int
    drain_s: float

    def __str__(self) -> str:
        """As gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """The number of a free port, which until the end only processes of this user that share it can have.

    Each worker binds it anew with SO_REUSEPORT, which gRPC sets on every socket of its own: two servers that know
    nothing of one another would share a port without a word, had nobody asked for it without that option first.
    """
    if not (find_spec("grpc") and find_spec("tritonclient")):
        raise Refusal("--grpc-port needs gRPC, which is not installed: pip install -e '.[grpc]'")
    with socket.socket(_family(host, port)) as holder:
        try:
            with socket.socket(holder.family) as asking:
                asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server before it left behind
                asking.bind((host, port))
                port = asking.getsockname()[1]
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind((host, port))
        except (OSError, OverflowError) as error:
            raise _refusal(host, port, error) from error
        yield port


def _family(host: str, port: int) -> int:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, OverflowError) as error:
        raise _refusal(host, port, error) from error


def _refusal(host: str, port: int, error: Exception) -> Refusal:
    reason = getattr(error, "strerror", None) or str(error)
    return Refusal(f"cannot listen on {host} port {port} for gRPC: {reason.lower()}; choose another with --grpc-port")
