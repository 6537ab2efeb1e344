import socket

import pytest

from common.refusal import Refusal
from serve import run as module
from serve.config import ServeConfig
from serve.run import reserved


def bind(port, *options):
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", port))


def test_a_reserved_port_is_free_for_those_who_share_it_alone():
    with reserved("127.0.0.1", 0) as port:
        bind(port, socket.SO_REUSEPORT)
        bind(port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)  # as gRPC does
        for options in ((), (socket.SO_REUSEADDR,)):
            with pytest.raises(OSError, match="already in use"):
                bind(port, *options)
    bind(port)


def test_a_port_that_somebody_else_shares_is_refused():
    """Two servers would have it, and each half of the calls."""
    with (
        reserved("127.0.0.1", 0) as port,
        pytest.raises(Refusal, match="already in use; choose another with --grpc-port"),
    ):
        reserved("127.0.0.1", port).__enter__()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("no such host", 0)])
def test_what_is_no_address_is_refused(host, port):
    with pytest.raises(Refusal, match=f"cannot listen on {host} port {port} for gRPC"):
        reserved(host, port).__enter__()


def test_without_its_packages_the_extra_is_named(monkeypatch):
    for missing in ("grpc", "tritonclient"):
        monkeypatch.setattr(module, "find_spec", lambda name, missing=missing: None if name == missing else name)
        with pytest.raises(
            Refusal, match=r"--grpc-port needs gRPC, which is not installed: pip install -e '\.\[grpc\]'"
        ):
            reserved("127.0.0.1", 0).__enter__()


def test_an_address_is_written_as_grpc_reads_it():
    assert ServeConfig(grpc_port=8001).grpc_address == "127.0.0.1:8001"
    assert ServeConfig(host="::1", grpc_port=8001).grpc_address == "[::1]:8001"
