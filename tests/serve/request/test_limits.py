"""What a real connection may do to the server."""

import asyncio
import socket
import struct
import threading
from queue import SimpleQueue
from types import SimpleNamespace

import httpx
import orjson
import pytest
from raw_http import everything, one_answer, problem_in
from serving import until

from common.refusal import Refusal
from serve.config import ServeConfig
from serve.decode.weigh import LIGHT
from serve.processes.serving import limits_of
from serve.request.access import EVERYBODY
from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.connection import MAX_HEADER_BYTES, Connection
from serve.request.job import Served
from serve.request.limits import Limits
from serve.request.predict import RequestHandler, Visit
from serve.request.problems import Problem
from serve.v2.routes import model_name

PNG = {"Content-Type": "image/png"}
PREDICTIONS = ("/predict", "/v2/models/DiracNet-10-0.25/infer")


def head(num_bytes, content_type="image/png", path="/predict"):
    lines = (f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {content_type}", f"Content-Length: {num_bytes}")
    return "\r\n".join((*lines, "", "")).encode()


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
        refused = httpx.post(f"{url}/predict", content=file, headers=PNG, timeout=60)
        gated.open()
        thread.join(60)
        again = httpx.post(f"{url}/predict", content=file, headers=PNG, timeout=60)
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:diracnet:problem:overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert answers[0].status_code == again.status_code == 200


def test_an_answer_that_takes_too_long_is_504(live, gated, connect, pixels, encode):
    gated.open()
    file = encode(pixels[0])
    with live(make_app(gated, Limits(deadline_s=0.2))) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(head(len(file)) + file)  # at once: a body that comes late is 408
        late = one_answer(connection)
        gated.open()
    assert late.startswith(b"HTTP/1.1 504 ")
    problem = problem_in(late)
    assert problem["type"] == "urn:diracnet:problem:deadline"
    assert "0.2 s" in problem["detail"]


@pytest.mark.parametrize("address", PREDICTIONS)
def test_a_slow_upload_is_408_and_cut_off(live, runtime, connect, address):
    with live(make_app(runtime, Limits(deadline_s=0.2))) as url:
        connection = connect(url)
        connection.sendall(head(100, path=address) + b"never more")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:diracnet:problem:timeout" in answer


@pytest.mark.parametrize("address", PREDICTIONS)
def test_the_deadline_counts_from_before_the_body(runtime, pixels, encode, address):
    class Noting(Batcher):
        async def classify(self, *given, deadline, **options):
            deadlines.append(deadline)
            return await super().classify(*given, deadline=deadline, **options)

    async def body():
        begins.append(asyncio.get_running_loop().time())
        yield encode(pixels[0]) if address == "/predict" else orjson.dumps({"inputs": [tensor]})

    async def scenario():
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            return await client.post(address, content=body())

    begins, deadlines, limits = [], [], Limits()
    app = make_app(Noting(Served((runtime,)), limits), limits)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": pixels[0].ravel().tolist()}
    assert asyncio.run(scenario()).status_code == 200
    assert deadlines[0] - limits.deadline_s <= begins[0]


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


@pytest.mark.parametrize("how", ["resets", "closes"])
@pytest.mark.parametrize("when", ["with", "after"])
def test_a_client_that_goes_with_a_request_behind_another_is_noticed(live, gated, connect, pixels, encode, how, when):
    """Whether the second one came in the same segment, or once the server watched the client of the first."""
    opened, visits, read = [], SimpleQueue(), threading.Semaphore(0)

    class Told(Connection):
        def connection_made(self, transport):
            super().connection_made(transport)
            opened.append(self)

        def on_message_complete(self):
            super().on_message_complete()
            read.release()

    gated.open()
    file = encode(pixels[0])
    first, second = head(len(file)) + file, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with live(make_app(gated, Limits(deadline_s=1000), observers=[visits.put]), http=Told) as url:
        gated.close()
        connection = connect(url)
        connection.sendall(first + second if when == "with" else first)
        gated.wait()
        if when == "after":
            until(lambda: opened[0].cycle.message_event._waiters)
            connection.sendall(second)
        assert all(read.acquire(timeout=60) for _ in range(2))
        if how == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        visit = visits.get(timeout=60)  # the gate is closed
        gated.open()
    assert (visit.path, visit.status) == ("/predict", 499)


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


@pytest.mark.slow
def test_a_form_ends_with_its_first_part_too_many(live, runtime, connect):
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx\r\n'
    with live(make_app(runtime, Limits(max_images=2))) as url:
        connection = connect(url)
        connection.sendall(head(10_000, "multipart/form-data; boundary=a") + 3 * part)  # and no end
        answer = one_answer(connection)
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


def test_overload_leaves_the_accepted_their_answers(live, gated, connect, pixels, encode):
    """Forty requests at once for a queue of four, on connections of their own."""
    gated.open()
    file, num_requests, max_queue = encode(pixels[0]), 40, 4
    refused = threading.Semaphore(0)

    def observe(visit):
        if visit.status == 503:
            refused.release()

    with live(make_app(gated, Limits(max_images=1, max_queue=max_queue), observers=[observe])) as url:
        gated.close()
        connections = [connect(url) for _ in range(num_requests)]
        for connection in connections:
            connection.sendall(head(len(file)) + file)
        for _ in range(num_requests - max_queue):
            assert refused.acquire(timeout=60)
        gated.open()
        answers = [one_answer(connection) for connection in connections]
    statuses = [answer[9:12] for answer in answers]
    assert statuses.count(b"200") == max_queue
    assert statuses.count(b"503") == num_requests - max_queue
    assert all(b"retry-after: " in answer for answer in answers if answer[9:12] == b"503")


def test_a_full_server_refuses_before_the_body_has_come(live, gated, connect, pixels, encode):
    gated.open()
    file = encode(pixels[0])
    with live(make_app(gated, Limits(max_images=1, max_queue=1))) as url:
        gated.close()
        accepted, refused, inference = connect(url), connect(url), connect(url)
        accepted.sendall(head(len(file)) + file)
        gated.wait()
        refused.sendall(head(len(file)))
        inference.sendall(head(100, path=f"/v2/models/{model_name(gated.model)}/infer"))
        assert one_answer(refused).startswith(b"HTTP/1.1 503 ")
        assert one_answer(inference).startswith(b"HTTP/1.1 503 ")
        gated.open()
        assert one_answer(accepted).startswith(b"HTTP/1.1 200 ")
        refused.sendall(file + head(len(file)) + file)  # the body was dropped; the connection is good for more
        assert one_answer(refused).startswith(b"HTTP/1.1 200 ")


def test_all_bodies_together_are_bounded(live, gated, connect, pixels, encode):
    gated.open()
    file = encode(pixels[0])
    limits = Limits(max_body_bytes=len(file), max_held_bytes=len(file) + 10)
    with live(make_app(gated, limits)) as url:
        gated.close()
        first, second = connect(url), connect(url)
        first.sendall(head(len(file)) + file)
        gated.wait()
        second.sendall(head(len(file)) + file)
        refused = one_answer(second)
        gated.open()
        assert one_answer(first).startswith(b"HTTP/1.1 200 ")
        second.sendall(head(len(file)) + file)  # what was held is free again
        assert one_answer(second).startswith(b"HTTP/1.1 200 ")
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"urn:diracnet:problem:overloaded" in refused
    assert b"retry-after: 1" in refused
    with pytest.raises(Refusal, match="max_held_bytes must hold one body of 100, got 99"):
        Limits(max_body_bytes=100, max_held_bytes=99)


def test_bytes_that_decoders_still_have_are_held_too():
    """Those of requests that were given up while their images were being decoded."""
    batcher = SimpleNamespace(decoding=SimpleNamespace(given_up_bytes=60))
    limits = Limits(max_body_bytes=100, max_held_bytes=100)
    handler = RequestHandler(None, batcher=batcher, limits=limits, access=EVERYBODY, observers=())
    visit = Visit({"method": "POST", "path": "/predict"}, {})
    handler.hold(visit, 40)
    with pytest.raises(Problem, match="100 bytes of requests are held already"):
        handler.hold(visit, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: a\r\n"])
@pytest.mark.parametrize("requests_before", [0, 1])
def test_a_connection_that_is_slow_with_its_headers_is_closed(live, runtime, connect, sent, requests_before):
    """By the limit on headers, or between two requests by that on idle connections: one of them is short."""

    class Told(Connection):
        headers_s = 60.0 if requests_before else 0.1

    keep_alive_s = 60 if sent else 1
    with live(make_app(runtime, Limits()), http=Told, timeout_keep_alive=keep_alive_s) as url:
        connection = connect(url)
        for _ in range(requests_before):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        Told.headers_s = 0.1
        try:
            connection.sendall(sent)
            assert everything(connection) == b""
        except ConnectionError:  # it was closed before this was sent
            assert not requests_before


def test_headers_that_have_begun_before_an_answer_have_their_own_limit(live, runtime, connect):
    """And not that of an idle connection, which ends at once here."""
    with live(make_app(runtime, Limits()), http=Connection, timeout_keep_alive=0) as url:
        connection, request = connect(url), b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
        connection.sendall(request + request[:-2])
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(request[-2:])
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_headers_without_an_end_are_cut_off(live, runtime, connect):
    with live(make_app(runtime, Limits()), http=Connection) as url:
        connection = connect(url)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Endless: " + b"a" * MAX_HEADER_BYTES)
        assert connection.recv(1) == b""


def test_a_body_may_take_longer_than_headers(live, runtime, connect, pixels, encode):
    file, timers = encode(pixels[0]), SimpleQueue()

    class Told(Connection):
        def on_headers_complete(self):
            super().on_headers_complete()
            timers.put(self._timer)

    with live(make_app(runtime, Limits()), http=Told) as url:
        connection = connect(url)
        connection.sendall(head(len(file)))
        assert timers.get(timeout=60) is None
        connection.sendall(file)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 ")


def test_processes_share_limits_and_each_has_room_for_one_request():
    limits = Limits(max_body_bytes=10, max_held_bytes=100, max_images=5, max_queue=40, decode_threads=2)
    assert limits.of_each(1) == limits
    four = limits.of_each(4)
    assert (four.max_held_bytes, four.max_queue) == (25, 10)
    assert four.heavy_bytes == limits.max_decoded_bytes - 4 * 2 * LIGHT.num_bytes
    many = limits.of_each(20)
    assert (many.max_held_bytes, many.max_queue) == (10, 5)
    with pytest.raises(Refusal, match=r"^max_decoded_bytes must be 411,041,792 for the decoders of 24 processes, got"):
        limits.of_each(24)


def test_limits_that_are_not_given_are_those_of_the_command_line():
    assert limits_of(ServeConfig(decode_threads=1)) == Limits()
