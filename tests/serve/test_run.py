"""The commands, as processes, over real HTTP."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(name, *argv):
    return [sys.executable, str(ROOT / "serve" / name), *map(str, argv)]


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_says_where_it_is_answers_and_stops(artefact, pixels, encode, end):
    server = subprocess.Popen(
        command("run.py", artefact, "--port", 0), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout.readline().startswith("DiracNet-10-0.25")
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline()).group()
        response = httpx.post(f"{url}/predict", content=encode(pixels[0]), headers={"Content-Type": "image/png"})
        assert response.json()["results"][0]["label"].startswith("label ")
    finally:
        server.send_signal(end)
        output, error = server.communicate(timeout=30)
    assert error == ""
    assert "stopped" in output or end == signal.SIGTERM
    assert server.returncode in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_what_cannot_be_served_is_one_line(artefact, tmp_path, taken_port):
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        ([artefact, "--port", taken_port], f"cannot listen on 127.0.0.1 port {taken_port}: address already in use"),
        ([artefact, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        ([artefact, "--port", 99999], "cannot listen on 127.0.0.1 port 99999"),
        ([tmp_path / "text.onnx", "--port", 0], "cannot be loaded as an ONNX model"),
        ([tmp_path / "missing.onnx", "--port", 0], "No such file"),
    ):
        done = subprocess.run(command("run.py", *argv), capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_demo_starts_asks_and_stops(artefact, tmp_path, pixels, encode, taken_port):
    folder = tmp_path / "held-out"
    folder.mkdir()
    for index in range(10):  # whatever the net says of one image, one of ten labels is right
        (folder / f"label {index}_{index}.png").write_bytes(encode(pixels[0]))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):  # the second run replaces the first one's server
        done = subprocess.run(
            command("demo.py", artefact, "--images", folder, "--port", port), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "\n1 of 10 right\n" in done.stdout
        assert f"http://127.0.0.1:{port}" in done.stdout
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    stop = command("demo.py", artefact, "--stop")
    assert "stopped the server" in subprocess.run(stop, capture_output=True, text=True).stdout
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")
    again = subprocess.run(stop, capture_output=True, text=True)
    assert (again.returncode, "no server" in again.stdout) == (0, True)
    failed = subprocess.run(
        command("demo.py", artefact, "--images", folder, "--port", taken_port), capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "the server did not start: cannot listen on" in failed.stderr
    assert not (tmp_path / "server.pid").exists()


def test_a_foreign_process_with_the_old_number_is_left_alone(artefact, tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "server.pid").write_text(str(bystander.pid))
    done = subprocess.run(command("demo.py", artefact, "--stop"), capture_output=True, text=True)
    assert "no server" in done.stdout
    assert bystander.poll() is None
    bystander.communicate(b"\n")


def test_softmax_is_stable_for_large_logits():
    from serve.answer import softmax

    np.testing.assert_allclose(softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]])), [[1, 0], [0.5, 0.5]])
