"""What an operator does to a server at the wrong time: signals before it serves, bad files, workers that are killed."""

import os
import re
import shutil
import signal
import sys

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from serving import PNG, ROOT, ask, read_greeting, read_line, until, wait_for, workers_of

from common.refusal import Refusal
from serve.config import ServeConfig
from serve.model.process import ModelProcess

# serve/run.py with a `load_runtime` that says when it is called and waits for a line, or a model that hangs.
SLOW = """
import runpy, sys, threading
sys.path.insert(0, sys.argv[1])
from common import cli
run_command, how = cli.run_command, sys.argv[2]

class Hanging:
    def __init__(self, runtime):
        self.runtime = runtime
    def __call__(self, images):
        if not images.any():  # as they are when every batch size is run once
            print("hangs", flush=True)
            threading.Event().wait()
        return self.runtime(images)
    def __getattr__(self, name):
        return getattr(self.runtime, name)

def run(*args, **options):  # once serve/run.py has run its first instruction
    from serve.model import load as module
    load = module.load_runtime

    def wait(path, **options):
        print("loads", flush=True)
        sys.stdin.readline()
        return load(path, **options)

    module.load_runtime = {"wait": wait, "hang": lambda path, **options: Hanging(load(path, **options))}[how]
    return run_command(*args, **options)

cli.run_command = run
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def slow(how, artefact, *argv):
    run = [ROOT / "serve" / "run.py", artefact, "--runtime", "onnxruntime", "--port", 0, *argv]
    return [sys.executable, "-c", SLOW, str(ROOT), how, *map(str, run)]


@pytest.mark.slow
def test_sigterm_ends_a_server_that_has_not_read_its_model(start, artefact):
    server = start(program=slow("wait", artefact), waits=False, stdin=-1)
    assert read_line(server) == "loads\n"
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_whose_model_hangs_when_it_is_first_run(start, artefact, end):
    server = start(program=slow("hang", artefact), waits=False)
    assert read_line(server) == "hangs\n"
    server.send_signal(end)
    assert server.wait(60) == -end


@pytest.mark.slow
def test_a_hangup_before_the_model_is_read_is_heeded_when_it_serves(start, artefact, pixels, encode):
    server = start(program=slow("wait", artefact), waits=False, stdin=-1)
    assert read_line(server) == "loads\n"
    server.send_signal(signal.SIGHUP)
    server.stdin.write("\n\n")  # for this time and for the reload
    server.stdin.flush()
    read_greeting(server)
    wait_for(server, "now serving DiracNet-10-0.25")
    assert ask(server, encode(pixels[0])).status_code == 200


@pytest.mark.slow
def test_workers_that_hang_at_their_start_do_not_keep_the_supervisor(start, endless):
    server = start(endless, "--workers", 2, waits=False)
    until(lambda: server.poll() or len(workers_of(server)) == 2)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


def connections_limit(server):
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("diracnet_connections_limit "))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_bytes(b"no model")])
def test_a_killed_worker_comes_back_with_the_model_that_served_last(start, artefact, pixels, encode, damage):
    server, file = start(artefact, "--workers", 2), encode(pixels[0])
    before, limit = ask(server, file).json(), connections_limit(server)
    damage(artefact)
    for worker in workers_of(server):  # one after the other: the second serves until the first is back
        os.kill(worker, signal.SIGKILL)
        wait_for(server, " died")
        wait_for(server, " serves")
    assert ask(server, file).json() == before
    assert connections_limit(server) == limit  # summed over the living
    server.send_signal(signal.SIGHUP)
    for _ in range(2):
        wait_for(server, "the old model keeps serving")
    assert ask(server, file).json() == before
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


@pytest.mark.slow
def test_a_worker_comes_back_with_what_was_reloaded_last(start, artefact, other_artefact, pixels, encode):
    server, file = start(artefact, "--workers", 2), encode(pixels[0])
    shutil.copy(other_artefact, artefact)
    server.send_signal(signal.SIGHUP)
    for _ in range(2):
        wait_for(server, "now serving")
    after = ask(server, file).json()
    artefact.unlink()
    for worker in workers_of(server):
        os.kill(worker, signal.SIGKILL)
        wait_for(server, " died")
        wait_for(server, " serves")
    assert ask(server, file).json() == after


@pytest.mark.slow
def test_a_healthy_worker_goes_on_alone_and_only_the_last_ends_the_server(start, artefact, pixels, encode, tmp_path):
    kept = tmp_path / "temporary"
    kept.mkdir()
    server = start(artefact, "--workers", 2, env={**os.environ, "TMPDIR": str(kept)})
    file, (first, last) = encode(pixels[0]), workers_of(server)
    artefact.unlink()
    for copy in kept.glob("diracnet-workers-*/model/*"):
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    os.kill(first, signal.SIGKILL)
    waits = [float(re.search(r"in (\d+) s", wait_for(server, "another starts in")).group(1)) for _ in range(2)]
    assert waits[1] == 2 * waits[0]
    assert ask(server, file).status_code == 200
    os.kill(last, signal.SIGKILL)
    wait_for(server, "no worker serves, and none can start")
    assert server.wait(60) == 2


@pytest.fixture
def endless(tmp_path):
    """A classifier whose Loop has no end."""
    kind, shape = TensorProto, ["N", 3, 8, 8]
    half = numpy_helper.from_array(np.float32(0.5), "half")
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Mul", ["y", "half"], ["less"])],
        "body",
        [value("turn", kind.INT64, []), value("go", kind.BOOL, []), value("y", kind.FLOAT, None)],
        [value("on", kind.BOOL, []), value("less", kind.FLOAT, None)],
        [half],
    )
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Loop", ["", "true", "mean"], ["scores"], body=body),
    ]
    true = numpy_helper.from_array(np.array(True), "true")
    outputs = [value("scores", kind.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "endless", [value("x", kind.FLOAT, shape)], outputs, [true])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "endless.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.slow
def test_a_model_that_hangs_is_given_up_and_the_next_one_is_served(
    start, artefact, other_artefact, endless, pixels, encode
):
    server, file = start(artefact, "--reload-seconds", 2), encode(pixels[0])
    before = ask(server, file).json()
    shutil.copy(endless, artefact)
    server.send_signal(signal.SIGHUP)
    line = wait_for(server, "the old model keeps serving: plain.onnx cannot be loaded: its process does not answer")
    assert str(artefact.parent) not in line
    assert ask(server, file).json() == before
    shutil.copy(other_artefact, artefact)
    server.send_signal(signal.SIGHUP)
    # Under load a good model may take its two seconds too: what matters is that its turn comes.
    assert next(line for line in server.stderr if re.search("now serving|does not answer within", line))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_does_not_wait_for_a_model_that_hangs(start, artefact, endless, pixels, encode, workers, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    server = start(artefact, "--workers", workers, "--drain-seconds", 1, env={**os.environ, "TMPDIR": str(copies)})
    shutil.copy(endless, artefact)
    server.send_signal(signal.SIGHUP)
    for _ in range(workers):
        wait_for(server, "reading the model's file again")
    assert ask(server, encode(pixels[0])).status_code == 200
    until(lambda: len([*copies.rglob("diracnet-model-*/0/*.onnx")]) == workers)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert [*copies.iterdir()] == []
    server.stderr.read()  # ends when the last process that may write does: no trial is left behind


def test_a_model_that_crashes_is_refused_with_the_status_of_the_process_that_tried_it(artefact, monkeypatch):
    monkeypatch.setattr("common.child.PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        Refusal, match=r"plain\.onnx cannot be loaded: its process ended with status -9; export it again"
    ):
        ModelProcess(ServeConfig((artefact,)))


@pytest.mark.slow
def test_what_a_trial_refuses_is_said_in_its_words(tmp_path, artefact):
    with ModelProcess(ServeConfig((artefact,), runtime="onnxruntime", mean=(), max_batch=2)):
        pass
    path = tmp_path / "text.onnx"
    path.write_text("hello")
    with pytest.raises(Refusal, match=r"^text\.onnx is not a valid ONNX file"):
        ModelProcess(ServeConfig((path,)))


@pytest.mark.slow
def test_a_log_that_nobody_reads_keeps_no_request_from_its_answer(start, artefact, pixels, encode):
    """800 lines are more than a pipe holds."""
    server, file = start(artefact), encode(pixels[0])
    with httpx.Client() as client:
        for _ in range(800):
            answer = client.post(f"{server.url}/predict", content=file, headers=PNG, timeout=60)
            assert answer.status_code == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


@pytest.mark.slow
def test_a_server_whose_log_cannot_be_written_answers(start, artefact, pixels, encode):
    with open("/dev/full", "w") as full:
        server = start(artefact, stderr=full)
        for _ in range(3):
            assert ask(server, encode(pixels[0])).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
