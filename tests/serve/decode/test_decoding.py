"""Who is decoded when and where, under decoders of heavy images that the tests hold still."""

import asyncio
import gc
import io
import re
import sys
import threading
import time
from queue import SimpleQueue

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import until
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from common.image import decode
from serve.decode.weigh import Weight
from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.job import Served
from serve.request.limits import Limits
from serve.request.problems import DEADLINE, INTERNAL, TOO_MANY_PIXELS, UNDECODABLE, Problem


class Held:
    """In place of `Decoder`: every image waits at a gate; `came` holds them in order."""

    gate = threading.Event()
    came: "SimpleQueue[bytes]" = SimpleQueue()

    def __init__(self, limit_s, *, patience_s, on_end):
        pass

    def __call__(self, content, spec, *, max_pixels, num_bytes):
        self.came.put(content)
        assert self.gate.wait(60)
        return decode(content, spec, max_pixels=max_pixels)

    def kill(self):
        self.gate.set()

    def close(self):
        pass


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(Held, "gate", threading.Event())
    monkeypatch.setattr(Held, "came", SimpleQueue())
    monkeypatch.setattr("serve.decode.pool.Decoder", Held)
    yield Held
    Held.gate.set()


def heavy(side):
    """A PNG that is decoded in a process."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return file.getvalue()


LIGHT = heavy(30)


class Asking:
    """A started batcher; `ask` gives a task whose job is queued once the loop has turned."""

    def __init__(self, runtime, **limits):
        self.batcher = Batcher(Served((runtime,)), Limits(**limits))
        self.gone = asyncio.Event()

    async def __aenter__(self):
        self.batcher.start()
        return self

    async def __aexit__(self, *_):
        await self.batcher.close()

    async def ask(self, *contents):
        deadline = asyncio.get_running_loop().time() + 60
        asked = self.batcher.classify(list(contents), top_k=1, deadline=deadline, receive=self._receive)
        task = asyncio.create_task(asked)
        await asyncio.sleep(0)
        return task

    async def _receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def came(held):
    return await asyncio.to_thread(held.came.get, timeout=60)


@pytest.mark.slow
def test_the_smallest_comes_first(runtime, held):
    files = {side: heavy(side) for side in (1000, 1200, 1400, 1600)}

    async def scenario():
        async with Asking(runtime) as asking:
            tasks = [await asking.ask(files[1200])]
            order = [await came(held)]
            tasks += [await asking.ask(files[side]) for side in (1600, 1000, 1400)]
            held.gate.set()
            await asyncio.gather(*tasks)
            return order + [await came(held) for _ in range(3)]

    assert [len(file) for file in asyncio.run(scenario())] == [len(files[side]) for side in (1200, 1000, 1400, 1600)]


def test_what_has_waited_for_long_is_not_overtaken(runtime, held, monkeypatch):
    files = {side: heavy(side) for side in (1000, 1200, 1600)}

    async def scenario():
        async with Asking(runtime) as asking:
            tasks = [await asking.ask(files[1200])]
            order = [await came(held)]
            tasks.append(await asking.ask(files[1600]))
            monkeypatch.setattr("serve.request.batcher.monotonic", lambda: time.monotonic() + 1000)
            tasks.append(await asking.ask(files[1000]))
            held.gate.set()
            await asyncio.gather(*tasks)
            return order + [await came(held) for _ in range(2)]

    assert [len(file) for file in asyncio.run(scenario())] == [len(files[side]) for side in (1200, 1600, 1000)]


@pytest.mark.parametrize("decode_threads", [0, 1])
def test_a_light_image_waits_for_no_heavy_one(runtime, held, decode_threads):
    async def scenario():
        async with Asking(runtime, decode_threads=decode_threads) as asking:
            slow = await asking.ask(heavy(1200), LIGHT)
            await came(held)
            assert (await (await asking.ask(LIGHT))).outcome
            assert not slow.done()
            held.gate.set()
            return await slow

    assert len(asyncio.run(scenario()).outcome) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "late"])
def test_what_is_given_up_frees_its_bytes_and_is_counted_while_a_decoder_holds_it(runtime, held, how):
    in_work, waiting = heavy(1200), heavy(1300)
    before = sys.getrefcount(waiting)

    async def scenario():
        async with Asking(runtime) as asking:
            decoding = asking.batcher.decoding
            tasks = [await asking.ask(in_work)]
            await came(held)
            tasks += [await asking.ask(waiting) for _ in range(20)]
            if how == "late":
                loop = asyncio.get_running_loop()
                loop.time = lambda: time.monotonic() + 1000
            else:
                asking.gone.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            kinds = {type(outcome) for outcome in outcomes}
            assert kinds == {Problem if how == "late" else ClientDisconnect}
            del outcomes, tasks
            assert sys.getrefcount(waiting) == before
            assert asking.batcher.num_held == 0
            assert decoding.given_up_bytes == len(in_work)
            held.gate.set()
            asking.gone.clear()
            await (await asking.ask(waiting))  # after the other, in the same thread
            return decoding.given_up_bytes, held.came.qsize()

    gc.disable()
    try:
        assert asyncio.run(scenario()) == (0, 1)
    finally:
        gc.enable()


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(5000), heavy(9000)[:10_000]])
def test_a_refused_image_leaves_nothing_to_a_collector(runtime, content):
    before = sys.getrefcount(content)

    async def scenario():
        async with Asking(runtime) as asking:
            (outcome,) = await asyncio.gather(await asking.ask(content), return_exceptions=True)
            return outcome.kind

    gc.disable()
    try:
        assert asyncio.run(scenario()) in (UNDECODABLE, TOO_MANY_PIXELS)
        assert sys.getrefcount(content) == before
    finally:
        gc.enable()


def wait_for(status, url):
    return until(lambda: (answer := httpx.get(url, timeout=60)).status_code == status and answer)


@pytest.mark.slow
def test_a_server_whose_decoders_finish_nothing_is_not_ready_until_they_do(live, runtime, held):
    with live(make_app(runtime, Limits(deadline_s=0.2))) as url:
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        answers, headers = [], {"Content-Type": "image/png"}

        def is_in_work():  # unless it is late before a decoder has it
            answers.append(httpx.post(f"{url}/predict", content=heavy(1200), headers=headers, timeout=60))
            return held.came.qsize()

        until(is_in_work)
        detail = wait_for(503, f"{url}/readyz").json()["detail"]
        probes = [httpx.get(f"{url}{path}", timeout=60).status_code for path in ("/v2/health/ready", "/healthz")]
        held.gate.set()
        wait_for(200, f"{url}/readyz")
    assert (answers[-1].status_code, answers[-1].json()["type"]) == (504, DEADLINE.type)
    assert "none has been decoded" in detail
    assert probes == [503, 200]


@pytest.mark.slow
def test_memory_of_all_decoders_is_bounded(runtime, held):
    """Each takes more than half of it, so one waits for the other although there are two."""
    file = heavy(5000)

    async def scenario():
        async with Asking(runtime, decode_threads=2, max_decoded_bytes=250 * 2**20) as asking:
            tasks = [await asking.ask(file), await asking.ask(file)]
            await came(held)
            waiting = asking.batcher.decoding._budget._change
            await asyncio.to_thread(until, lambda: waiting._waiters)  # type: ignore[attr-defined]
            assert held.came.empty()
            held.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


@pytest.mark.parametrize("decode_threads", [0, 1])
def test_an_image_that_is_larger_than_it_was_weighed_is_a_heavy_one(runtime, held, monkeypatch, decode_threads):
    monkeypatch.setattr("serve.decode.pool.weigh", lambda *_, **__: Weight(1, 1, 0, 0.0))
    held.gate.set()

    async def scenario():
        async with Asking(runtime, decode_threads=decode_threads) as asking:
            job = await (await asking.ask(LIGHT, LIGHT))
            return len(job.outcome), held.came.qsize()

    assert asyncio.run(scenario()) == (2, 2)


@pytest.mark.parametrize("decode_threads", [0, 1])
def test_a_request_names_each_image_that_is_refused_before_it_is_decoded(runtime, decode_threads):
    async def scenario():
        async with Asking(runtime, decode_threads=decode_threads, max_pixels=10_000) as asking:
            with pytest.raises(Problem) as refused:
                await (await asking.ask(LIGHT, heavy(101), heavy(102)))
            return refused.value

    problem = asyncio.run(scenario())
    assert problem.kind == TOO_MANY_PIXELS
    assert "image 2 of 3: the image is 101x101" in problem.detail
    assert "image 3 of 3: the image is 102x102" in problem.detail


@pytest.mark.slow
def test_a_process_that_cannot_be_started_fails_one_request(live, runtime, encode, pixels, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr("common.child.subprocess.Popen", fail)
    with live(make_app(runtime, Limits())) as url:
        failed = httpx.post(f"{url}/predict", content=heavy(1200), headers={"Content-Type": "image/png"}, timeout=60)
        alive = httpx.post(
            f"{url}/predict", content=encode(pixels[0]), headers={"Content-Type": "image/png"}, timeout=60
        )
    assert (failed.status_code, failed.json()["type"]) == (500, INTERNAL.type)
    assert alive.status_code == 200
    assert "an image could not be decoded" in caplog.text


@pytest.mark.slow
def test_decoders_that_are_replaced_are_counted(runtime):
    with TestClient(make_app(runtime, Limits(decode_threads=1))) as client:
        (decoder,) = client.app.prober._batcher.decoding._decoders
        statuses, counts = [], []
        for _ in range(2):
            for _ in range(2):
                statuses.append(client.post("/predict", content=heavy(1200)).status_code)
            counts += re.findall(r"^diracnet_decoders_replaced_total (.*)", client.get("/metrics").text, re.MULTILINE)
            decoder.kill()
    assert statuses == [200, 200, 422, 200]
    assert counts == ["0.0", "1.0"]


def test_pixels_that_wait_for_the_model_are_bounded(gated):
    async def scenario():
        image_bytes = np.prod(gated.model.spec.image.height * gated.model.spec.image.width * 3)
        limits = {"max_images": 1, "max_body_bytes": 1, "max_held_bytes": int(3 * image_bytes)}
        async with Asking(gated, **limits) as asking:
            tasks = [await asking.ask(LIGHT) for _ in range(3)]
            with pytest.raises(Problem, match="3 images are waiting"):
                await (await asking.ask(LIGHT))
            gated.open()
            await asyncio.gather(*tasks)

    asyncio.run(scenario())
