"""How many connections there may be, and for how long each."""

import logging
import socket
import subprocess
import sys
import threading

import pytest
from fastapi import Response
from raw_http import CHUNKED, HEALTH, everything, one_answer, post, problem_in

from serve.request.app import make_app
from serve.request.connection import MAX_TURNED_AWAY, Connection
from serve.request.limits import SPARE_FILES, Limits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "dripped"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n", b"x"),
        (b"GET /healthz HTTP/1.1\r\n" + CHUNKED + b"\r\n", b"1\r\nx\r\n"),
        (b"GET /healthz HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\n", b"a: b\r\n"),
        (HEALTH, b"\r\n"),
    ],
)
def test_drops_after_an_answer_do_not_keep_a_connection(live, runtime, connect, sent, dripped):
    with live(make_app(runtime, Limits()), http=Connection, timeout_keep_alive=1) as url:
        connection = connect(url)
        connection.sendall(sent)
        assert one_answer(connection).startswith(b"HTTP/1.1 ")
        connection.settimeout(0.05)  # between two drops
        for _ in range(1000):
            try:
                connection.sendall(dripped)
                if not connection.recv(1):
                    return
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return
        raise AssertionError("the connection is still open")


@pytest.mark.parametrize("keep", [b"keep-alive", b"close"])
def test_an_answer_that_nobody_reads_is_given_up(live, runtime, connect, keep):
    class Told(Connection):
        write_s = 0.1

        def connection_lost(self, exc):
            super().connection_lost(exc)
            lost.set()

    lost, app = threading.Event(), make_app(runtime, Limits())
    app.add_api_route("/large", lambda: Response(bytes(2**26)))
    with live(app, http=Told) as url:
        connect(url).sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: " + keep + b"\r\n\r\n")
        assert lost.wait(60)


@pytest.mark.slow
def test_a_client_that_does_not_leave_after_its_refusal_is_left(live, runtime, connect):
    lost = threading.Event()

    class Told(Connection):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            lost.set()

    with live(make_app(runtime, Limits()), http=Told, timeout_keep_alive=1) as url:
        connection = connect(url)
        connection.sendall(b"NONSENSE\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 400 ")
        assert lost.wait(60)


def test_a_client_that_stops_sending_gets_its_answers(served, connect, pixels, encode):
    connection = connect(served)
    connection.sendall(HEALTH + post(encode(pixels[0])))
    connection.shutdown(socket.SHUT_WR)
    assert everything(connection).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.slow
def test_a_client_that_stops_sending_waits_for_its_answer_as_long_as_any_other(live, gated, connect, pixels, encode):
    gated.open()
    with live(make_app(gated, Limits()), http=Connection) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(post(encode(pixels[0])))
        connection.shutdown(socket.SHUT_WR)
        interim = b""
        while interim.count(b"\r\n\r\n") < 3:
            interim += connection.recv(65536)
        gated.open()
        answer = everything(connection)
    assert interim == interim.count(b"\r\n\r\n") * b"HTTP/1.1 100 Continue\r\n\r\n"  # or more at once
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 100 "))
    assert answer.rpartition(b"\r\n\r\n")[2].startswith(b'{"model"')


@pytest.mark.slow
def test_a_client_that_is_gone_is_told_from_one_that_stopped_sending(live, gated, connect, pixels, encode):
    statuses, gone = [], threading.Event()

    def observe(visit):
        statuses.append(visit.status)
        gone.set()

    gated.open()
    with live(make_app(gated, Limits(), observers=[observe]), http=Connection) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(post(encode(pixels[0])))
        gated.wait()
        connection.close()
        assert gone.wait(60)
        gated.open()
    assert statuses == [499]


def test_half_a_request_is_not_waited_for_when_its_client_stops_sending(served, connect):
    connection = connect(served)
    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
    connection.shutdown(socket.SHUT_WR)
    assert everything(connection) == b""


def test_connections_beyond_the_limit_are_refused_counted_and_said(live, runtime, connect, caplog):
    lost = threading.Event()

    class Told(Connection):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            lost.set()

    with caplog.at_level(logging.WARNING), live(make_app(runtime, Limits(max_connections=1)), http=Told) as url:
        first = connect(url)
        first.sendall(HEALTH)
        assert one_answer(first).startswith(b"HTTP/1.1 200 ")
        for _ in range(2):
            lost.clear()
            beyond = connect(url)
            answer = everything(beyond)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in answer
            assert problem_in(answer)["type"] == "urn:diracnet:problem:overloaded"
            beyond.close()
            assert lost.wait(60)
        lost.clear()
        first.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        metrics = everything(first)
        assert lost.wait(60)
        again = connect(url)
        again.sendall(HEALTH)
        assert one_answer(again).startswith(b"HTTP/1.1 200 ")
    for line in (b"connections 1.0", b"connections_limit 1.0", b"connections_refused_total 2.0"):
        assert b"\ndiracnet_" + line + b"\n" in metrics
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["1 connections are open"]


def test_a_flood_of_connections_takes_no_more_files_than_are_spared(live, runtime, connect):
    # Those that are told why stay for the time of an idle connection, or there would be room for one more.
    with live(make_app(runtime, Limits(max_connections=1)), http=Connection, timeout_keep_alive=60) as url:
        turned_away = [connect(url) for _ in range(1 + MAX_TURNED_AWAY)][1:]
        assert all(one_answer(connection).startswith(b"HTTP/1.1 503 ") for connection in turned_away)
        assert everything(connect(url)) == b""


@pytest.mark.parametrize(("num_files", "fitting"), [((200, 200), 200 - SPARE_FILES), ((200, 5000), 1000)])
def test_connections_fit_the_files_of_the_process(num_files, fitting):
    script = f"""
import logging, resource
from serve.request.limits import fit_to_files
logging.basicConfig()
resource.setrlimit(resource.RLIMIT_NOFILE, {num_files})
print(fit_to_files(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(fitting), str(fitting + SPARE_FILES)]
    said = f"{fitting} connections at once instead of 1000: a process may open 200 files here"
    assert (said in done.stderr) == (fitting < 1000)
