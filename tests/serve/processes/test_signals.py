import asyncio
import signal

import httpx
import pytest

from common.refusal import Refusal
from serve.processes.signals import heed_signals
from serve.request.app import make_app
from serve.request.limits import Limits


@pytest.fixture
def stopped():
    """The signals that reach whoever had SIGTERM and SIGINT before, as uvicorn has."""
    numbers = []
    ends = (signal.SIGTERM, signal.SIGINT)
    before = {end: signal.signal(end, lambda number, frame: numbers.append(number)) for end in ends}
    yield numbers
    for end, handler in before.items():
        signal.signal(end, handler)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_the_server_not_ready_before_it_stops(runtime, stopped, end):
    app = make_app(runtime, Limits())

    async def scenario():
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            ready = await client.get("/readyz")
            signal.raise_signal(end)
            return ready, await client.get("/readyz"), await client.get("/healthz")

    ready, after, alive = asyncio.run(scenario())
    assert (ready.status_code, after.status_code, alive.status_code) == (200, 503, 200)
    assert after.json()["type"] == "urn:diracnet:problem:not-ready"
    assert stopped == [end]


def test_a_signal_that_was_ignored_stays_so():
    """A device process ignores Ctrl-C: its front ends still need it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def scenario():
        with heed_signals(before_stop=lambda: pytest.fail("it stops"), reload=None):
            signal.raise_signal(signal.SIGINT)

    try:
        asyncio.run(scenario())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sighup_reloads_and_a_refusal_ends_nothing(stopped):
    async def scenario():
        reloaded = asyncio.Queue()

        async def reload():
            reloaded.put_nowait(True)
            raise Refusal("no")

        with heed_signals(before_stop=list, reload=reload):
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
                await reloaded.get()
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert stopped == []
