"""A model that takes another's place, good or bad, while requests come in."""

import gc
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import httpx
import numpy as np
import pytest
from serving import until
from starlette.testclient import TestClient

from common.refusal import Refusal
from export.model_file.probe import probe_images, record_probe
from export.runtimes.onnx_session import OnnxSession
from serve.model.check import batch_sizes, check, warm_up
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.job import Served
from serve.request.limits import Limits

KEY = {"X-Api-Key": "key"}


def fake(runtime, answer, **model):
    """`runtime` with other answers and another word of itself."""

    class Fake:
        description = "fake"

        def __init__(self):
            self.model = replace(runtime.model, **model)

        def __call__(self, images):
            return answer(images)

    return Fake()


def test_an_honest_model_passes(runtime):
    check(runtime)
    images = probe_images(runtime.model.spec.image)
    record = {"export": {"precision": "fp32", "probe": record_probe(runtime(images))}}
    check(fake(runtime, runtime, provenance=record))


def test_a_model_may_round_in_another_order_each_time(runtime):
    count = iter(range(100))
    check(fake(runtime, lambda images: runtime(images) * (1 + 1e-7 * next(count))))


def test_a_model_that_does_not_prove_itself_is_refused(runtime):
    count = iter(range(100))
    images = probe_images(runtime.model.spec.image)
    record = {"export": {"precision": "fp32", "probe": record_probe(runtime(images))}}

    def fail(images):
        raise RuntimeError("/secret/path")

    for bad, message in (
        (fake(runtime, lambda images: runtime(images)[:, :9]), "gives 9 values per image for 10 labels"),
        (fake(runtime, lambda images: runtime(images) * np.nan), "gives values that are not finite"),
        (
            fake(runtime, lambda images: runtime(images) + np.float32([np.inf] + [0] * 9)),
            "gives values that are not finite",
        ),
        (fake(runtime, lambda images: runtime(images) + next(count)), "gives two answers to the same images"),
        (fake(runtime, fail), r"fails on its probe images \(RuntimeError\)"),
        (fake(runtime, lambda images: 1.01 * runtime(images), provenance=record), "away from what its file recorded"),
    ):
        with pytest.raises(Refusal, match=message):
            check(bad)


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (32, [1, 2, 4, 8, 16, 32]), (12, [1, 2, 4, 8, 12])]
)
def test_every_batch_size_is_warm(runtime, max_batch, sizes):
    seen = []
    warm_up([fake(runtime, lambda images: seen.append(len(images)))], max_batch)
    assert batch_sizes(max_batch) == seen == sizes


@pytest.fixture
def served(artefact):
    """An app around a file that the tests may replace."""
    return SimpleNamespace(
        app=make_app(
            OnnxSession(artefact),
            Limits(),
            access=Access(b"key"),
            load=lambda: [OnnxSession(artefact)],
        ),
        file=artefact,
    )


def test_reload_takes_the_new_file_and_answers_with_it(served, other_artefact, other_runtime, pixels, encode):
    with TestClient(served.app) as client:
        shutil.copy(other_artefact, served.file)
        response = client.post("/admin/reload", headers=KEY)
        assert (response.status_code, response.json()["digest"]) == (200, other_runtime.model.digest)
        answer = client.post("/predict", content=encode(pixels[0]), headers=KEY).json()
        assert client.get("/model", headers=KEY).json()["digest"] == other_runtime.model.digest
    assert answer["model"]["digest"] == other_runtime.model.digest
    assert answer["results"][0]["index"] == other_runtime(pixels[:1]).argmax()


def label_of(answer):
    """The first image's, as /predict or the Open Inference Protocol gives it."""
    return answer["results"][0]["label"] if "results" in answer else answer["outputs"][0]["data"][0].split(":")[2]


@pytest.mark.parametrize("address", ["/predict", "/v2/models/DiracNet-10-0.25/infer"])
def test_an_answer_has_the_labels_of_the_model_that_computed_it(runtime, pixels, encode, address):
    """A model with other labels takes the place of the first one while that computes."""
    spec = replace(runtime.model.spec, labels=tuple(f"new {index}" for index in range(10)))
    new = Served((fake(runtime, runtime, digest="new", spec=spec),))

    def replaced_meanwhile(images):
        if images.any():  # the black image warms up
            batcher.served = new
        return runtime(images)

    batcher = Batcher(Served((fake(runtime, replaced_meanwhile),)), Limits())
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": pixels[0].ravel().tolist()}
    outputs = [{"name": "logits", "parameters": {"classification": 1}}]
    body = (
        {"content": encode(pixels[0])} if address == "/predict" else {"json": {"inputs": [tensor], "outputs": outputs}}
    )
    with TestClient(make_app(batcher, Limits())) as client:
        old, later = (client.post(address, **body).json() for _ in range(2))
    best = runtime(pixels[:1]).argmax()
    assert [label_of(old), label_of(later)] == [f"label {best}", f"new {best}"]
    if address == "/predict":
        assert [old["model"]["digest"], later["model"]["digest"]] == [runtime.model.digest, "new"]


def test_a_reload_is_passed_on_to_the_other_processes_once_it_has_succeeded(served, other_artefact):
    told = []
    app = make_app(
        OnnxSession(served.file),
        Limits(),
        access=Access(b"key"),
        load=lambda: [OnnxSession(served.file)],
        reload_everywhere=lambda: told.append(served.file.read_bytes()),
    )
    with TestClient(app) as client:
        shutil.copy(other_artefact, served.file)
        assert client.post("/admin/reload", headers=KEY).status_code == 200
        served.file.write_bytes(b"no model")
        assert client.post("/admin/reload", headers=KEY).status_code == 409
    assert told == [other_artefact.read_bytes()]


def test_of_several_devices_each_is_checked_and_warm_before_it_serves(runtime):
    seen = []
    second = fake(runtime, lambda images: (seen.append(len(images)), runtime(images))[1])
    loads = iter([[runtime, second], [runtime, fake(runtime, lambda images: runtime(images) * np.nan)]])
    app = make_app(runtime, Limits(max_batch=2), access=Access(b"key"), load=lambda: next(loads))
    with TestClient(app) as client:
        assert [client.post("/admin/reload", headers=KEY).status_code for _ in range(2)] == [200, 409]
    assert seen[-2:] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be loaded as an ONNX model"), (b"no model", "is not a valid ONNX file")]
)
def test_a_bad_file_leaves_the_old_model_there(served, runtime, pixels, encode, content, message, caplog):
    with TestClient(served.app) as client:
        served.file.write_bytes(content)
        response = client.post("/admin/reload", headers=KEY)
        assert response.status_code == 409
        assert response.json()["type"] == "urn:diracnet:problem:bad-model"
        assert message in response.json()["detail"]
        answer = client.post("/predict", content=encode(pixels[0]), headers=KEY).json()
    assert answer["model"]["digest"] == runtime.model.digest
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serve.model.check"]
    assert line.startswith("the old model keeps serving: ")


@pytest.mark.slow
def test_no_request_is_lost_and_every_answer_is_of_the_model_it_names(
    served, live, runtime, other_artefact, other_runtime, pixels, encode
):
    """Four clients ask without a pause while the file is replaced twenty times."""
    original, other = served.file.read_bytes(), other_artefact.read_bytes()
    files = [encode(image) for image in pixels[:4]]
    expected = {one.model.digest: one(pixels[:4]).argmax(1).tolist() for one in (runtime, other_runtime)}
    assert len(set(map(tuple, expected.values()))) == 2
    done, answers = threading.Event(), []

    def ask(index):
        with httpx.Client() as client:
            while not done.is_set():
                response = client.post(f"{url}/predict", content=files[index], headers=KEY, timeout=60)
                answers.append((index, response.status_code, response.json()))

    with live(served.app) as url:
        clients = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for client in clients:
            client.start()
        for turn in range(20):
            served.file.write_bytes(original if turn % 2 else other)
            assert httpx.post(f"{url}/admin/reload", headers=KEY, timeout=60).status_code == 200
        done.set()
        for client in clients:
            client.join(60)
    assert {status for _, status, _ in answers} == {200}
    assert {answer["model"]["digest"] for _, _, answer in answers} == set(expected)
    for index, _, answer in answers:
        assert answer["results"][0]["index"] == expected[answer["model"]["digest"]][index]


@pytest.mark.slow
def test_the_old_model_is_let_go_with_its_last_answer(artefact, other_artefact, pixels, encode):
    first = OnnxSession(artefact)
    old = ref(first)
    app = make_app([first], Limits(), access=Access(b"key"), load=lambda: [OnnxSession(other_artefact)])
    del first
    with TestClient(app) as client:
        client.post("/predict", content=encode(pixels[0]), headers=KEY)
        assert old()
        assert client.post("/admin/reload", headers=KEY).status_code == 200
        gc.collect()
        until(lambda: old() is None)  # the thread that ran it may hold it for a moment
