"""Requests as bytes and answers as bytes, for what no client library would send."""

import json
import re

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"Host: a\r\nTransfer-Encoding: chunked\r\n"


def post(file, *headers):
    """A whole request for /predict."""
    lines = (b"POST /predict HTTP/1.1", b"Host: a", *headers, b"Content-Length: %d" % len(file))
    return b"\r\n".join((*lines, b"", file))


def in_chunks(file, size):
    """`file` as chunks of a body, without the last one."""
    pieces = (file[start : start + size] for start in range(0, len(file), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def everything(connection):
    """What the server sends until it closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def one_answer(connection):
    """The next answer, whole, and nothing of the one after it; what there is, where the server closes before."""
    head = body = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (byte := connection.recv(1)):
            return head
        head += byte
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    while len(body) < length and (part := connection.recv(length - len(body))):
        body += part
    return head + body


def problem_in(answer):
    """The document of the last answer, which has an id of the server's own."""
    assert b"content-type: application/problem+json" in answer
    assert re.search(rb"x-request-id: [0-9a-f]{12}-\d+\r\n", answer)
    return json.loads(answer.rpartition(b"\r\n\r\n")[2])
