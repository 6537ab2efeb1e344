"""A model that rots while it serves: the server asks itself, and is taken out. Tests turn the clock by hand."""

import asyncio
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from common.refusal import Refusal
from export.model_file.probe import probe_images, record_probe
from serve.model.prober import MOST_SKIPPED, Prober
from serve.request.app import make_app
from serve.request.limits import Limits
from serve.request.problems import OVERLOADED, Problem


class Rotting:
    """A runtime whose answers `spoil` changes, and whose file records what they should be."""

    description = "rotting"

    def __init__(self, runtime, *, records=True):
        from dataclasses import replace

        logits = runtime(probe_images(runtime.model.spec.image))
        export = {"precision": "fp32", "probe": record_probe(logits)} if records else {}
        self.model, self._runtime = replace(runtime.model, provenance={"export": export}), runtime
        self.spoil = lambda logits: logits

    def __call__(self, images):
        return self.spoil(self._runtime(images))


@pytest.fixture
def rotting(runtime):
    return Rotting(runtime)


@pytest.fixture
def server(rotting):
    with TestClient(make_app(rotting, Limits())) as client:
        yield client


def turn(client):
    client.portal.call(client.app.prober.turn)


def figures(client):
    lines = client.get("/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("diracnet_probe")}


def test_a_sound_model_stays_ready_and_its_error_is_exported(server):
    assert server.get("/model").json()["probe"] == {
        "every_s": 60.0,
        "error": None,
        "checked": None,
        "failures": 0,
        "fault": None,
    }
    turn(server)
    probe, shown = server.get("/model").json()["probe"], figures(server)
    assert 0 <= probe["error"] < 1e-4
    assert (probe["failures"], probe["fault"]) == (0, None)
    assert shown["diracnet_probe_error"] == probe["error"]
    assert shown["diracnet_probe_timestamp_seconds"] == pytest.approx(probe["checked"])
    assert shown["diracnet_probe_failures_total"] == 0
    assert server.get("/readyz").status_code == 200


def test_a_model_that_rots_is_taken_out_until_it_answers_well_again(server, rotting, pixels, encode, caplog):
    rotting.spoil = lambda logits: logits + 0.01 * np.abs(logits).max()
    turn(server)
    for address in ("/readyz", "/v2/health/ready"):
        answer = server.get(address)
        assert answer.status_code == 503
        assert "answers its probe images 1.0e-02 away from the expected answers" in answer.json()["detail"]
    assert server.get("/healthz").status_code == 200
    assert server.post("/predict", content=encode(pixels[0]), headers={"Content-Type": "image/png"}).status_code == 200
    turn(server)
    assert figures(server)["diracnet_probe_failures_total"] == 2
    assert figures(server)["diracnet_probe_error"] == pytest.approx(0.01, rel=1e-3)
    assert [record.levelname for record in caplog.records if "not ready" in record.message] == ["ERROR"] * 2
    rotting.spoil = lambda logits: logits
    turn(server)
    assert server.get("/readyz").status_code == 200
    assert server.get("/model").json()["probe"]["failures"] == 2
    assert "ready again" in caplog.text


def fail(logits):
    raise RuntimeError("/secret/path")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(fail, "the model fails on its probe images (RuntimeError)"), (lambda logits: logits * np.nan, "overflows")],
)
def test_a_model_that_does_not_answer_is_taken_out(server, rotting, spoil, message):
    rotting.spoil = spoil
    turn(server)
    answer = server.get("/readyz")
    assert (answer.status_code, message in answer.json()["detail"]) == (503, True)
    assert "secret" not in answer.text
    assert figures(server)["diracnet_probe_error"] == float("inf")
    assert server.get("/model").json()["probe"]["error"] is None


def test_a_file_without_a_record_is_held_to_its_first_answers(runtime):
    rotting = Rotting(runtime, records=False)
    with TestClient(make_app(rotting, Limits())) as server:
        turn(server)
        assert server.get("/readyz").status_code == 200
        rotting.spoil = lambda logits: -logits
        turn(server)
        assert server.get("/readyz").status_code == 503


class Busy:
    """A batcher that counts what it is asked."""

    def __init__(self, runtime, num_held=1):
        self.served, self.num_held, self.asked = SimpleNamespace(model=runtime.model), num_held, 0
        self._runtime = runtime

    async def classify(self, images, **how):
        assert how["is_probe"]
        self.asked += 1
        return SimpleNamespace(logits=self._runtime(images))


def test_clients_go_first_but_not_for_ever(rotting):
    batcher = Busy(rotting)
    prober = Prober(batcher, every_s=1, deadline_s=1)
    for _ in range(MOST_SKIPPED):
        asyncio.run(prober.turn())
    assert (batcher.asked, prober.error) == (0, None)
    asyncio.run(prober.turn())
    assert batcher.asked == 1
    batcher.num_held = 0
    asyncio.run(prober.turn())
    assert batcher.asked == 2


def test_what_is_overloaded_is_not_damaged(rotting):
    class Full(Busy):
        async def classify(self, images, **how):
            raise Problem(OVERLOADED, "many wait")

    prober = Prober(Full(rotting, num_held=0), every_s=1, deadline_s=1)
    asyncio.run(prober.turn())
    assert (prober.fault, prober.num_failures, prober.checked) == ("", 0, None)


def test_a_model_that_takes_its_place_begins_anew(rotting, other_runtime):
    batcher = Busy(rotting, num_held=0)
    prober = Prober(batcher, every_s=1, deadline_s=1, clock=lambda: 7.0)
    rotting.spoil = lambda logits: -logits
    asyncio.run(prober.turn())
    assert prober.fault
    assert (prober.num_failures, prober.checked) == (1, 7.0)
    batcher.served, batcher._runtime = SimpleNamespace(model=other_runtime.model), other_runtime
    assert prober.fault == "", "it is about the model that is gone"
    asyncio.run(prober.turn())
    assert (prober.error, prober.fault) == (0, ""), "its own answers are expected, and not those of the model before"


def test_the_answer_of_a_model_that_was_replaced_meanwhile_is_left_aside(rotting, other_runtime):
    batcher = Busy(rotting, num_held=0)

    def spoil(logits):
        batcher.served = SimpleNamespace(model=other_runtime.model)
        return -logits

    rotting.spoil = spoil
    prober = Prober(batcher, every_s=1, deadline_s=1)
    asyncio.run(prober.turn())
    assert (prober.error, prober.num_failures, prober.checked) == (None, 0, None)


def test_turns_come_as_often_as_they_were_asked_for(rotting):
    batcher, slept = Busy(rotting, num_held=0), []

    async def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 4:
            raise asyncio.CancelledError

    async def run():
        with pytest.raises(asyncio.CancelledError):
            await Prober(batcher, every_s=60, deadline_s=1, sleep=sleep).run()

    asyncio.run(run())
    assert (slept, batcher.asked) == ([60] * 4, 3)


@pytest.mark.parametrize(("every_s", "runs"), [(0, False), (60, True)])
def test_zero_is_never(rotting, every_s, runs):
    async def names():
        return [task.get_name() for task in asyncio.all_tasks()]

    with TestClient(make_app(rotting, Limits(probe_every_s=every_s))) as server:
        assert ("probing" in server.portal.call(names)) is runs


@pytest.mark.parametrize("every_s", [-1, float("nan"), float("inf")])
def test_no_other_times_are_taken(every_s):
    with pytest.raises(Refusal, match="probe_every_s must be 0 for never, or positive"):
        Limits(probe_every_s=every_s)


def test_no_count_of_answers_and_no_batch_of_clients_has_the_probes_in_it(gated, pixels, encode):
    """A probe and a client that wait together are answered one after the other."""
    gated.open()
    with TestClient(make_app(gated, Limits())) as server:
        gated.close()

        async def together():
            batcher = server.app.prober._batcher
            ask = partial(batcher.classify, deadline=asyncio.get_running_loop().time() + 60, receive=_wait, top_k=1)
            first = asyncio.create_task(ask(pixels[:1]))
            await gated.entered()
            rest = [asyncio.create_task(ask(pixels[:2])), asyncio.create_task(ask(pixels[:4], is_probe=True))]
            await asyncio.sleep(0)  # both are in the queue
            gated.open()
            await asyncio.gather(first, *rest)

        server.portal.call(together)
        assert gated.batches == [1, 2, 4]
        assert server.get("/model").json()["answers"]["images"] == 3


async def _wait():
    await asyncio.Future()
