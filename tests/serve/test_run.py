"""The commands, as processes, over real HTTP."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from foreign import SAID, SHEET, net, split, write
from serving import ROOT, ask, children_of, command, read_line, until, wait_for, workers_of


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def half_sent(server, file):
    """A connection whose request the server has begun to read."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        lines = ("POST /predict HTTP/1.1", "Host: a", f"Content-Length: {len(file)}", "Expect: 100-continue", "", "")
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(file[:10])
        yield connection


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_says_where_it_is_answers_and_stops(start, artefact, pixels, encode, end):
    server = start(artefact)
    assert server.greeting.startswith("DiracNet-10-0.25")
    response = ask(server, encode(pixels[0]))
    assert response.json()["results"][0]["label"].startswith("label ")
    assert "server" not in response.headers
    server.send_signal(end)
    output, error = server.communicate(timeout=60)
    (line,) = error.splitlines()
    assert json.loads(line)["id"] == response.headers["x-request-id"]
    assert ("stopped" in output) == (end == signal.SIGINT)
    assert server.returncode == 0


@pytest.mark.slow
def test_sigterm_waits_for_what_was_begun(start, artefact, pixels, encode):
    server, file = start(artefact, "--log-level", "error"), encode(pixels[0])
    with half_sent(server, file) as connection:
        server.send_signal(signal.SIGTERM)
        connection.sendall(file[10:])
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert server.wait(60) == 0


@pytest.mark.slow
def test_sigterm_waits_no_longer_than_it_was_told(start, artefact, pixels, encode):
    server = start(artefact, "--drain-seconds", 1)
    with half_sent(server, encode(pixels[0])) as connection:
        server.send_signal(signal.SIGTERM)
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert server.wait(60) == 0


HANGING = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from export.runtimes.onnx_session import OnnxSession
from serve import run
from serve.model import load

class Hanging(OnnxSession):
    def __call__(self, images):
        if images.min() == 255:
            print("hangs", flush=True)
            threading.Event().wait()
        return super().__call__(images)

load.load_runtime = lambda path, **options: Hanging(path)
config = run.ServeConfig((Path(sys.argv[2]),), runtime="onnxruntime", port=0, drain_seconds=1, deadline_ms=60_000)
sys.exit(run.serve(config))
"""


@pytest.mark.slow
def test_a_model_that_hangs_does_not_keep_the_server(start, artefact, encode):
    server = start(program=[sys.executable, "-c", HANGING, str(ROOT), str(artefact)])
    white = encode(np.full((8, 8, 3), 255, np.uint8))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(white)}\r\n\r\n".encode())
        connection.sendall(white)
        assert read_line(server) == "hangs\n"
        server.send_signal(signal.SIGTERM)
        assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert server.wait(60) == 0


@pytest.mark.slow
def test_workers_count_together(start, artefact, pixels, encode):
    server, file, num_requests = start(artefact, "--workers", 2), encode(pixels[0]), 12
    for _ in range(num_requests):  # each on a connection of its own, for whichever worker takes it
        ask(server, file)
    for _ in range(num_requests):
        wait_for(server, "POST /predict")  # logged once it is counted
    for _ in range(2):
        lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
        assert f'diracnet_requests_total{{path="/predict",status="200"}} {num_requests}.0' in lines
        assert f'diracnet_predict_seconds_count{{stage="total"}} {num_requests}.0' in lines
        assert "diracnet_queue_images 0.0" in lines
        digest = sha256(artefact.read_bytes()).hexdigest()
        assert f'diracnet_answered_images_total{{digest="{digest}"}} {num_requests}.0' in lines
        assert any(line.startswith("diracnet_model_info{") for line in lines)


@pytest.mark.slow
def test_lines_that_the_log_does_not_take_are_counted(start, artefact, pixels, encode):
    with open("/dev/full", "w") as full:
        server = start(artefact, stderr=full)
    assert ask(server, encode(pixels[0])).status_code == 200
    count = re.compile(r"^diracnet_log_lines_dropped_total ([1-9].*)", re.MULTILINE)
    assert until(lambda: count.search(httpx.get(f"{server.url}/metrics", timeout=60).text))


@pytest.mark.slow
def test_the_report_beside_a_model_is_shown_where_it_is_of_this_file(start, artefact):
    digest = sha256(artefact.read_bytes()).hexdigest()
    row = {"images": "real", "num_images": 9, "relative": 1e-6, "top1_agreement": 1.0, "within_tolerance": True}
    report = {"artefacts": {"plain.onnx": digest}, "parity": [{**row, "candidate": "/secret/plain.onnx"}]}
    artefact.with_suffix(".json").write_text(json.dumps(report))
    server = start(artefact)
    assert re.search(r" on ONNX Runtime, \w+ \(onnxruntime [\d.]+\)", server.greeting)
    card = httpx.get(f"{server.url}/model", timeout=60).json()
    assert card["provenance"]["parity"] == [row]
    assert card["file_bytes"] == artefact.stat().st_size
    assert card["runtime"].startswith("ONNX Runtime, ")


@pytest.mark.slow
def test_sighup_reads_the_file_again_and_keeps_the_old_model_if_it_is_bad(
    start, artefact, other_artefact, pixels, encode
):
    server, file = start(artefact), encode(pixels[0])
    before = ask(server, file).json()["model"]["digest"]
    artefact.write_bytes(other_artefact.read_bytes())
    server.send_signal(signal.SIGHUP)
    wait_for(server, "now serving DiracNet-10-0.25")
    after = ask(server, file).json()["model"]["digest"]
    assert before != after == sha256(other_artefact.read_bytes()).hexdigest()
    artefact.write_bytes(b"no model")
    server.send_signal(signal.SIGHUP)
    line = wait_for(server, "the old model keeps serving: plain.onnx is not a valid ONNX file")
    assert str(artefact.parent) not in line
    assert ask(server, file).json()["model"]["digest"] == after


@pytest.mark.slow
def test_sighup_sees_that_weights_in_a_file_of_their_own_have_changed(start, tmp_path, encode):
    """The .onnx stays byte for byte as it is."""
    sample, other = SHEET["external data"](tmp_path), write(tmp_path, "other", net(seed=2))
    split(other.path)
    graph = sample.path.read_bytes()
    server, file = start(sample.path, *SAID), encode(sample.images[0])
    before = ask(server, file).json()
    shutil.copy(tmp_path / "other.onnx.data", tmp_path / "external.onnx.data")
    server.send_signal(signal.SIGHUP)
    wait_for(server, "now serving external")
    after = ask(server, file).json()
    assert sample.path.read_bytes() == graph
    assert before["model"]["digest"] != after["model"]["digest"]
    for answer, expected in ((before, sample), (after, other)):
        assert answer["results"][0]["index"] == expected.probabilities[0].argmax()
        assert answer["results"][0]["probability"] == pytest.approx(expected.probabilities[0].max(), abs=1e-4)


@pytest.mark.slow
def test_a_choice_is_measured_once_kept_and_survives_a_reload(start, artefact, other_artefact, pixels, encode):
    server = start(artefact, "--runtime", "auto")
    reason = r": plain\.onnx on (onnxruntime|mnn) is \d+\.\dx the next of 2, "
    assert re.search(reason + r"kept in .*plain\.onnx\.runtime\.json\n", server.greeting)
    artefact.write_bytes(other_artefact.read_bytes())
    server.send_signal(signal.SIGHUP)
    wait_for(server, "now serving DiracNet-10-0.25")
    assert ask(server, encode(pixels[0])).json()["model"]["digest"] == sha256(artefact.read_bytes()).hexdigest()
    before = start(artefact, "--runtime", "auto", "--workers", 2)
    measured = re.match(r"2 workers" + reason + "kept in ", before.greeting)  # another file, other threads
    again = start(artefact, "--runtime", "auto", "--workers", 2)
    chosen = re.match(r"2 workers" + reason + "as .* says", again.greeting).group(1)
    assert chosen == measured.group(1)
    if sys.platform == "linux":
        for process in workers_of(again):
            has_session = "onnxruntime/capi" in Path(f"/proc/{process}/maps").read_text()
            assert (has_session, bool(children_of(process, "mnn_module"))) == (chosen == "onnxruntime", chosen == "mnn")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes a server has started")
def test_processes_of_mnn_are_replaced_when_they_die_and_end_with_their_model(start, artefact, pixels, encode):
    server, file = start(artefact, "--runtime", "mnn", "--model-threads", 2), encode(pixels[0])
    assert "on MNN, 2 processes (MNN 3." in server.greeting
    before, ends = set(), []

    def processes():
        """The two of the model that serves, once those of the one before have ended."""
        found = children_of(server.pid, "mnn_module")
        return len(found) == 2 and not before & {*found} and found

    for _ in range(3):
        before.update(found := until(processes))
        ends += map(os.pidfd_open, found)
        server.send_signal(signal.SIGHUP)
        wait_for(server, "now serving")
        assert ask(server, file).status_code == 200
    before.update(found := until(processes))
    os.kill(found[0], signal.SIGKILL)
    failed, answered = ask(server, file), ask(server, file)
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:diracnet:problem:internal")
    assert answered.status_code == 200
    assert "a process of MNN ended with status -9" in wait_for(server, "ProcessFailed")
    ends += map(os.pidfd_open, until(processes))
    assert len(ends) == 8
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    for end in ends:
        assert select.select([end], [], [], 60)[0], "a process of MNN has outlived its model"
        os.close(end)


@pytest.mark.slow
def test_workers_share_a_port_are_replaced_and_reload(start, artefact, other_artefact, pixels, encode):
    server, file = start(artefact, "--workers", 2), encode(pixels[0])
    assert server.greeting == "2 workers\n"
    for worker in workers_of(server):
        os.kill(worker, signal.SIGKILL)
    for _ in range(2):
        wait_for(server, " died")
    assert ask(server, file).status_code == 200  # by one that took the place of a killed one
    artefact.write_bytes(other_artefact.read_bytes())
    wait_for(server, "POST /predict")  # so one worker at least heeds signals
    server.send_signal(signal.SIGHUP)
    wait_for(server, "now serving DiracNet-10-0.25")
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_workers_end_with_their_supervisor(start, artefact):
    server = start(artefact, "--workers", 2)
    server.kill()
    server.communicate(timeout=60)  # its pipes close when the last of its workers has ended


@pytest.mark.slow
def test_one_reload_reaches_all_workers(start, artefact, other_artefact, tmp_path):
    key = tmp_path / "key"
    key.write_text("key")
    server = start(artefact, "--workers", 2, "--api-key-file", key)
    artefact.write_bytes(other_artefact.read_bytes())
    response = httpx.post(f"{server.url}/admin/reload", headers={"X-Api-Key": "key"}, timeout=60)
    assert response.json()["digest"] == sha256(other_artefact.read_bytes()).hexdigest()
    for _ in range(3):  # the worker that was asked, and then both
        wait_for(server, "now serving")


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(artefact, tmp_path, taken_port):
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        ([artefact, "--port", taken_port], f"cannot listen on 127.0.0.1 port {taken_port}: address already in use"),
        ([artefact, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        ([artefact, "--port", 99999], "cannot listen on 127.0.0.1 port 99999"),
        ([tmp_path / "text.onnx", "--port", 0], "is not a valid ONNX file"),
        ([tmp_path / "missing.onnx", "--port", 0], "No such file"),
        ([artefact, "--port", 0, "--max-queue", 3], "max_queue must hold one request of 64 images, got 3"),
        ([artefact, "--port", 0, "--runtime", "openvino"], "invalid choice: 'openvino' (choose from "),
        ([artefact, "--port", 0, "--runtime", "tensorrt"], "tensorrt does not run plain.onnx; .onnx files are for"),
        ([artefact, tmp_path / "text.onnx", "--port", 0], "text.onnx is not a valid ONNX file"),
        ([artefact, "--port", 0, "--runtime", "mnn", "--devices", 0], "MNN runs only on the CPU; leave device 0 out"),
        ([artefact, "--port", 0, "--workers", 0], "--workers must be 1 or more, got 0"),
        ([artefact, "--port", 0, "--max-held-mb", "inf"], "--max-held-mb and --max-decoded-mb must be finite numbers"),
        ([artefact, "--port", 0, "--max-body-mb", "nan"], "--max-held-mb and --max-decoded-mb must be finite numbers"),
        ([artefact, "--port", 0, "--devices", 0, 1], "ONNX Runtime finds no CUDA device 0 here"),
        ([artefact, "--port", 0, "--api-key-file", tmp_path / "text.onnx", "--max-batch", 0], "max_batch must be"),
    ):
        done = subprocess.run(command("run.py", *argv), capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_supervisor(tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    argv = command("run.py", tmp_path / "text.onnx", "--port", 0, "--workers", 2)
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: text.onnx is not a valid ONNX file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_starts_asks_and_stops(artefact, tmp_path, pixels, encode, taken_port, port):
    folder = tmp_path / "held-out"
    folder.mkdir()
    for index in range(10):  # whatever the net says of one image, one of ten labels is right
        (folder / f"label {index}_{index}.png").write_bytes(encode(pixels[0]))
    for _ in range(2):  # the second run replaces the first one's server
        done = subprocess.run(
            command("demo.py", artefact, "--images", folder, "--port", port), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "\n1 of 10 right\n" in done.stdout
        assert f"http://127.0.0.1:{port}" in done.stdout
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code == 200
    stop = command("demo.py", artefact, "--stop")
    assert "stopped the server" in subprocess.run(stop, capture_output=True, text=True).stdout
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60)
    again = subprocess.run(stop, capture_output=True, text=True)
    assert (again.returncode, "no server" in again.stdout) == (0, True)
    failed = subprocess.run(
        command("demo.py", artefact, "--images", folder, "--port", taken_port), capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: cannot listen on 127.0.0.1 port")
    assert not (tmp_path / "server.pid").exists()


def test_a_foreign_process_with_the_old_number_is_left_alone(artefact, tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "server.pid").write_text(str(bystander.pid))
    done = subprocess.run(command("demo.py", artefact, "--stop"), capture_output=True, text=True)
    assert "no server" in done.stdout
    assert bystander.poll() is None
    bystander.communicate(b"\n")


def test_softmax_is_stable_for_large_logits():
    from export.runtimes.runtime import probabilities

    np.testing.assert_allclose(probabilities(np.array([[1000.0, 0.0], [-1000.0, -1000.0]])), [[1, 0], [0.5, 0.5]])
