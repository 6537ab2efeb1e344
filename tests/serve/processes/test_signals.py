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
    """The signals that reach whoever had SIGTERM before, as uvicorn has."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_sigterm_makes_the_server_not_ready_before_it_stops(runtime, stopped):
    app = make_app(runtime, Limits())

    async def scenario():
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://a") as client,
        ):
            ready = await client.get("/readyz")
            signal.raise_signal(signal.SIGTERM)
            return ready, await client.get("/readyz"), await client.get("/healthz")

    ready, after, alive = asyncio.run(scenario())
    assert (ready.status_code, after.status_code, alive.status_code) == (200, 503, 200)
    assert after.json()["type"] == "urn:diracnet:problem:not-ready"
    assert stopped == [signal.SIGTERM]


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
