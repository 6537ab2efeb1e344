"""A second model beside the one that serves: compared, promoted, and never in a client's way."""

import errno
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import yaml
from serving import PNG, ROOT
from shadows import card_when, running, send
from starlette.testclient import TestClient

from common.child import ProcessFailed
from common.difference import difference
from common.refusal import Refusal
from export.runtimes.runtime import probabilities
from serve.config import ServeConfig
from serve.model.load import Roles
from serve.model.process import BatchFailed
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.limits import Limits
from serve.shadow import shadow as module
from serve.shadow.comparison import Comparison
from serve.shadow.shadow import Shadow, why_unfit
from serve.watching.answers import Watch

ALERTS = ROOT / "deploy" / "alerts.yaml"
KEY = {"X-Api-Key": "key"}


class Process:
    """In the place of a process: answers as `answer` does."""

    def __init__(self, runtime, answer=None):
        self.model, self.description, self.num_asked = runtime.model, "fake", 0
        self._answer, self._killed = answer or runtime, threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        self._killed.set()

    def wait(self):
        """As a model that hangs, until it is killed."""
        assert self._killed.wait(60)
        raise ProcessFailed("its process ended with status -9")

    def ask(self, images, patience_s):
        self.num_asked += len(images)
        return 0.25, self._answer(images)


@pytest.fixture
def shadowed(runtime, monkeypatch):
    """`shadowed(process, ...)`: an app whose shadow is each of these processes in turn."""
    monkeypatch.setattr(module, "start_process", lambda process: process)

    def shadowed(*processes, load=lambda digest: [], take_over=lambda: None, **options):
        left = list(processes)
        options = {"share": 1.0, "num_images": 5, "max_batch": 32, **options}
        shadow = Shadow(lambda: left.pop(0) if len(left) > 1 else left[0], load, take_over, **options)
        limits = Limits(max_batch=options["max_batch"])
        app = make_app(runtime, limits, access=Access(b"key"), load=lambda: [runtime], shadow=shadow)
        return TestClient(app, headers=KEY)

    return shadowed


def test_two_models_are_compared_as_parity_compares_them(shadowed, runtime, other_runtime, pixels, encode):
    with shadowed(Process(other_runtime)) as client:
        running(client)
        send(client, pixels, encode)
        card = card_when(client, lambda card: card["images"] == 5)
        text = client.get("/metrics").text
    served, other = runtime(pixels), other_runtime(pixels)
    assert card["digest"] == other_runtime.model.digest
    assert card["agreement"]["hits"] == (served.argmax(1) == other.argmax(1)).sum() < 5
    assert card["agreement"]["value"] == card["agreement"]["hits"] / 5
    assert card["largest_difference"] == pytest.approx(difference(served, other).relative, rel=1e-5)
    assert (card["not_a_number"], card["failed"], card["dropped"]) == (0, 0, 0)
    pair = f'{{digest="{runtime.model.digest}",shadow="{other_runtime.model.digest}"}}'
    lines = text.splitlines()
    assert f"diracnet_shadow_images_total{pair} 5.0" in lines
    assert f"diracnet_shadow_agreeing_images_total{pair} {card['agreement']['hits']}.0" in lines
    assert f"diracnet_shadow_largest_difference{pair} {card['largest_difference']}" in lines
    assert "diracnet_shadow_running 1.0" in lines
    (seconds,) = (float(line.split()[-1]) for line in lines if line.startswith("diracnet_shadow_seconds_sum{"))
    assert seconds in (0.25, 0.5, 0.75, 1.0, 1.25), "a quarter for each batch of the five images"


def test_the_same_model_agrees_with_itself(shadowed, runtime, pixels, encode):
    with shadowed(Process(runtime)) as client:
        running(client)
        send(client, pixels, encode)
        card = card_when(client, lambda card: card["images"] == 5)
    assert card["agreement"]["value"] == 1
    assert card["largest_difference"] <= 1e-5  # batches of another size


def test_the_largest_difference_is_that_of_all_batches(runtime):
    comparison = Comparison(runtime.model, replace(runtime.model, digest="other"))
    for error, largest in ((0.5, 4.0), (0.1, 2.0)):
        comparison.compare(np.array([[largest, 0.0]]), np.array([[largest, error]]))
    assert comparison.summary()["largest_difference"] == 0.5 / 4.0


def test_images_of_two_served_models_in_one_batch_are_compared_each_with_its_own(runtime, other_runtime, pixels):
    """Both are said to answer as the shadow does."""

    def answer_last(images):
        shadow._has_ended = True
        return runtime(images)

    process = Process(runtime, answer_last)
    shadow = Shadow(lambda: None, lambda digest: [], lambda: None, share=1.0, num_images=5, max_batch=5)
    shadow.model = process.model
    models = ((runtime.model, pixels[:2]), (other_runtime.model, pixels[2:]))
    for model, images in models:
        shadow.offer(model, images, runtime(images), np.ones(len(images), bool))
    shadow._serve(process)
    for model, images in models:
        card = shadow.comparison_of(model).summary()
        assert (card["images"], card["agreement"]["value"]) == (len(images), 1)
        assert card["largest_difference"] <= 1e-5


def test_a_share_of_the_images_is_answered_twice(shadowed, runtime, pixels, encode, monkeypatch):
    dice = iter([0.05, 0.5, 0.0999, 0.1, 0.9])
    monkeypatch.setattr(module, "random", lambda: next(dice))
    process = Process(runtime)
    with shadowed(process, share=0.1) as client:
        running(client)
        send(client, pixels, encode)
        card_when(client, lambda card: card["images"] == 2)
    assert process.num_asked == 2
    assert next(dice, None) is None


def test_a_shadow_that_hangs_delays_nobody_and_what_it_misses_is_counted(shadowed, runtime, pixels, encode):
    """One image is with it, as many wait as four batches hold, and the rest is dropped."""
    slow = Process(runtime)
    slow._answer = lambda images: slow.wait()
    with shadowed(slow, max_batch=1) as client:
        running(client)
        send(client, np.tile(pixels, (4, 1, 1, 1)), encode)
        card = client.get("/model").json()["shadow"]
        assert card["images"] == 0
        assert card["dropped"] in (15, 16)  # whether the first was already taken when the fifth came
        assert client.post("/admin/promote").status_code == 409


def send_in_turn(client, images, encode):
    """Each once the shadow has had the one before: it drops the fifth that waits for batches of one. The last card."""
    for num in range(1, len(images) + 1):
        send(client, images[num - 1 : num], encode)
        card = card_when(client, lambda card, num=num: card["images"] + card["not_a_number"] + card["failed"] == num)
    return card


def test_what_is_not_a_number_is_counted_and_compared_with_nothing(shadowed, runtime, pixels, encode):
    def spoil(images):
        logits = runtime(images)
        logits[0] = np.nan
        return logits

    with shadowed(Process(runtime, spoil), max_batch=1) as client:
        running(client)
        card = send_in_turn(client, pixels, encode)
        assert card["not_a_number"] == 5
        assert card["images"] == 0
        assert (card["agreement"]["value"], card["largest_difference"]) == (None, None)
        assert "diracnet_shadow_largest_difference" in client.get("/metrics").text


def test_a_shadow_that_raises_goes_on_and_says_so_once(shadowed, runtime, pixels, encode, caplog):
    def fail(images):
        if images.tolist() == pixels[:1].tolist():
            return runtime(images)
        raise BatchFailed("RuntimeError: no memory")

    with shadowed(Process(runtime, fail), max_batch=1) as client:
        running(client)
        card = send_in_turn(client, pixels[::-1], encode)
    assert (card["images"], card["failed"]) == (1, 4)
    said = [record.getMessage() for record in caplog.records if record.name == "serve.shadow.shadow"]
    assert [line for line in said if "fails" in line] == [
        "the shadow fails: RuntimeError: no memory; /metrics counts further failures"
    ]


def test_a_shadow_that_the_system_cannot_start_is_started_again(shadowed, runtime, monkeypatch, caplog):
    starts = [OSError(errno.ENOMEM, "Cannot allocate memory")]

    def start(process):
        if starts:
            raise starts.pop()
        return process

    monkeypatch.setattr(module, "start_process", start)
    monkeypatch.setattr(module, "_LONGEST_DELAY_S", 0.0)
    with shadowed(Process(runtime)) as client:
        running(client)
    assert "the shadow restarts in 0 s: [Errno 12] Cannot allocate memory" in caplog.messages


def test_probabilities_are_compared_with_probabilities(shadowed, runtime, pixels, encode):
    reading = SimpleNamespace(scores="probabilities")
    known = SimpleNamespace(model=replace(runtime.model, reading=reading, digest="other"))
    with shadowed(Process(known, lambda images: probabilities(runtime(images)))) as client:
        running(client)
        send(client, pixels, encode)
        card = card_when(client, lambda card: card["images"] == 5)
    assert card["agreement"]["value"] == 1
    assert card["largest_difference"] < 1e-5


def test_what_does_not_fit_is_said_by_field(runtime):
    served = runtime.model
    assert why_unfit(served, served) is None
    image = served.spec.image
    for fields, reason in (
        (
            {"image": replace(image, height=7)},
            "it takes images of 7x8x3, cut from a shorter side of 8, not of 8x8x3, cut from",
        ),
        (
            {"image": replace(image, resize=None)},
            "it takes images of 8x8x3, scaled to it, not of 8x8x3, cut from a shorter side of 8",
        ),
        ({"labels": ("a", "b")}, "it has 2 labels, not 10"),
        ({"labels": (*served.spec.labels[:9], "x")}, "its label 9 is 'x', not 'label 9'"),
    ):
        assert why_unfit(served, replace(served, spec=replace(served.spec, **fields))).startswith(reason)


def test_a_reload_to_other_labels_pauses_the_comparison(runtime, shadowed, pixels, encode, caplog):
    other = SimpleNamespace(model=replace(runtime.model, spec=replace(runtime.model.spec, labels=("a",) * 10)))
    with shadowed(Process(other, runtime)) as client:
        running(client)
        send(client, pixels, encode)
        assert client.get("/model").json()["shadow"]["images"] == 0
        assert client.get("/metrics").status_code == 200
        response = client.post("/admin/promote")
    assert "0 images were compared" in response.json()["detail"]
    assert "cannot shadow DiracNet-10-0.25: its label 0 is 'a', not 'label 0'" in caplog.text


def test_promotion_waits_for_its_figures_and_swaps_both(shadowed, runtime, other_runtime, pixels, encode):
    asked, swapped = [], []
    first, second = Process(other_runtime), Process(runtime)

    def load(digest):
        asked.append(digest)
        return [other_runtime if digest == other_runtime.model.digest else runtime]

    with shadowed(first, second, Process(other_runtime), load=load, take_over=lambda: swapped.append(1)) as client:
        running(client)
        send(client, pixels[:3], encode)
        card_when(client, lambda card: card["images"] == 3)
        refused = client.post("/admin/promote")
        assert refused.json()["type"] == "urn:diracnet:problem:not-compared"
        assert refused.json()["detail"] == (
            "3 images were compared of the 5 that --shadow-images asks for; 2 are missing, at a share of 1"
        )
        assert (asked, swapped) == ([], [])
        send(client, pixels[3:], encode)
        card_when(client, lambda card: card["images"] == 5)
        assert client.post("/admin/promote").json()["digest"] == other_runtime.model.digest
        answer = client.post("/predict", content=encode(pixels[0]), headers=PNG).json()
        assert answer["model"]["digest"] == other_runtime.model.digest
        assert answer["results"][0]["index"] == other_runtime(pixels[:1]).argmax()
        card = card_when(client, lambda card: card.get("digest") == runtime.model.digest)
        assert card["images"] <= 1  # a pair in the other order has its own figures,
        assert client.post("/admin/promote").json()["digest"] == runtime.model.digest  # and may go back at once
    assert asked == [other_runtime.model.digest, runtime.model.digest]
    assert swapped == [1, 1]


def test_a_promotion_that_fails_leaves_both_where_they_are(shadowed, runtime, other_runtime, pixels, encode):
    def load(digest):
        raise Refusal("other.onnx is another file than the one that was compared; reload to compare it")

    with shadowed(Process(other_runtime), load=load, take_over=lambda: pytest.fail("swapped")) as client:
        running(client)
        send(client, pixels, encode)
        card_when(client, lambda card: card["images"] == 5)
        response = client.post("/admin/promote")
        assert (response.status_code, response.json()["type"]) == (409, "urn:diracnet:problem:bad-model")
        assert client.get("/model").json()["digest"] == runtime.model.digest
        assert client.get("/model").json()["shadow"]["images"] == 5


def test_probabilities_are_compared_at_the_temperature_of_each_model(runtime, pixels):
    mine = replace(runtime.model, spec=replace(runtime.model.spec, temperature=0.5))
    theirs = replace(mine, digest="another", reading=SimpleNamespace(scores="probabilities"))
    comparison, logits = Comparison(mine, theirs), runtime(pixels)
    comparison.compare(logits, reference.softmax(logits, 0.5))
    assert comparison.summary()["largest_difference"] < 1e-12
    comparison.compare(logits, reference.softmax(logits))
    assert comparison.summary()["largest_difference"] > 0.01


def test_the_alerts_ask_for_what_is_there(runtime, other_runtime):
    families = [*Watch().collect(), *Comparison(runtime.model, other_runtime.model).metrics()]
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    shown = TestClient(make_app(runtime, Limits())).get("/metrics").text
    names |= set(re.findall(r"^diracnet_probe_\w+", shown, flags=re.MULTILINE))
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(r"diracnet_\w+", rule["expr"])}
    assert len(rules) == 5
    assert asked < names


def test_without_a_shadow_there_is_nothing_to_promote(runtime):
    app = make_app(runtime, Limits(), access=Access(b"key"), load=lambda: [runtime])
    with TestClient(app) as client:
        assert client.post("/admin/promote").status_code == 401
        response = client.post("/admin/promote", headers=KEY)
    assert (response.status_code, response.json()["type"]) == (409, "urn:diracnet:problem:not-compared")
    assert "start the server with --shadow" in response.json()["detail"]


def test_roles_are_shared_by_workers_and_a_reload_of_what_was_promoted_says_so(tmp_path, caplog):
    config = ServeConfig((tmp_path / "plain.onnx",), runtime="mnn", shadow=tmp_path / "other.onnx")
    first, second = Roles(config, tmp_path), Roles(config, tmp_path)
    assert (second.served.models, second.served.runtime) == (config.models, "mnn")
    assert (second.shadow.models, second.shadow.runtime) == ((config.shadow,), "auto")
    assert not caplog.text
    first.swap()
    assert second.served.models == (config.shadow,)
    assert "reading other.onnx, which was promoted; after a restart, the server serves plain.onnx again" in caplog.text
    assert (second.shadow.models, second.shadow.runtime) == (config.models, "mnn")
    second.swap()
    assert first.served.models == config.models
