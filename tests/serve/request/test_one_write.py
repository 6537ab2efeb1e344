"""An answer of one known piece leaves in one write, and every other one just as uvicorn writes it."""

import asyncio
from types import SimpleNamespace

import pytest

from serve.request.one_write import OneWrite

PIECES = [(b"content-type", b"text/plain"), (b"content-length", b"4")]


class Cycle:
    """What uvicorn keeps of a request, with a `send` that remembers."""

    def __init__(self, method="POST", *, keep_alive=True, disconnected=False, write_paused=False, more_body=False):
        self.scope = {"method": method}
        self.keep_alive, self.disconnected, self.more_body = keep_alive, disconnected, more_body
        self.flow = SimpleNamespace(write_paused=write_paused)
        self.default_headers = [(b"date", b"today")]
        self.response_started = self.response_complete = False
        self.waiting_for_100_continue = True
        self.message_event = asyncio.Event()
        self.writes, self.sent, self.num_responses = [], [], 0
        self.transport = SimpleNamespace(write=self.writes.append, write_eof=lambda: self.writes.append("the end"))

    async def send(self, message):
        self.sent.append(message)

    def on_response(self):
        self.num_responses += 1


def send_all(cycle, headers, *bodies):
    async def send():
        one_write = OneWrite(cycle)
        await one_write({"type": "http.response.start", "status": 200, "headers": headers})
        assert cycle.sent == cycle.writes == []
        for index, body in enumerate(bodies, 1):
            await one_write({"type": "http.response.body", "body": body, "more_body": index < len(bodies)})

    asyncio.run(send())


def test_a_whole_answer_leaves_in_one_write_and_ends_the_request():
    cycle = Cycle()
    send_all(cycle, PIECES, b"body")
    assert cycle.writes == [
        b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\nbody"
    ]
    assert cycle.response_started
    assert cycle.response_complete
    assert cycle.message_event.is_set()
    assert not cycle.waiting_for_100_continue
    assert cycle.num_responses == 1
    assert cycle.sent == []


@pytest.mark.parametrize(
    ("cycle", "headers", "bodies"),
    [
        (Cycle(), PIECES, [b"bo", b"dy"]),
        (Cycle(), PIECES[:1], [b"body"]),
        (Cycle(), PIECES, [b"longer"]),
        (Cycle(), [*PIECES, (b"connection", b"close")], [b"body"]),
        (Cycle("HEAD"), PIECES, [b"body"]),
        (Cycle(keep_alive=False), PIECES, [b"body"]),
        (Cycle(disconnected=True), PIECES, [b"body"]),
        (Cycle(write_paused=True), PIECES, [b"body"]),
    ],
)
def test_any_other_answer_is_left_to_uvicorn_message_by_message(cycle, headers, bodies):
    send_all(cycle, headers, *bodies)
    assert cycle.writes == []
    assert cycle.sent[0] == {"type": "http.response.start", "status": 200, "headers": headers}
    assert [message["body"] for message in cycle.sent[1:]] == bodies


@pytest.mark.parametrize(
    ("cycle", "added"),
    [
        (Cycle(more_body=True), [(b"connection", b"close")]),
        (Cycle(keep_alive=False, more_body=True), []),
    ],
)
def test_a_last_answer_leaves_the_socket_open_for_what_is_still_coming(cycle, added):
    send_all(cycle, [*PIECES, *added], b"body")
    answer, end = cycle.writes
    assert answer.endswith(b"content-length: 4\r\nconnection: close\r\n\r\nbody")
    assert end == "the end"
    assert not cycle.keep_alive
    assert cycle.num_responses == 1
    assert cycle.sent == []


def test_a_line_break_in_a_header_goes_nowhere():
    cycle = Cycle()
    with pytest.raises(ValueError, match="line break"):
        send_all(cycle, [*PIECES, (b"x-request-id", b"a\r\nset-cookie: b")], b"body")
    assert cycle.writes == []
