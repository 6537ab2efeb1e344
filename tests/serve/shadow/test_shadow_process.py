"""A shadow in its process: loaded, killed, promoted by real servers, and refused before anything is served."""

import os
import shutil
import signal
import subprocess
from dataclasses import replace
from hashlib import sha256
from multiprocessing import Pipe

import httpx
import numpy as np
import pytest
from serving import PNG, children_of, command, patience, until, wait_for, workers_of
from shadows import running, send

from common.child import Child, ProcessFailed
from common.refusal import Refusal
from export.graphs.graph import to_onnx
from fold.graph import fold
from serve.config import ServeConfig
from serve.model.process import BatchFailed, ModelProcess
from serve.model.worker import answer_batch
from serve.shadow.shadow import start_process

KEY = {"X-Api-Key": "key"}


@pytest.fixture
def config(artefact, other_artefact):
    return ServeConfig((artefact,), runtime="onnxruntime", shadow=other_artefact, max_batch=2)


@pytest.mark.slow
def test_a_process_answers_as_the_model_here_and_says_what_it_is(config, runtime, pixels):
    with start_process(config) as process:
        assert (process.model, process.description) == (runtime.model, runtime.description)
        seconds, logits = process.ask(pixels[:2], 60)
        assert seconds > 0
        assert np.array_equal(logits, runtime(pixels[:2]))


def test_what_a_model_raises_is_told_and_a_process_goes_on(pixels):
    def fail(images):
        raise RuntimeError("no\nmemory")

    assert answer_batch(fail, pixels) == (0, "RuntimeError: no memory")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((0.0, "RuntimeError: no memory"), "RuntimeError: no memory"),
        ((0.1, np.zeros((2, 9), np.float32)), r"it gives logits \[2, 9\], not \[2, 10\]"),
        ((0.1, np.zeros(20, np.float32)), r"it gives logits \[20\], not \[2, 10\]"),
    ],
)
def test_a_batch_without_logits_of_all_its_images_has_failed(runtime, pixels, answer, reason):
    process = ModelProcess.__new__(ModelProcess)
    process.model = runtime.model
    process._child = Child.__new__(Child)
    process._child._connection, worker = Pipe()
    with process._child._connection, worker:
        worker.send(answer)
        with pytest.raises(BatchFailed, match=reason):
            process.ask(pixels[:2], 60)


@pytest.mark.slow
def test_a_process_that_is_killed_or_stands_still_is_given_up(config, pixels):
    with start_process(config) as process:
        process.kill()
        with pytest.raises(ProcessFailed, match="ended with status -9"):
            process.ask(pixels[:1], 60)
    with start_process(config) as process:
        os.kill(process._child.process.pid, signal.SIGSTOP)
        with pytest.raises(ProcessFailed, match=r"does not answer within 0\.01 s"):
            process.ask(pixels[:1], 0.01)


@pytest.mark.slow
def test_what_a_process_refuses_is_said_in_its_words(config, tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("hello")
    with pytest.raises(Refusal, match=r"^text\.onnx is not a valid ONNX file"):
        ModelProcess(replace(config, models=(path,)))


@pytest.fixture
def start_shadowed(start, artefact, other_artefact, tmp_path):
    """A server with a shadow that is compared on every image, and promoted after two."""
    key = tmp_path / "key"
    key.write_text("key")

    def start_shadowed(*argv):
        shadow = ("--shadow", other_artefact, "--shadow-share", 1, "--shadow-images", 2)
        server = start(artefact, "--api-key-file", key, *shadow, *argv)
        return server, httpx.Client(base_url=server.url, headers=KEY, timeout=120)

    return start_shadowed


def compare_two(client, pixels, encode):
    """Two images more are compared, by whichever worker takes them; `dropped` while it is not there."""
    before = running(client)["images"]

    def are_compared():
        send(client, pixels[:1], encode)
        return client.get("/model").json()["shadow"].get("images", 0) >= before + 2

    until(are_compared)


def until_served(server, num):
    """The log until a model has been swapped in so many times more."""
    lines = []
    with patience(server):
        while sum("now serving" in line for line in lines) < num:
            lines.append(server.stderr.readline())
            assert lines[-1], lines
    return "".join(lines)


@pytest.mark.slow
def test_a_shadow_that_is_killed_comes_back_and_goes_on_counting(start_shadowed, pixels, encode):
    server, client = start_shadowed()
    with client:
        compare_two(client, pixels, encode)
        before = client.get("/model").json()["shadow"]["images"]
        (process,) = children_of(server.pid, "model.worker")
        os.kill(process, signal.SIGKILL)

        def is_replaced():  # once an image finds it gone
            send(client, pixels[:1], encode)
            return children_of(server.pid, "model.worker") not in ([], [process])

        until(is_replaced)
        compare_two(client, pixels, encode)
        card = client.get("/model").json()["shadow"]
    assert card["images"] >= before + 2
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    server.stderr.read()  # ends when the last process that may write does


@pytest.mark.slow
def test_a_file_that_changed_since_it_was_compared_is_not_promoted(
    start_shadowed, artefact, other_artefact, pixels, encode
):
    _, client = start_shadowed()
    with client:
        compare_two(client, pixels, encode)
        shutil.copy(artefact, other_artefact)
        detail = client.post("/admin/promote").json()["detail"]
        assert detail == "other.onnx is another file than the one that was compared; reload to compare it"
        assert client.get("/model").json()["digest"] == sha256(artefact.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_promotion_reaches_all_workers_and_outlives_hangups_and_kills(
    start_shadowed, artefact, other_artefact, pixels, encode, workers
):
    digest = sha256(other_artefact.read_bytes()).hexdigest()
    server, client = start_shadowed("--workers", workers)
    with client:
        compare_two(client, pixels, encode)
        assert client.post("/admin/promote").json()["digest"] == digest
        until_served(server, 1 if workers == 1 else 3)  # by the worker that was asked, and then as after a reload
        server.send_signal(signal.SIGHUP)
        said = until_served(server, workers)
        assert "reading other.onnx, which was promoted; after a restart, the server serves plain.onnx again" in said
        assert digest in said
        answer = client.post("/predict", content=encode(pixels[0]), headers=PNG).json()
        assert answer["model"]["digest"] == digest
        for worker in workers_of(server) if workers > 1 else []:
            os.kill(worker, signal.SIGKILL)
            wait_for(server, " died")
        if workers > 1:
            assert client.get("/model").json()["digest"] == digest
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


@pytest.mark.slow
def test_a_shadow_that_cannot_be_one_is_one_line_before_anything_is_served(artefact, tmp_path, make_net, make_spec):
    other = tmp_path / "five.onnx"
    fields = {"num_labels": 5}
    other.write_bytes(to_onnx(fold(make_net(**fields)), make_spec(**fields), {"training": {}}).SerializeToString())
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        (["--shadow", other], "cannot shadow DiracNet-10-0.25: it has 5 labels, not 10; export it for the same images"),
        (["--shadow", other, "--workers", 2], "cannot shadow DiracNet-10-0.25: it has 5 labels, not 10"),
        (["--shadow", tmp_path / "text.onnx"], "text.onnx is not a valid ONNX file"),
        (["--shadow", tmp_path / "missing.onnx"], "cannot read missing.onnx: No such file"),
        (["--shadow", other, "--shadow-share", 0], "--shadow-share must be above 0 and at most 1, got 0"),
        (["--shadow", other, "--shadow-share", "nan"], "--shadow-share must be above 0 and at most 1, got nan"),
        (["--shadow", other, "--shadow-images", 0], "--shadow-images must be 1 or more, got 0"),
    ):
        line = command("run.py", artefact, "--runtime", "onnxruntime", "--port", 0, *argv)
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
