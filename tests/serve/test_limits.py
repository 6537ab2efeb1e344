"""What a real connection may do to the server."""

import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from serve.app import make_app
from serve.limits import Limits

PNG = {"Content-Type": "image/png"}


@pytest.fixture
def connect():
    """`connect(url)` is an open socket to the server."""
    opened = []

    def connect(url):
        opened.append(socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def head(num_bytes, content_type="image/png"):
    lines = ("POST /predict HTTP/1.1", "Host: a", f"Content-Type: {content_type}", f"Content-Length: {num_bytes}")
    return "\r\n".join((*lines, "", "")).encode()


def everything(connection):
    """What the server sends until it closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def in_thread(function):
    """(thread, list that will hold its result)."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_overload_deadline_and_retry_over_http(live, gated, pixels, encode):
    gated.open()
    file = encode(pixels[0])
    with live(make_app(gated, Limits(max_images=1, max_queue=1, deadline_s=60))) as url:
        gated.close()
        thread, answers = in_thread(lambda: httpx.post(f"{url}/predict", content=file, headers=PNG, timeout=60))
        gated.wait()
        refused = httpx.post(f"{url}/predict", content=file, headers=PNG)
        gated.open()
        thread.join(60)
        again = httpx.post(f"{url}/predict", content=file, headers=PNG)
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:diracnet:problem:overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert answers[0].status_code == again.status_code == 200


def test_an_answer_that_takes_too_long_is_504(live, gated, pixels, encode):
    gated.open()
    with live(make_app(gated, Limits(deadline_s=0.2))) as url:
        gated.close()
        late = httpx.post(f"{url}/predict", content=encode(pixels[0]), headers=PNG, timeout=60)
        gated.open()
    assert (late.status_code, late.json()["type"]) == (504, "urn:diracnet:problem:deadline")
    assert "0.2 s" in late.json()["detail"]


def test_a_slow_upload_is_408_and_cut_off(live, runtime, connect):
    with live(make_app(runtime, Limits(deadline_s=0.2))) as url:
        connection = connect(url)
        connection.sendall(head(100) + b"never more")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:diracnet:problem:timeout" in answer


def test_a_client_that_went_away_is_not_run(live, gated, connect, pixels, encode):
    gone = threading.Event()
    statuses = []

    def observe(visit):
        statuses.append(visit.status)
        if visit.status == 499:
            gone.set()

    gated.open()
    file = encode(pixels[0])
    with live(make_app(gated, Limits(), observers=[observe])) as url:
        gated.close()
        thread, answers = in_thread(lambda: httpx.post(f"{url}/predict", content=file, headers=PNG, timeout=60))
        gated.wait()
        connection = connect(url)
        connection.sendall(head(len(file)) + file)
        connection.close()
        assert gone.wait(60)
        gated.open()
        thread.join(60)
    assert answers[0].status_code == 200
    assert gated.batches == [1]


def test_a_client_that_goes_in_the_middle_of_its_body_costs_nothing(live, gated, connect):
    gone = threading.Event()
    gated.open()
    with live(make_app(gated, Limits(), observers=[lambda visit: gone.set()])) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(head(100) + b"half")
        connection.close()
        assert gone.wait(60)
    assert gated.batches == []


def test_a_form_ends_with_its_first_part_too_many(live, runtime, connect):
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx\r\n'
    with live(make_app(runtime, Limits(max_images=2))) as url:
        connection = connect(url)
        connection.sendall(head(10_000, "multipart/form-data; boundary=a") + 3 * part)  # and no end
        answer = connection.recv(65536) + connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too-many-images" in answer


def test_a_form_cut_short_is_no_form(client):
    body = b'--a\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx'
    response = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=a"})
    assert response.status_code == 400
    assert "ends before its last boundary" in response.json()["detail"]


def test_a_form_in_many_chunks_is_read_as_one(client, pixels, encode):
    file = encode(pixels[0])
    body = (
        b'--a\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + file + b"\r\n--a--\r\n"
    )
    chunks = (body[start : start + 7] for start in range(0, len(body), 7))
    response = client.post("/predict", content=chunks, headers={"Content-Type": "multipart/form-data; boundary=a"})
    assert response.json() == client.post("/predict", content=file, headers=PNG).json()


def test_long_json_is_read_beside_the_event_loop(runtime, live, encode):
    import base64

    import numpy as np

    large = encode(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert len(large) > 2**16
    with live(make_app(runtime, Limits())) as url:
        answer = httpx.post(f"{url}/predict", json={"images": [base64.b64encode(large).decode()]}, timeout=60)
    assert answer.status_code == 200
