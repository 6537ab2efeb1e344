"""The app of a front end, before a device process in a thread: answers, ends and reloads."""

import asyncio
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from serving import PNG, until

if sys.platform != "linux":
    pytest.skip("front ends need Linux", allow_module_level=True)

from devices import running

from common.refusal import Refusal
from serve.front_ends.batcher import FrontBatcher
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.job import Served
from serve.request.limits import Limits


@contextmanager
def front_end(live, it, index=0, **options):
    batcher = FrontBatcher(it.dial(index), it.limits)
    with live(make_app(batcher, it.limits, load=batcher.reload, **options)) as url:
        yield url


def post(url, file):
    return httpx.post(f"{url}/predict", content=file, headers=PNG, timeout=60)


def posted(url, file):
    """A thread that asks, and the list of its answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(url, file)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize("decode_threads", [0, 2])
def test_a_front_end_answers_as_a_whole_server_does(live, runtime, pixels, encode, decode_threads):
    limits = Limits(decode_threads=decode_threads)
    files = [encode(image) for image in pixels]
    with live(make_app(runtime, limits)) as url:
        expected = [post(url, file).json() for file in files]
    with running(runtime, limits) as it, front_end(live, it) as url:
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        for file, answer in zip(files, expected, strict=True):
            found = post(url, file)
            assert found.json()["model"] == answer["model"]
            assert found.json()["results"][0]["label"] == answer["results"][0]["label"]
            assert found.json()["results"][0]["probability"] == pytest.approx(answer["results"][0]["probability"])
        assert post(url, b"no image").status_code == 422


def test_jobs_that_are_answered_together_keep_their_own_times(runtime, pixels, monkeypatch):
    monkeypatch.setattr("serve.front_ends.batcher.monotonic", lambda: 100.0)
    jobs = [SimpleNamespace(num_images=num, accepted=0.0, decode_s=10.0) for num in (2, 1)]

    class Answered:
        """A link whose batches took 1, 3 and 2 seconds."""

        def take(self, flights):
            return runtime(pixels[:3]), [1.0, 3.0, 2.0]

    with running(runtime) as it:
        batcher = FrontBatcher(it.dial(), it.limits)
        for job in jobs:
            job.served, job.top_k, job.is_probe = batcher.served, 1, False
        with batcher._link:
            batcher._share(Answered(), [SimpleNamespace(owner=job) for job in jobs])
    assert [(job.model_s, job.queue_s) for job in jobs] == [(3.0, 87.0), (2.0, 88.0)]
    assert [len(job.outcome) for job in jobs] == [2, 1]


def test_a_job_is_never_sent_to_another_model_than_the_one_it_was_made_for(runtime):
    with running(runtime) as it:
        batcher, lost = FrontBatcher(it.dial(0), it.limits), it.dial(1).connect()
        lost.link.end()
        with batcher._link:
            assert batcher._find(Served((lost,))) is batcher.served  # the same model, on another connection
            lost.model = replace(lost.model, digest="another")
            assert batcher._find(Served((lost,))) is None


def test_the_batch_of_a_device_process_that_ends_is_503_and_what_comes_then_waits_for_the_next(
    live, gated, pixels, encode
):
    gated.open()
    with running(gated) as it, front_end(live, it) as url:
        gated.close()
        thread, answers = posted(url, encode(pixels[0]))
        gated.wait()
        it.cut()
        thread.join(60)
        (answer,) = answers
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["detail"].startswith("the process that runs the model has ended")
        unready = httpx.get(f"{url}/readyz", timeout=60)
        assert (unready.status_code, unready.json()["type"]) == (503, "urn:diracnet:problem:not-ready")
        waiting, later = posted(url, encode(pixels[1]))
        gated.open()
        waiting.join(60)
        assert later[0].status_code == 200
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


def test_shared_memory_that_is_full_is_503_until_what_was_given_up_comes_back(live, gated, pixels, encode):
    limits, statuses = Limits(max_images=1, max_queue=1, deadline_s=0.2), []
    gated.open()
    with running(gated, limits) as it, front_end(live, it) as url:
        gated.close()

        def is_in_its_slot():  # unless it is late before that
            statuses.append(post(url, encode(pixels[0])).status_code)
            return gated.batches

        until(is_in_its_slot)
        assert 504 in statuses
        full = post(url, encode(pixels[1]))
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert full.json()["detail"].startswith("the shared memory is full: ")
        gated.open()
        answer = until(lambda: (found := post(url, encode(pixels[1]))).status_code not in (503, 504) and found)
        assert answer.status_code == 200


def test_a_reload_reaches_front_ends_and_loses_nothing_that_is_under_way(live, gated, other_runtime, pixels, encode):
    gated.open()
    key = {"X-Api-Key": "key"}
    with (
        running(gated, load=lambda: [other_runtime]) as it,
        front_end(live, it, 0, access=Access(b"key")) as url,
        front_end(live, it, 1, access=Access(b"key")) as other,
    ):

        def ask(url):
            return httpx.post(f"{url}/predict", content=encode(pixels[0]), headers=PNG | key, timeout=60).json()

        gated.close()
        old = []
        thread = threading.Thread(target=lambda: old.append(ask(url)))
        thread.start()
        gated.wait()
        asyncio.run_coroutine_threadsafe(it.device.reload(), it.device._loop)  # as SIGHUP does
        gated.open()
        thread.join(60)
        new = other_runtime.model.digest
        assert old[0]["model"]["digest"] == gated.model.digest
        for front in (url, other):
            until(lambda front=front: ask(front)["model"]["digest"] == new)


def test_one_front_end_is_asked_for_a_reload_and_all_follow(live, runtime, other_runtime, pixels, encode):
    with (
        running(runtime, load=lambda: [other_runtime]) as it,
        front_end(live, it, 0, access=Access(b"key")) as url,
        it.dial(1).connect().link as link,
    ):
        key, new = {"X-Api-Key": "key"}, other_runtime.model.digest
        assert httpx.post(f"{url}/admin/reload", headers=key, timeout=60).json()["digest"] == new
        answer = httpx.post(f"{url}/predict", content=encode(pixels[0]), headers={**PNG, **key}, timeout=60)
        assert answer.json()["model"]["digest"] == new
        while not link.has_newer_model:
            assert not link.receive(waits=True)
        until(lambda: len(it.device._peers) <= 2)  # the front end's to the old model ends when nothing needs it
        np.testing.assert_allclose(link.run(pixels), runtime(pixels), rtol=1e-5, atol=1e-5)  # what is begun is ended


def test_a_reload_that_the_device_process_refuses_is_refused_and_the_old_model_goes_on(live, runtime, pixels, encode):
    def load():
        raise Refusal("plain.onnx is damaged; export it again")

    with running(runtime, load=load) as it, front_end(live, it, access=Access(b"key")) as url:
        refused = httpx.post(f"{url}/admin/reload", headers={"X-Api-Key": "key"}, timeout=60)
        assert (refused.status_code, refused.json()["detail"]) == (409, "plain.onnx is damaged; export it again")
        answer = httpx.post(
            f"{url}/predict", content=encode(pixels[0]), headers={**PNG, "X-Api-Key": "key"}, timeout=60
        )
        assert answer.json()["model"]["digest"] == runtime.model.digest


def test_a_batch_on_which_the_model_fails_is_500_and_counted_nowhere(live, gated, pixels, encode):
    def fail(images):
        raise RuntimeError("out of memory")

    gated.open()
    with running(gated) as it, front_end(live, it) as url:
        gated.spoil = fail
        failed = post(url, encode(pixels[0]))
        assert (failed.status_code, failed.json()["type"]) == (500, "urn:diracnet:problem:internal")
        assert "memory" not in failed.text
        gated.spoil = None
        assert post(url, encode(pixels[0])).status_code == 200
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        (answered,) = [line for line in lines if line.startswith("diracnet_answered_images_total{")]
        assert answered.endswith(" 1.0")


def test_a_front_end_asks_the_model_for_its_probe_images_and_counts_them_nowhere(live, runtime):
    limits = Limits(probe_every_s=0.01)
    with running(runtime, limits) as it, front_end(live, it) as url:
        card = until(lambda: (card := httpx.get(f"{url}/model", timeout=60).json())["probe"]["checked"] and card)
        assert card["probe"]["error"] < 1e-4
        assert card["probe"]["fault"] is None
        assert card["answers"]["images"] == 0
