"""Head and body of an answer leave in one write, and nothing that is written is lost or reordered."""

import asyncio

import pytest

from serve.connection import Joining


class Recorder:
    """A transport that remembers."""

    def __init__(self):
        self.writes, self.is_closed = [], False

    def write(self, data):
        self.writes.append(data)

    def close(self):
        self.is_closed = True

    def is_closing(self):
        return self.is_closed


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([b"head", b"body"], [b"headbody"]),
        ([b"head"], [b"head"]),
        ([b"head", b"a", b"b"], [b"heada", b"b"]),
        ([b"head", b""], [b"head"]),
        ([b"1", b"2", b"3", b"4"], [b"12", b"34"]),
    ],
)
def test_the_second_write_takes_the_first_along_and_a_lone_one_goes_with_the_turn(written, expected):
    async def turn():
        transport = Recorder()
        joining = Joining(transport, asyncio.get_running_loop())
        for data in written:
            joining.write(data)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return transport.writes

    assert asyncio.run(turn()) == expected


def test_what_is_held_leaves_before_the_connection_closes():
    async def turn():
        transport = Recorder()
        joining = Joining(transport, asyncio.get_running_loop())
        joining.write(b"last")
        joining.close()
        return transport.writes, joining.is_closing()

    assert asyncio.run(turn()) == ([b"last"], True)
