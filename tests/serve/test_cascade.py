"""A cascade behind the server: its answers, what is counted, both files read again, and what is refused."""

import shutil
import signal
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from cascades import change, record, write_forms
from serving import ask, wait_for
from starlette.testclient import TestClient

from common.refusal import Refusal
from export.runtimes.cascade import Cascade, gaps, in_doubt, read_forms
from export.runtimes.onnx_session import OnnxSession
from serve.config import BUNDLED_FORMS, ServeConfig
from serve.model.check import check, warm_up
from serve.model.copies import copied, keep, kept
from serve.processes.serving import decide, load
from serve.request.app import make_app
from serve.request.limits import Limits


@pytest.fixture(scope="module")
def written(tmp_path_factory, make_net, make_spec, images):
    """For two nets: (plain.onnx, plain-int8.onnx), whose threshold half of the images of `pixels` are below."""
    pairs = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("forms")
        paths = write_forms(folder, make_net(seed=seed), make_spec(), images(24), plain_sha256=str(seed) * 64)
        threshold = float(np.median(gaps(OnnxSession(paths[1])(images(24)))))
        record(paths[1], threshold=threshold)
        pairs.append(paths)
    return pairs


@pytest.fixture
def forms(written, tmp_path):
    """Copies that a test may change."""
    return tuple(Path(shutil.copy(path, tmp_path)) for path in written[0])


@pytest.fixture
def cascade(forms):
    (runtime,) = load(ServeConfig(forms, cascade=True, runtime="onnxruntime"))
    return runtime


def test_it_proves_itself_and_both_forms_are_warm(cascade):
    check(cascade)
    before = cascade.num_images
    seen = {"quick": [], "exact": []}
    for name, sizes in seen.items():
        form = getattr(cascade, name)
        setattr(cascade, name, Spy(form, sizes))
    warm_up([cascade], 4)
    assert seen == {"quick": [1, 2, 4], "exact": [1, 2, 4]}
    assert cascade.num_images == before


class Spy:
    def __init__(self, runtime, sizes):
        self.model, self._runtime, self._sizes = runtime.model, runtime, sizes

    def __call__(self, images):
        self._sizes.append(len(images))
        return self._runtime(images)


def test_a_form_that_does_not_answer_as_it_recorded_is_refused(forms, written):
    shutil.copy(written[1][0], forms[0])  # float32 of another net, which says that it is of this one
    change(forms[0], lambda export: {**export, "plain_sha256": "0" * 64, "probe": {**export["probe"], "seed": 5}})
    with pytest.raises(Refusal, match=r"answers its probe images .* away from what its file recorded"):
        load(ServeConfig(forms, cascade=True, runtime="onnxruntime"))


def test_the_server_answers_with_the_form_that_is_sure_and_counts(cascade, forms, images, encode):
    exact, quick = map(OnnxSession, forms)
    pixels = images(24)
    doubtful = in_doubt(quick(pixels), cascade.evidence.threshold)
    assert 0 < doubtful.sum() < 24
    classes = np.where(doubtful, exact(pixels).argmax(1), quick(pixels).argmax(1))
    with TestClient(make_app(cascade, Limits())) as client:
        for image, index in zip(pixels, classes, strict=True):
            answer = client.post("/predict", content=encode(image)).json()
            assert answer["results"][0]["index"] == index
        assert answer["model"] == {"name": cascade.model.name, "digest": cascade.model.digest}
        lines = client.get("/metrics").text.splitlines()
        assert "diracnet_cascade_images_total 24.0" in lines  # probe images and warming up are no answers
        assert f"diracnet_cascade_escalated_total {float(doubtful.sum())}" in lines
        shown = client.get("/model").json()["provenance"]["cascade"]
    assert [form["digest"] for form in shown["forms"]] == [quick.model.digest, exact.model.digest]
    assert (shown["threshold"], shown["share_escalated"]) == (cascade.evidence.threshold, 0.25)


def test_no_cascade_counts_nothing(client, pixels, encode):
    client.post("/predict", content=encode(pixels[0]))
    assert "diracnet_cascade_images_total 0.0" in client.get("/metrics").text.splitlines()


def test_what_serves_is_decided_without_measuring_and_said(forms, capsys):
    config, reason = decide(ServeConfig(forms[::-1], cascade=True))
    assert (config.model_paths, config.runtime) == (forms[::-1], "onnxruntime")
    digests = [sha256(path.read_bytes()).hexdigest()[:12] for path in forms]
    assert reason.startswith(f"plain-int8.onnx ({digests[1]}), then plain.onnx ({digests[0]}): fp32 answers where")
    assert "25 % of 200 test images; of these 0 have another class than in fp32 (2 in int8 alone)" in reason
    assert not list(forms[0].parent.glob("*.runtime.json"))


def test_the_bundled_forms_are_a_cascade():
    assert {read_forms(BUNDLED_FORMS).quick, read_forms(BUNDLED_FORMS).exact} == set(BUNDLED_FORMS)


def test_what_cannot_be_a_cascade_is_refused(forms):
    for paths, options, message in (
        (forms[:1], {}, "a cascade takes two files"),
        ((forms[0], forms[0]), {}, r"is fp32; export both from one plain\.safetensors"),
        ((forms[0], forms[1].with_suffix(".engine")), {}, r"is not an \.onnx file"),
        ((forms[0], forms[1].with_name("missing.onnx")), {}, "No such file"),
        (forms, {"runtime": "mnn"}, "leave out --runtime mnn"),
    ):
        with pytest.raises(Refusal, match=message):
            decide(ServeConfig(paths, cascade=True, **options))


def test_a_cascade_has_no_shadow(forms):
    with pytest.raises(Refusal, match="--cascade serves two as one; leave out one of them"):
        ServeConfig(forms, cascade=True, shadow=forms[0])


def test_two_files_are_kept_together_even_where_they_have_one_name(forms, tmp_path):
    paths, home = [], tmp_path / "home"
    home.mkdir()
    for name, form in zip("ab", forms, strict=True):
        (tmp_path / name).mkdir()
        paths.append(Path(shutil.copy(form, tmp_path / name / "plain.onnx")))
    files = [path.read_bytes() for path in paths]
    assert files[0] != files[1]
    assert kept(home, paths) is None
    with copied(paths, home) as copies:
        assert [copy.read_bytes() for copy in copies] == files
        keep(home, copies, "digest")
    assert [path.read_bytes() for path in kept(home, paths)] == files
    with copied(paths, home) as copies:
        assert len(list(home.iterdir())) == 3
        keep(home, copies, "next")
    assert {path.name for path in home.iterdir()} == {"latest", "next"}  # of a model that served before, none is left
    kept(home, paths)[1].unlink()
    assert kept(home, paths) is None  # never one without the other
    assert len(list(home.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_keeps_both_files_together(start, forms, written, images, encode, workers):
    server = start(*forms, "--cascade", "--workers", workers)
    assert "plain-int8.onnx (" in server.greeting
    assert "fp32 answers where the two largest logits of int8 lie within" in server.greeting
    before = ask(server, encode(images(1)[0])).json()["model"]
    shutil.copy(written[1][1], forms[1])  # int8 of another net, and float32 not yet
    server.send_signal(signal.SIGHUP)
    line = wait_for(server, "the old model keeps serving: plain-int8.onnx and plain.onnx are not of one net")
    assert str(forms[0].parent) not in line
    assert ask(server, encode(images(1)[0])).json()["model"] == before
    shutil.copy(written[1][0], forms[0])
    server.send_signal(signal.SIGHUP)
    for _ in range(workers):
        wait_for(server, "now serving")
    found = read_forms(forms)
    expected = Cascade(OnnxSession(found.quick), OnnxSession(found.exact), found.evidence).model.digest
    assert ask(server, encode(images(1)[0])).json()["model"]["digest"] == expected != before["digest"]
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
