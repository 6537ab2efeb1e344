import asyncio

import pytest

from serve.request.limits import Limits
from serve.request.problems import DEADLINE, OVERLOADED, TIMEOUT, Problem
from serve.v2.grpc_server import Intake

TWO = Limits(max_body_bytes=100, max_held_bytes=250, max_queue=64)


def now():
    return asyncio.get_running_loop().time()


class Reads:
    """Messages that come when they are told to."""

    def __init__(self, intake):
        self.intake, self.begun, self.futures = intake, [], {}

    def start(self, name, wait_s=60.0):
        async def read():
            self.begun.append(name)
            self.futures[name] = asyncio.get_running_loop().create_future()
            return await self.futures[name]

        return asyncio.ensure_future(self.intake.receive(read, now() + wait_s))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_so_many_are_received_at_once_as_may_be_held_and_the_others_in_their_order():
    async def scenario():
        reads = Reads(Intake(TWO))
        calls = [reads.start(name) for name in "abcd"]
        await settle()
        assert reads.begun == ["a", "b"]
        reads.futures["b"].set_result(b"B")
        assert await calls[1] == b"B"
        await settle()
        assert reads.begun == ["a", "b", "c"]
        calls[0].cancel()
        await settle()
        assert reads.begun == ["a", "b", "c", "d"]
        for name in "cd":
            reads.futures[name].set_result(name)
        assert await asyncio.gather(*calls[2:]) == ["c", "d"]

    asyncio.run(scenario())


def test_whoever_is_waited_for_has_little_time_and_nobody_else():
    async def scenario():
        intake = Intake(TWO)
        intake.patience_s = 0.01
        reads = Reads(intake)
        slow = [reads.start(name) for name in "ab"]
        await asyncio.wait(slow, timeout=0.05)
        assert not any(call.done() for call in slow)  # nobody waits
        third = reads.start("c")
        for call in slow:
            with pytest.raises(Problem, match=r"not complete within 0\.01 s while others waited") as caught:
                await call
            assert (caught.value.kind, caught.value.headers) == (OVERLOADED, {"Retry-After": "1"})
        await settle()
        reads.futures["c"].set_result("c")
        assert await third == "c"

    asyncio.run(scenario())


def test_one_that_begins_while_others_wait_is_hurried_too():
    async def scenario():
        intake = Intake(TWO)
        intake.patience_s = 0.01
        reads = Reads(intake)
        calls = [reads.start(name) for name in "abcde"]
        outcomes = await asyncio.gather(*calls[:4], return_exceptions=True)
        assert [outcome.kind for outcome in outcomes[:3]] == [OVERLOADED] * 3
        calls[4].cancel()
        return reads.begun

    assert asyncio.run(scenario()) == list("abcde")


def test_deadlines_end_what_is_received_and_what_waits():
    async def scenario():
        reads = Reads(Intake(TWO))
        slow = [reads.start("a", 0.02), reads.start("b")]
        late = reads.start("c", 0.01)
        with pytest.raises(Problem, match="other messages were received until the deadline") as caught:
            await late
        assert caught.value.kind is DEADLINE
        with pytest.raises(Problem, match="not complete within its deadline") as caught:
            await slow[0]
        assert caught.value.kind is TIMEOUT
        reads.futures["b"].set_result("b")
        assert await slow[1] == "b"

    asyncio.run(scenario())


def test_not_more_may_wait_than_the_queue_holds():
    async def scenario():
        reads = Reads(Intake(TWO))
        calls = [reads.start(str(index)) for index in range(2 + 64)]
        await settle()
        with pytest.raises(Problem, match="64 messages wait to be received") as caught:
            await reads.start("more")
        assert (caught.value.kind, caught.value.headers) == (OVERLOADED, {"Retry-After": "1"})
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        reads.start("again")
        await settle()
        assert reads.begun[-1] == "again"

    asyncio.run(scenario())
