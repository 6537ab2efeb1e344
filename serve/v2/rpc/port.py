"""The address of gRPC: checked and reserved before gRPC itself is imported."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from common.refusal import Refusal


@dataclass(frozen=True)
class RpcAddress:
    """Where calls are taken, and the time for those under way when the server stops."""

    host: str
    port: int
    drain_s: float

    def __str__(self) -> str:
        """As gRPC writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Reserves a port, which then only processes of this user that set SO_REUSEPORT can bind. Gives its number.

    gRPC sets that option on all its sockets, so that workers can share the port. Two servers would share it unnoticed
    too; binding it once without the option detects another server.
    """
    if not (find_spec("grpc") and find_spec("tritonclient")):
        raise Refusal("--grpc-port needs gRPC, which is not installed: pip install -e '.[grpc]'")
    with socket.socket(_family(host, port)) as holder:
        try:
            with socket.socket(holder.family) as asking:
                asking.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # an earlier server may have lingering ones
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
