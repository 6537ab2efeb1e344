"""What a model answers is counted, for all workers together, and compared with the reference in its file."""

import logging
import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from export.model_file.reference import PARTS, Reference, count, part
from export.runtimes.runtime import best, probabilities
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.limits import Limits
from serve.watching import answers
from serve.watching.answers import MOST_CLASSES, Watch, with_sound_reference
from serve.watching.shared_counts import COUNTS_VARIABLE, Counts

PNG = {"Content-Type": "image/png"}


def ranked(values):
    order = best(values, 2)
    return order, np.take_along_axis(values, order, axis=1)


def drawn(num, num_classes=10, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.2), num)


def with_reference(model, values):
    reference = Reference("images of a test", "0" * 64, count(*ranked(values), values.shape[1]))
    return replace(model, provenance={**model.provenance, "reference": reference.to_dict()})


def samples(text):
    """{(name, label of the class, end of the bin or part): value}"""
    return {
        (sample.name, sample.labels.get("label") or sample.labels.get("le") or sample.labels.get("of")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_clients_were_told(client, runtime, pixels, encode):
    for image in pixels:
        client.post("/predict", content=encode(image), headers=PNG)
    client.post("/predict", content=encode(pixels[0]), headers=PNG, params={"top_k": 1})
    found = samples(client.get("/metrics").text)
    values = probabilities(runtime(pixels[[0, 1, 2, 3, 4, 0]]))
    counts = count(*ranked(values), 10)
    labels = runtime.model.spec.labels
    assert found["diracnet_answered_images_total", None] == 6
    assert [found["diracnet_predicted_images_total", label] for label in labels] == part(counts, "classes").tolist()
    for name in ("top_probability", "margin"):
        ends = [found[f"diracnet_{name}_bucket", end] for end in ("0.05", "0.5", "1.0", "+Inf")]
        assert ends == [part(counts, name).cumsum()[place] for place in (0, 5, 15, 15)]
        assert found[f"diracnet_{name}_count", None] == 6
    top, second = np.sort(values)[:, -1], np.sort(values)[:, -2]
    assert found["diracnet_top_probability_sum", None] == pytest.approx(top.sum())
    assert found["diracnet_margin_sum", None] == pytest.approx((top - second).sum())
    assert ("diracnet_drift", "classes") not in found
    card = client.get("/model").json()
    assert card["answers"]["images"] == 6
    assert card["answers"]["mean_margin"] == pytest.approx((top - second).mean())
    assert sum(row["images"] for row in card["answers"]["most_frequent"]) == 6
    assert card["drift"] is card["shadow"] is None


def test_an_answer_that_is_not_a_number_is_counted_apart(runtime, pixels, encode):
    def spoilt(images):
        logits = runtime(images)
        logits[images.mean(axis=(1, 2, 3)) == 0] = np.nan
        return logits

    spoilt.model, spoilt.description = runtime.model, "spoilt"
    with TestClient(make_app(spoilt, Limits())) as client:
        for image in (pixels[0], np.zeros_like(pixels[0]), pixels[1]):
            client.post("/predict", content=encode(image), headers=PNG)
        found = samples(client.get("/metrics").text)
    assert found["diracnet_answered_images_total", None] == found["diracnet_margin_count", None] == 2
    assert found["diracnet_not_a_number_images_total", None] == 1


def test_metrics_stay_bounded_for_many_classes(runtime):
    """The most frequent classes; each says all of its own count, so that one that comes and goes is not miscounted."""
    num_classes = MOST_CLASSES + 50
    labels = tuple(f'"{index}\n' + "x" * 500 for index in range(num_classes))
    model = replace(runtime.model, spec=replace(runtime.model.spec, labels=labels))
    found = Watch()
    values = np.full((2 * MOST_CLASSES, num_classes), 0.0)
    values[np.arange(2 * MOST_CLASSES), np.arange(2 * MOST_CLASSES) % MOST_CLASSES + 50] = 1
    found(model, np.ones(len(values), bool), *ranked(values))
    (family,) = (metric for metric in found.collect() if metric.name == "diracnet_predicted_images")
    assert {sample.value for sample in family.samples} == {2}
    assert [sample.labels["index"] for sample in family.samples] == [str(50 + index) for index in range(MOST_CLASSES)]
    assert max(len(sample.labels["label"]) for sample in family.samples) == 80


def test_the_model_before_is_shown_beside_the_new_one_and_no_other(runtime):
    found = Watch()
    for digest in "abc":
        found(replace(runtime.model, digest=digest), np.ones(3, bool), *ranked(drawn(3)))
    found(replace(runtime.model, digest="b"), np.ones(2, bool), *ranked(drawn(2)))
    (family,) = (metric for metric in found.collect() if metric.name == "diracnet_answered_images")
    assert {sample.labels["digest"]: sample.value for sample in family.samples} == {"b": 5, "c": 3}


def test_drift_is_that_of_the_latest_images(runtime, monkeypatch):
    monkeypatch.setattr(answers, "WINDOW", 100)
    reference, other = drawn(500), drawn(150, seed=1)
    other[:] = np.roll(np.eye(10)[3] * 0.9 + 0.01, 0)  # always class 3
    model, found = with_reference(runtime.model, reference), Watch()
    for batch in np.array_split(reference, 50):
        found(model, np.ones(len(batch), bool), *ranked(batch))
    calm = found.of(model).drifts()
    assert {name: drift.value < drift.chance for name, drift in calm.items()} == dict.fromkeys(PARTS, True)
    assert {drift.num_images for drift in calm.values()} == {100}  # one window to two, and another begins
    for batch in np.array_split(other, 30):
        found(model, np.ones(len(batch), bool), *ranked(batch))
    loud = found.of(model).drifts()
    assert {name: drift.value > drift.chance for name, drift in loud.items()} == dict.fromkeys(PARTS, True)
    share = (reference.argmax(1) == 3).mean()
    assert loud["classes"].num_images == 150
    assert loud["classes"].value == pytest.approx(1 - share, abs=0.4)
    assert found.of(model).totals()[0] == 650


def test_drift_stands_in_metrics_and_on_the_card(runtime, pixels, encode):
    values = probabilities(runtime(pixels[:2]))

    def known(images):
        return runtime(images)

    known.model, known.description = with_reference(runtime.model, values), "known"
    with TestClient(make_app(known, Limits())) as client:
        assert client.get("/model").json()["drift"]["reference"] == {
            "what": "images of a test",
            "images": 2,
            "of": "0" * 64,
        }
        assert "diracnet_drift{" not in client.get("/metrics").text  # nothing has been answered
        for image in pixels[:2]:
            client.post("/predict", content=encode(image), headers=PNG)
        card, found = client.get("/model").json(), samples(client.get("/metrics").text)
    for name in PARTS:
        assert card["drift"][name]["value"] == found["diracnet_drift", name] == 0
        assert card["drift"][name]["chance"] == found["diracnet_drift_chance", name]
        assert card["drift"][name]["num_images"] == found["diracnet_drift_images", name] == 2


@pytest.mark.parametrize("record", [None, "x", [], {"format": "diracnet-reference-1"}, {"images": float("nan")}])
def test_a_bad_reference_is_left_aside_with_a_warning(runtime, pixels, encode, record, caplog):
    model = replace(runtime.model, provenance={"training": {}, "reference": record})

    def bad(images):
        return runtime(images)

    bad.model, bad.description = model, "bad"
    with TestClient(make_app(bad, Limits())) as client:
        assert client.post("/predict", content=encode(pixels[0]), headers=PNG).status_code == 200
        assert client.get("/metrics").status_code == 200
    (line,) = {record.getMessage() for record in caplog.records if record.name == "serve.watching.answers"}
    assert line.startswith(f"the drift of {model.name} is not measured: the reference ")
    assert with_sound_reference(model).provenance == {"training": {}}  # and is not shown to clients


@pytest.fixture
def together(tmp_path, monkeypatch):
    """Counts in files, as workers have them."""
    monkeypatch.setenv(COUNTS_VARIABLE, str(tmp_path))
    return tmp_path


def test_workers_count_together_and_only_living_ones_have_a_latest_window(together, runtime, monkeypatch):
    """Two processes that live, this one's parent in the role of the second, and one that has ended."""
    model = with_reference(runtime.model, drawn(50))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process, num in ((os.getppid(), 5), (ended.pid, 7), (os.getpid(), 2)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        found = Watch()
        found(model, np.ones(num, bool), *ranked(drawn(num)))
    assert found.summary(model)["answers"]["images"] == 14
    assert found.of(model).drifts()["classes"].num_images == 7
    again = Watch()  # as if a process of the same number had taken the place
    again(model, np.array([True, False]), *ranked(drawn(2)))
    assert again.summary(model)["answers"] | {"images": 15, "not_a_number": 1} == again.summary(model)["answers"]


def test_a_disk_without_room_costs_the_sum_and_nothing_else(together, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        counts = Counts("answers", 3)
    counts.own[:] = 1
    assert counts.of_all().sum(0).tolist() == [1, 1, 1]
    assert "other workers do not see the counts of this one: No space left" in caplog.text


def test_what_another_version_left_there_is_not_added(together):
    counts = Counts("answers", 3)
    (together / "answers.1.counts").write_bytes(bytes(8))
    (together / "answers.2.counts").write_bytes(b"x")
    assert counts.of_all().shape == (1, 3)


def test_a_reload_counts_the_new_model_apart(artefact, other_artefact, runtime, other_runtime, pixels, encode):
    key = {"X-Api-Key": "key"}
    app = make_app(runtime, Limits(), access=Access(b"key"), load=lambda: [other_runtime])
    with TestClient(app) as client:
        for _ in range(2):
            client.post("/predict", content=encode(pixels[0]), headers=key)
            client.post("/admin/reload", headers=key)
        text = client.get("/metrics", headers=key).text
    for model in (runtime.model, other_runtime.model):
        assert f'diracnet_answered_images_total{{digest="{model.digest}"}} 1.0' in text
