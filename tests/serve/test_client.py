"""The client: against the real server, and against one that answers by a script."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.refusal import Refusal
from serve.client import AsyncClient, Bounds, Client
from serve.client_protocol import (
    Retry,
    Send,
    ServerProblem,
    Unreachable,
    encode,
    exchange,
    in_requests,
    retry_after_s,
)
from serve.request.app import make_app
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = Retry(attempts=3, first_wait_s=0.0)
OVERLOADED = {"type": "urn:diracnet:problem:overloaded", "title": "Too busy", "status": 503, "detail": "come again"}
GUESS = {"label": "Coat", "index": 4, "probability": 0.75}
ANSWER = {"results": [{**GUESS, "top": [GUESS]}]}


@pytest.fixture
def scripted(monkeypatch):
    """`scripted((status, document), …)` → a server that gives these answers in turn; `.requests` is what it got."""
    servers = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.requests.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            status, document, *headers = self.server.answers.pop(0)
            if status == 0:  # hang up without a word
                return
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            """Nothing on stderr."""

    def start(*answers):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answers, server.requests = list(answers), []
        server.url = f"http://127.0.0.1:{server.server_port}"
        servers.append((server, threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})))
        servers[-1][1].start()
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


class Blocking:
    """`AsyncClient` with the face of `Client`, so that one test asks both."""

    def __init__(self, *args, **options):
        self.client = AsyncClient(*args, **options)
        self.runner = asyncio.Runner()

    def __enter__(self):
        self.runner.run(self.client.__aenter__())
        return self

    def __exit__(self, *error):
        self.runner.run(self.client.__aexit__(*error))
        self.runner.close()

    def predict(self, *args, **options):
        return self.runner.run(self.client.predict(*args, **options))

    def model(self):
        return self.runner.run(self.client.model())

    def predict_many(self, *args, **options):
        async def collect():
            return [result async for result in self.client.predict_many(*args, **options)]

        return self.runner.run(collect())


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def make_client(request):
    return request.param


def test_paths_bytes_and_pixels_give_what_the_server_answers(
    live, runtime, make_client, pixels, encode, tmp_path, monkeypatch
):
    path = tmp_path / "image.png"
    path.write_bytes(encode(pixels[0]))
    with live(make_app(runtime, Limits())) as url, make_client(url) as client:
        expected = httpx.post(f"{url}/predict?top_k=3", content=path.read_bytes(), timeout=60).json()["results"][0]
        for image in (path, str(path), path.read_bytes(), pixels[0]):
            (result,) = client.predict([image], top_k=3)
            assert (result.label, result.index, result.probability) == tuple(expected[key] for key in GUESS)
            assert [guess.label for guess in result.top] == [guess["label"] for guess in expected["top"]]
        assert client.model()["digest"] == runtime.model.digest


def test_many_images_come_back_in_order(live, runtime, make_client, pixels):
    with live(make_app(runtime, Limits(max_images=3))) as url, make_client(url) as client:
        one_by_one = [client.predict([image])[0] for image in pixels]
        many = list(client.predict_many(list(pixels) * 4, bounds=Bounds(images_per_request=3, requests_at_once=2)))
        with pytest.raises(ServerProblem, match="3 images at most") as raised:
            client.predict(pixels)
    assert [result.index for result in many] == [result.index for result in one_by_one] * 4
    np.testing.assert_allclose(
        [result.probability for result in many], [result.probability for result in one_by_one] * 4, rtol=1e-4
    )
    assert (raised.value.status, raised.value.type) == (413, "urn:diracnet:problem:too-many-images")


def test_the_first_failure_ends_many_and_names_it(live, runtime, make_client, pixels):
    images = [pixels[0], b"hello", *pixels]
    one_each = Bounds(images_per_request=1)
    with (
        live(make_app(runtime, Limits())) as url,
        make_client(url) as client,
        pytest.raises(ServerProblem, match="not a PNG"),
    ):
        list(client.predict_many(images, bounds=one_each))


def test_overload_is_tried_again_and_then_answered(scripted, make_client):
    server = scripted((503, OVERLOADED, ("Retry-After", "0")), (429, b"slow down"), (200, ANSWER))
    with make_client(server.url, retry=AT_ONCE) as client:
        assert client.predict([b"image"])[0].label == "Coat"
    assert [body for _, body in server.requests] == [b"image"] * 3


def test_a_lost_connection_is_tried_again(scripted, make_client):
    server = scripted((0, b""), (200, ANSWER))
    with make_client(server.url, retry=AT_ONCE) as client:
        assert client.predict([b"image"])[0].probability == 0.75


def test_attempts_are_bounded_and_the_problem_comes_with_the_error(scripted, make_client):
    server = scripted(*[(503, OVERLOADED)] * 3)
    with make_client(server.url, retry=AT_ONCE) as client, pytest.raises(ServerProblem) as raised:
        client.predict([b"image"])
    error = raised.value
    assert {name: getattr(error, name) for name in OVERLOADED} == OVERLOADED
    assert str(error) == "the server refuses: come again (503, urn:diracnet:problem:overloaded)"
    assert len(server.requests) == 3


def test_a_proxy_that_lost_its_server_is_asked_again(scripted, make_client):
    server = scripted((500, b"<html>a proxy</html>"), (502, b""), (200, ANSWER))
    with make_client(server.url, retry=AT_ONCE) as client:
        assert client.predict([b"image"])[0].label == "Coat"


@pytest.mark.parametrize("status", [400, 401, 504])
def test_other_errors_are_not_tried_again(scripted, make_client, status):
    server = scripted((status, b"<html>a proxy</html>"))
    with make_client(server.url, retry=AT_ONCE) as client, pytest.raises(ServerProblem) as raised:
        client.predict([b"image"])
    assert (raised.value.type, raised.value.status) == ("about:blank", status)
    assert len(server.requests) == 1


def test_the_servers_own_failure_is_not_tried_again(scripted, make_client):
    failed = {"type": "urn:diracnet:problem:not-a-number", "title": "No number", "status": 500, "detail": "overflow"}
    server = scripted((500, failed, ("Content-Type", "application/problem+json")))
    with make_client(server.url, retry=AT_ONCE) as client, pytest.raises(ServerProblem, match="overflow"):
        client.predict([b"image"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", [b"hello", b"[]", {"results": [{}]}, {"results": []}])
def test_an_answer_of_another_program_is_refused(scripted, make_client, answer):
    server = scripted((200, answer))
    with make_client(server.url) as client, pytest.raises(Refusal, match=r"is not a prediction|0 results for 1"):
        client.predict([b"image"])


def test_the_key_comes_from_the_environment(scripted, make_client, monkeypatch):
    server = scripted((200, ANSWER), (200, ANSWER), (200, ANSWER))
    monkeypatch.setenv("DIRACNET_API_KEY", "of the environment")
    for options in ({}, {"api_key": "given"}):
        with make_client(server.url, **options) as client:
            client.predict([b"image"])
    monkeypatch.delenv("DIRACNET_API_KEY")
    with make_client(server.url) as client:
        client.predict([b"image"])
    keys = [headers.get("Authorization") for headers, _ in server.requests]
    assert keys == ["Bearer of the environment", "Bearer given", None]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://a:b:c"])
def test_an_address_that_is_none_is_refused(make_client, url):
    with pytest.raises(Refusal, match="is not a valid address"):
        make_client(url).__enter__()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("image.png", "must be a list"),
        (b"image", "must be a list"),
        ([], "no image to send"),
        (["missing.png"], "cannot read missing.png"),
        ([np.zeros((8, 8, 2), np.uint8)], r"got uint8 \[8, 8, 2\]"),
        ([np.zeros((8, 8))], r"got float64 \[8, 8\]"),
    ],
)
def test_what_is_no_image_is_refused_before_it_is_sent(make_client, images, message):
    with make_client("http://127.0.0.1:9") as client, pytest.raises(Refusal, match=message):
        client.predict(images)


def test_grey_pixels_with_and_without_a_channel_are_one_image():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert encode(grey) == encode(grey[..., None])


def test_requests_are_bounded_by_number_and_by_bytes():
    images = [b"12", b"34", b"5", b"6789abc", b"d", b"e", b"f"]
    groups = list(in_requests(images, Bounds(images_per_request=3, bytes_per_request=5)))
    assert groups == [[b"12", b"34", b"5"], [b"6789abc"], [b"d", b"e", b"f"]]
    assert list(in_requests([], Bounds(images_per_request=3, bytes_per_request=5))) == []


def response(status=503, **headers):
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": "soon"}, 0),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:30 -0000", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"Retry_After": "Wed, 21 Oct 2026 07:27:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        ({"Retry_After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers, seconds):
    assert retry_after_s(response(**headers)) == seconds


def waits(outcome, retry, clock=lambda: 0.0):
    """The seconds before each further attempt of a request whose every outcome is the same."""
    conversation = exchange(Send("POST", "/predict"), retry, clock=clock)
    next(conversation)
    seconds = []
    with suppress(Unreachable, ServerProblem):
        while True:
            seconds.append(conversation.send(outcome).after_s)
    return seconds


def test_waits_double_at_most_differ_and_add_to_what_the_server_asks():
    random.seed(0)
    retry = Retry(attempts=6, total_s=1000, first_wait_s=1, longest_wait_s=4)
    runs = np.array([waits(response(), retry) for _ in range(200)])
    assert (runs <= [1, 2, 4, 4, 4]).all()
    assert (runs.max(axis=0) > [0.9, 1.9, 3.8, 3.8, 3.8]).all()
    asked = np.array([waits(response(Retry_After="10"), retry) for _ in range(200)])
    assert (asked >= 10).all()
    assert (asked <= [11, 12, 14, 14, 14]).all()


def test_no_attempt_starts_after_the_time_is_over():
    retry = Retry(attempts=100, total_s=25, first_wait_s=0)
    ticks = iter(range(0, 1000, 10))  # every request takes ten seconds
    assert len(waits(response(), retry, clock=lambda: next(ticks))) == 2
    assert waits(response(Retry_After="26"), retry) == []


def test_a_slow_answer_is_not_asked_for_twice():
    assert waits(httpx.ReadTimeout("timed out", request=httpx.Request("POST", "http://host")), Retry()) == []


def run(*argv):
    command = [sys.executable, str(ROOT / "serve" / "client.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(live, runtime, pixels, encode, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, pixels, strict=False):
        path.write_bytes(encode(image))
    with live(make_app(runtime, Limits())) as url:
        table = run(*paths, "--url", url)
        rows = json.loads(run(*paths, "--url", url, "--json", "--top-k", 1).stdout)
        refused = run(*paths, "--url", url, "--top-k", 0)
    assert table.returncode == 0, table.stderr
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row in rows:
        assert len(row["top"]) == 1
        assert f"{row['probability']:.1%}" in table.stdout
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "got '0'" in refused.stderr


@pytest.mark.slow
def test_the_command_ends_with_one_line_where_there_is_no_server(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"image")
    for argv, message in (
        ([image, "--url", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        ([], "name one image or more"),
        ([tmp_path / "missing.png"], "is not there"),
    ):
        done = run(*argv)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_unreachable_is_said_of_the_address(make_client):
    with (
        make_client("http://127.0.0.1:9", retry=AT_ONCE) as client,
        pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"),
    ):
        client.predict([b"image"])


@pytest.mark.slow
def test_the_program_in_the_docs_runs_as_written(live, runtime, pixels, encode, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), flags=re.DOTALL)
    (tmp_path / "image.png").write_bytes(encode(pixels[0]))
    with live(make_app(runtime, Limits())) as url:
        program = code.replace("http://127.0.0.1:8000", url)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("label ") >= 100
