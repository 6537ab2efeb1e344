"""Jobs under a model that the tests hold still: what runs together, what is refused and what is dropped."""

import asyncio
import math
import threading
from functools import partial
from time import monotonic
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.requests import ClientDisconnect

from common.image import decode
from common.refusal import Refusal
from serve.request.batcher import Batcher
from serve.request.job import Served
from serve.request.limits import Limits
from serve.request.problems import DEADLINE, NOT_A_NUMBER, NOT_READY, OVERLOADED, UNDECODABLE, Problem


class Jobs:
    """A started batcher, and the questions that the tests ask it."""

    def __init__(self, runtime, **limits):
        self.batcher = Batcher(Served((runtime,)), Limits(**{"max_images": 1, "decode_threads": 0, **limits}))
        self.gone = asyncio.Event()  # set: every client goes away
        self._waiting = set()

    async def __aenter__(self):
        self.batcher.start()
        return self

    async def __aexit__(self, *_):
        await self.batcher.close()

    def ask(self, *files, top_k=1, within_s=60.0):
        """A task whose job is in the queue once the event loop has turned."""
        deadline = asyncio.get_running_loop().time() + within_s
        asked = self.batcher.classify(list(files), top_k=top_k, deadline=deadline, receive=self._receive)
        return asyncio.create_task(asked)

    async def _receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def file(pixels, encode):
    return encode(pixels[0])


def test_a_lone_job_runs_at_once_and_what_comes_meanwhile_runs_together(gated, file):
    async def scenario():
        async with Jobs(gated) as jobs:
            first = jobs.ask(file)
            await gated.entered()
            others = [jobs.ask(file) for _ in range(5)]
            await asyncio.sleep(0)
            gated.open()
            return await asyncio.gather(first, *others)

    done = asyncio.run(scenario())
    assert gated.batches == [1, 5]
    assert len({job.outcome[0]["index"] for job in done}) == 1


@pytest.mark.parametrize("decode_threads", [0, 1, 3])
def test_every_job_gets_its_own_answer_in_order(runtime, pixels, encode, decode_threads):
    files = [encode(image) for image in pixels]

    async def scenario():
        async with Jobs(runtime, decode_threads=decode_threads, max_images=5, max_batch=4) as jobs:
            return await asyncio.gather(*(jobs.ask(*files[index:], files[index], top_k=10) for index in range(4)))

    expected = runtime(pixels).argmax(1).tolist()
    for index, job in enumerate(asyncio.run(scenario())):
        assert [result["index"] for result in job.outcome] == [*expected[index:], expected[index]]
        assert all(len(result["top"]) == 10 for result in job.outcome)
        assert job.decode_s > 0
        assert job.model_s > 0
        assert job.queue_s >= 0


@pytest.mark.parametrize("num_images", [1, 6])
def test_waiting_and_decoding_and_computing_are_told_apart(runtime, encode, num_images):
    """No moment counts twice: what the three take together is no longer than what they are parts of."""
    file = encode(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))

    async def scenario():
        async with Jobs(runtime, decode_threads=num_images, max_images=num_images) as jobs:
            start = monotonic()
            return await jobs.ask(*num_images * [file]), start, monotonic()

    job, start, end = asyncio.run(scenario())
    assert min(job.decode_s, job.queue_s, job.model_s) > 0
    assert job.decode_s + job.queue_s + job.model_s <= end - start


def test_a_request_of_more_images_than_a_batch_is_cut(gated, file):
    async def scenario():
        async with Jobs(gated, max_images=10, max_batch=4) as jobs:
            gated.open()
            return await jobs.ask(*[file] * 10)

    assert len(asyncio.run(scenario()).outcome) == 10
    assert gated.batches == [4, 4, 2]


def test_no_time_in_the_queue_is_negative(runtime, file, monkeypatch):
    """Not even if decoding seems to take longer than all of it: here its clock is faster than the batcher's."""
    monkeypatch.setattr("serve.decode.pool.monotonic", lambda: 1000 * monotonic())

    async def scenario():
        async with Jobs(runtime) as jobs:
            return await jobs.ask(file)

    job = asyncio.run(scenario())
    assert job.decode_s > 0
    assert job.queue_s == 0


def test_a_full_queue_says_when_to_come_again(gated, file):
    async def scenario():
        async with Jobs(gated, max_queue=3) as jobs:
            accepted = [jobs.ask(file) for _ in range(3)]
            with pytest.raises(Problem) as full:
                await jobs.ask(file)
            gated.open()
            await asyncio.gather(*accepted)
            await jobs.ask(file)  # there is room again
            return full.value

    problem = asyncio.run(scenario())
    assert problem.kind == OVERLOADED
    assert int(problem.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(("num_devices", "wait_s"), [(1, "250"), (2, "125")])
def test_the_wait_is_what_the_waiting_images_took_so_far(runtime, file, num_devices, wait_s):
    async def scenario():
        jobs = Jobs(runtime)
        jobs.batcher = Batcher(Served((runtime,) * num_devices), Limits(max_queue=1000, decode_threads=0))
        async with jobs:
            await jobs.ask(file)
            jobs.batcher.seconds_per_image = 0.25
            jobs.batcher.num_held = 1000
            with pytest.raises(Problem) as full:
                await jobs.ask(file)
            return full.value

    assert asyncio.run(scenario()).headers["Retry-After"] == wait_s


def test_the_time_of_an_image_follows_the_latest_batches_slowly(runtime):
    batcher, seconds = Batcher(Served((runtime,)), Limits()), []
    for per_image in (1.0, 2.0, 2.0):
        batcher._record_speed(per_image)
        seconds.append(batcher.seconds_per_image)
    assert seconds == pytest.approx([1.0, 1.1, 1.19])


def test_a_late_job_is_answered_and_never_run(gated, file):
    async def scenario():
        async with Jobs(gated) as jobs:
            first = jobs.ask(file)
            await gated.entered()
            with pytest.raises(Problem) as late:
                await jobs.ask(file, within_s=0.001)
            gated.open()
            await first
            assert jobs.batcher.num_held == 0
            return late.value

    assert asyncio.run(scenario()).kind == DEADLINE
    assert gated.batches == [1]


def test_a_running_job_can_be_late_too(gated, file):
    async def scenario():
        async with Jobs(gated) as jobs:
            with pytest.raises(Problem) as late:
                await jobs.ask(file, within_s=0.001)
            gated.open()
            return late.value

    assert asyncio.run(scenario()).kind == DEADLINE


def test_a_job_whose_client_is_gone_is_neither_decoded_nor_run(gated, file, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "serve.decode.pool.decode", lambda *given, **more: (decoded.append(1), decode(*given, **more))[1]
    )

    async def scenario():
        async with Jobs(gated) as jobs:
            first = jobs.ask(file)
            await gated.entered()
            left = jobs.ask(file)
            await asyncio.sleep(0)
            jobs.gone.set()
            for task in (first, left):
                with pytest.raises(ClientDisconnect):
                    await task
            gated.open()

    asyncio.run(scenario())
    assert gated.batches == decoded == [1]


def test_jobs_under_way_finish_on_the_model_that_was_there(gated, runtime, other_runtime, file):
    async def scenario():
        async with Jobs(gated) as jobs:
            running = jobs.ask(file)
            await gated.entered()
            waiting = jobs.ask(file)
            await asyncio.sleep(0)
            jobs.batcher.served = Served((other_runtime,))
            later = jobs.ask(file)
            await asyncio.sleep(0)
            gated.open()
            return await asyncio.gather(running, waiting, later)

    old, waited, new = asyncio.run(scenario())
    assert old.served.name == waited.served.name == {"name": "DiracNet-10-0.25", "digest": runtime.model.digest}
    assert new.served.name["digest"] == other_runtime.model.digest
    assert gated.batches == [1, 1]  # never two models in one batch


def test_several_devices_share_one_queue(runtime, file):
    both = threading.Barrier(2, timeout=60)

    class Meeting:
        """Runs only while the other device runs too."""

        model, description = runtime.model, "meeting"

        def __call__(self, images):
            both.wait()
            return runtime(images)

    async def scenario():
        batcher = Batcher(Served((Meeting(), Meeting())), Limits(max_batch=1, decode_threads=0))
        jobs = Jobs(runtime)
        jobs.batcher = batcher
        async with jobs:
            return await asyncio.gather(jobs.ask(file), jobs.ask(file))

    assert len(asyncio.run(scenario())) == 2


def test_one_bad_image_is_the_problem_of_its_own_job(runtime, file):
    async def scenario():
        async with Jobs(runtime, max_images=3) as jobs:
            asked = [jobs.ask(file), jobs.ask(b"a", file, b"b"), jobs.ask(file)]
            return await asyncio.gather(*asked, return_exceptions=True)

    sound, bad, other = asyncio.run(scenario())
    assert bad.kind == UNDECODABLE
    assert bad.detail.startswith("image 1 of 3: ")
    assert "; image 3 of 3: " in bad.detail
    assert sound.outcome == other.outcome


def test_one_overflow_is_the_problem_of_its_own_job(gated, pixels, encode):
    """The gate lets logits pass except those of a black image."""
    gated.spoil = lambda images: np.where(images.any(axis=(1, 2, 3))[:, None], 0, np.float32(np.inf))
    sound, black = encode(pixels[0]), encode(np.zeros_like(pixels[0]))

    async def scenario():
        async with Jobs(gated, max_images=2) as jobs:
            asked = [jobs.ask(sound), jobs.ask(sound, black), jobs.ask(sound)]
            await asyncio.sleep(0)
            gated.open()
            return await asyncio.gather(*asked, return_exceptions=True)

    first, bad, last = asyncio.run(scenario())
    assert bad.kind == NOT_A_NUMBER
    assert "image 2 of 2 overflows" in bad.detail
    assert math.isfinite(first.outcome[0]["probability"])
    assert math.isfinite(last.outcome[0]["probability"])


def test_a_failing_model_fails_its_batch_and_the_next_one_runs(gated, file):
    def fail(images):
        raise RuntimeError("out of memory")

    async def scenario():
        async with Jobs(gated) as jobs:
            gated.open()
            gated.spoil = fail
            failed = await asyncio.gather(jobs.ask(file), jobs.ask(file), return_exceptions=True)
            gated.spoil = None
            return failed, await jobs.ask(file)

    failed, after = asyncio.run(scenario())
    assert [str(error) for error in failed] == ["out of memory"] * 2
    assert after.outcome


def test_a_shadow_is_offered_the_images_of_clients_and_no_probe(runtime, pixels):
    offered = []

    async def scenario():
        async with Jobs(runtime, max_images=5) as jobs:
            jobs.batcher.shadow = SimpleNamespace(offer=lambda model, images, *_: offered.append(len(images)))
            deadline = asyncio.get_running_loop().time() + 60
            ask = partial(jobs.batcher.classify, top_k=1, deadline=deadline, receive=jobs._receive)
            await ask(pixels[:2])
            await ask(pixels[:3], is_probe=True)

    asyncio.run(scenario())
    assert offered == [2]


def test_a_closed_batcher_takes_nothing(runtime, file):
    async def scenario():
        jobs = Jobs(runtime)
        async with jobs:
            await jobs.ask(file)
        await jobs.ask(file)

    with pytest.raises(Problem) as closed:
        asyncio.run(scenario())
    assert closed.value.kind == NOT_READY


def test_a_batch_that_ends_after_the_server_has_is_dropped_without_a_word(gated, file, monkeypatch):
    monkeypatch.setattr("serve.request.batcher._LAST_BATCH_S", 0)
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    async def scenario():
        async with Jobs(gated) as jobs:
            asked = jobs.ask(file)
            await gated.entered()
            asked.cancel()
            return jobs.batcher._runners

    (thread,) = asyncio.run(scenario())
    gated.open()
    thread.join(60)
    assert not thread.is_alive()
    assert not raised


def test_limits_that_cannot_hold_are_refused_together():
    with pytest.raises(Refusal, match=r"max_batch must be positive, got 0; max_queue must hold one request of 64"):
        Limits(max_batch=0, max_queue=10)
    with pytest.raises(Refusal, match="decode_threads must not be negative, got -1"):
        Limits(decode_threads=-1)
