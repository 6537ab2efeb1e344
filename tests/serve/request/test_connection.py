"""What clients write on a connection that no client should, and what becomes of it."""

import io
import json
import re
import socket
import threading

import httpx
import pytest
from raw_http import CHUNKED, HEALTH, everything, in_chunks, one_answer, post, problem_in

from serve.request.access import Access
from serve.request.app import make_app
from serve.request.connection import MAX_DROPPED_BYTES, MAX_HEADER_BYTES, MAX_PIPELINED, Connection
from serve.request.limits import Limits
from serve.watching.logs import RequestLog

MOST_BYTES = 2**25  # that a test sends where the server must end the connection, and sockets hold by themselves


def flood(connection, head, piece):
    """Send `piece` for ever; what the server had answered when it ended the connection."""
    block, num_bytes = piece * (65536 // len(piece)), 0
    try:
        connection.sendall(head)
        while num_bytes < MOST_BYTES:
            connection.sendall(block)
            num_bytes += len(block)
    except (ConnectionResetError, BrokenPipeError):
        return num_bytes
    raise AssertionError(f"the server took {num_bytes} bytes")


# Trailers and chunks


@pytest.mark.parametrize("trailer", [b"X-Api-Key: right", b"x-api-key: right", b"Authorization: Bearer right"])
def test_a_key_behind_the_body_opens_nothing(live, runtime, connect, pixels, encode, trailer):
    with live(make_app(runtime, Limits(), access=Access(b"right")), http=Connection) as url:
        connection = connect(url)
        head = b"POST /predict HTTP/1.1\r\nX-Api-Key: wrong\r\n" + CHUNKED + b"\r\n"
        connection.sendall(head + in_chunks(encode(pixels[0]), 100) + b"0\r\n" + trailer + b"\r\n\r\n")
        assert one_answer(connection).startswith(b"HTTP/1.1 401 ")


def test_trailers_change_neither_id_nor_media_type(served, connect, pixels, encode):
    connection = connect(served)
    head = b"POST /predict HTTP/1.1\r\nX-Request-Id: mine\r\nContent-Type: text/plain\r\n" + CHUNKED + b"\r\n"
    trailers = b"X-Request-Id: yours\r\nContent-Type: image/png\r\n\r\n"
    connection.sendall(head + in_chunks(encode(pixels[0]), 100) + b"0\r\n" + trailers)
    answer = one_answer(connection)
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert b"x-request-id: mine\r\n" in answer
    connection.sendall(HEALTH)
    assert one_answer(connection).startswith(b"HTTP/1.1 200 ")


ENDLESS = {
    "trailers of a probe": (b"GET /healthz HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\n", b"a: b\r\n"),
    "one trailer of a probe": (b"GET /healthz HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\na: ", b"b"),
    "trailers": (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n1\r\nx\r\n0\r\n", b"a: b\r\n"),
    "one trailer": (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n1\r\nx\r\n0\r\na: ", b"b"),
    "one chunk extension": (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n1", b";a=b"),
    "chunk extensions": (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n", b"1;" + b"a" * 100 + b"\r\nx\r\n"),
    "blank lines": (HEALTH, b"\r\n"),
    "blank lines at first": (b"", b"\r\n"),
    "one header": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ", b"b"),
    "headers": (b"GET /healthz HTTP/1.1\r\nHost: a\r\n", b"a: b\r\n"),
    "an address": (b"GET /", b"a"),
    "requests": (b"", HEALTH),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_nothing_goes_on_for_ever(served, connect, what):
    flood(connect(served), *ENDLESS[what])
    assert httpx.get(f"{served}/healthz", timeout=60).status_code == 200


def test_trailers_are_not_kept(live, runtime, connect):
    num_headers, finished = [], threading.Event()

    class Told(Connection):
        def on_message_complete(self):
            num_headers.append(len(self.headers))
            finished.set()
            super().on_message_complete()

    with live(make_app(runtime, Limits()), http=Told) as url:
        connection = connect(url)
        connection.sendall(b"GET /healthz HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\n" + 1000 * b"a: b\r\n" + b"\r\n")
        assert finished.wait(60)
    assert num_headers == [2]


def test_trailers_count_as_headers(served, connect):
    connection = connect(served)
    head, piece = ENDLESS["trailers"]
    connection.sendall(head + piece * 3000)
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert problem_in(answer)["type"] == "urn:diracnet:problem:headers-too-large"


@pytest.mark.parametrize("what", ["one trailer", "one chunk extension", "chunk extensions"])
def test_framing_that_no_body_comes_with_is_a_problem(served, connect, what):
    connection = connect(served)
    head, piece = ENDLESS[what]
    connection.sendall(head + piece * ((MAX_HEADER_BYTES + 400_000) // len(piece)))
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "chunk extensions and trailers" in problem_in(answer)["detail"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_chunks_may_be_as_small_as_they_like(served, connect, encode, size):
    import numpy as np

    file = encode(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert len(file) > MAX_HEADER_BYTES
    connection = connect(served)
    connection.sendall(b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n" + in_chunks(file, size) + b"0\r\n\r\n")
    assert one_answer(connection).startswith(b"HTTP/1.1 200 ")


# Other protocols


UPGRADES = [
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"),
    (b"connection: upgrade", b"upgrade: h2c, websocket"),
    (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
]


@pytest.mark.parametrize("headers", UPGRADES)
def test_another_protocol_is_not_taken_up_and_the_request_is_answered(served, connect, pixels, encode, headers):
    connection, file = connect(served), encode(pixels[0])
    expected = httpx.post(f"{served}/predict", content=file, timeout=60).json()
    for _ in range(2):
        connection.sendall(post(file, *headers, b"X-Request-Id: mine"))
        answer = one_answer(connection)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"x-request-id: mine\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == expected


def test_requests_behind_an_upgrade_and_a_body_in_pieces_are_read(served, connect, pixels, encode):
    connection, file = connect(served), encode(pixels[0])
    whole = HEALTH + post(file, *UPGRADES[0]) + post(file, *UPGRADES[0]) + HEALTH
    for start in range(0, len(whole), 97):
        connection.sendall(whole[start : start + 97])
    connection.shutdown(socket.SHUT_WR)
    assert everything(connection).count(b"HTTP/1.1 200 ") == 4


def test_a_proxy_is_not_offered(served, connect):
    connection = connect(served)
    connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
    assert "CONNECT asks for a proxy" in problem_in(everything(connection))["detail"]


# What is not HTTP


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"NONSENSE\r\n\r\n", "method"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "method"),  # how TLS begins
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRI"),
        (b"GET / HTTP/2.5\r\nHost: a\r\n\r\n", "version"),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", "url"),
        (b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", "whitespace"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX\x00: a\r\n\r\n", "header"),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
        (b"POST /predict HTTP/1.1\r\nContent-Length: 3\r\n" + CHUNKED + b"\r\n", "Content-Length"),
        (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\nz\r\n", "chunk size"),
        (b"POST /predict HTTP/1.1\r\n" + CHUNKED + b"\r\n1\r\nxy\r\n", "chunk"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", "one Host header, got 0"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", "one Host header, got 2"),
        (b"GET /healthz HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "one Host header, got 2"),
    ],
)
def test_what_is_not_http_gets_a_problem_document_and_a_line_with_its_address(live, runtime, connect, sent, reason):
    log = io.BytesIO()
    with live(make_app(runtime, Limits(), observers=[RequestLog(log)]), http=Connection) as url:
        connection = connect(url)
        connection.sendall(sent)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close\r\n" in answer
    assert b"x-content-type-options: nosniff\r\n" in answer
    problem = problem_in(answer)
    assert problem["type"] == "urn:diracnet:problem:bad-request"
    assert reason.lower() in problem["detail"].lower()
    (line,) = map(json.loads, log.getvalue().splitlines())
    assert (line["status"], line["client"]) == (400, "127.0.0.1")
    assert line["id"].encode() in answer


def test_a_request_of_http_1_0_needs_no_host(served, connect):
    connection = connect(served)
    connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_what_came_before_is_answered_first(live, gated, connect, pixels, encode):
    gated.open()
    with live(make_app(gated, Limits()), http=Connection) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(post(encode(pixels[0])) + b"NONSENSE\r\n\r\n" + HEALTH)
        gated.wait()
        gated.open()
        answers = everything(connection)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200", b"400"]


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize("num_bytes", [MAX_HEADER_BYTES + 1, 5 * MAX_HEADER_BYTES])
def test_headers_that_are_too_long_are_431(served, connect, num_bytes, end):
    connection = connect(served)
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ")
    connection.sendall(b"b" * num_bytes + (end or b"b" * 500_000))  # without an end a block more is read
    answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert problem_in(answer)["type"] == "urn:diracnet:problem:headers-too-large"


def test_headers_of_the_full_length_are_taken(served, connect):
    connection = connect(served)
    length = MAX_HEADER_BYTES - len("/healthz") - len("Hosta") - 32 - len("X") - 32
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"b" * length + b"\r\n\r\n")
    assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"b" * (length + 1) + b"\r\n\r\n")
    assert one_answer(connection).startswith(b"HTTP/1.1 431 ")


def test_a_client_that_sends_on_after_its_refusal_is_cut_off(served, connect):
    connection = connect(served)
    assert flood(connection, b"NONSENSE\r\n\r\n", b"a") >= MAX_DROPPED_BYTES // 2


def test_an_early_answer_is_not_taken_back_while_the_body_still_comes(live, runtime, connect):
    with live(make_app(runtime, Limits(max_body_bytes=1000)), http=Connection) as url:
        connection = connect(url)
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 500000\r\n\r\n")
        answer = everything(connection)
        for _ in range(2):  # a socket that is closed answers the first one with a reset, which would discard the answer
            connection.sendall(b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert problem_in(answer)["status"] == 413


def test_so_many_requests_may_wait_behind_one(live, gated, connect, pixels, encode):
    gated.open()
    with live(make_app(gated, Limits()), http=Connection) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(post(encode(pixels[0])) + (MAX_PIPELINED + 5) * HEALTH)
        gated.wait()
        gated.open()
        answers = everything(connection)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200"] * (1 + MAX_PIPELINED) + [b"503"]
    assert b"retry-after: 1\r\n" in answers
