"""Front ends and device processes as an operator has them: killed, reloaded, drained."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from hashlib import sha256

import httpx
import numpy as np
import pytest
from held_model import PROGRAM
from serving import PNG, ROOT, ask, command, read_greeting, read_line, until, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="front ends need Linux"),
]

PATIENT = ("--deadline-ms", "100000")  # requests wait for a process that is replaced, however long that takes


@pytest.fixture
def front_ends(start, artefact):
    """`front_ends(*argv)`: a server with two of them, whose processes are in its `fronts` and `device`."""

    def start_them(*argv, **options):
        server = start(artefact, "--front-ends", 2, *PATIENT, *argv, **options)
        find_processes(server)
        return server

    return start_them


def find_processes(server):
    """By what the log says until all serve."""
    server.fronts, server.device = [], None
    while len(server.fronts) < 2 or not server.device:
        what, pid = re.search(r"(front end|device process) (\d+) serves", wait_for(server, " serves")).groups()
        if what == "front end":
            server.fronts.append(int(pid))
        else:
            server.device = int(pid)


@pytest.fixture
def held(start, artefact, tmp_path, encode):
    """The same with a model that stops at `server.white` until `server.let_go()`."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    argv = [str(artefact), "--front-ends", "2", "--port", "0", "--runtime", "onnxruntime", *PATIENT]
    server = start(program=[sys.executable, "-c", PROGRAM, str(ROOT), str(fifo), *argv], waits=False)
    read_greeting(server)
    find_processes(server)
    server.white = encode(np.full((8, 8, 3), 255, np.uint8))
    server.let_go = lambda: fifo.write_text("go")
    return server


def asked(client, server, file):
    """A thread that asks, and the list of its answer, or of what went wrong."""
    answers = []

    def run():
        try:
            answers.append(client.post(f"{server.url}/predict", content=file, headers=PNG, timeout=60))
        except httpx.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_front_ends_answer_and_count_together(front_ends, pixels, encode):
    server, num_requests = front_ends("--probe-every", 0), 12  # probes are batches too
    assert server.greeting == "2 front ends, 1 device process\n"
    ids = set()
    for _ in range(num_requests):  # each on a connection of its own, for whichever front end takes it
        answer = ask(server, encode(pixels[0]))
        assert answer.status_code == 200
        ids.add(answer.headers["x-request-id"].partition("-")[0])
    for _ in range(num_requests):
        wait_for(server, "POST /predict")
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    assert f'diracnet_requests_total{{path="/predict",status="200"}} {num_requests}.0' in lines
    assert "diracnet_queue_images 0.0" in lines
    (answered,) = [line for line in lines if line.startswith("diracnet_answered_images_total{")]
    assert answered.endswith(f" {num_requests}.0")
    assert "diracnet_connections_limit 4096.0" in lines
    (batches,) = [float(line.split()[1]) for line in lines if line.startswith("diracnet_batch_images_sum ")]
    warm_up = 2 * (1 + 2 + 4 + 8 + 16 + 32)  # of each front end, through its own way to the model
    assert batches == num_requests + warm_up
    assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200


def num_areas(process):
    with open(f"/proc/{process}/maps") as maps:
        return sum("diracnet-slots" in line for line in maps)


def test_a_killed_front_end_is_replaced_and_its_memory_and_gauges_are_gone(front_ends, pixels, encode):
    server, file = front_ends(), encode(pixels[0])
    until(lambda: num_areas(server.device) == 2)  # those of their checks at the start are gone
    os.kill(server.fronts[0], signal.SIGKILL)
    assert f"front end {server.fronts[0]} died" in wait_for(server, " died")
    wait_for(server, " serves")
    until(lambda: num_areas(server.device) == 2)
    assert ask(server, file).status_code == 200
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    assert "diracnet_connections_limit 4096.0" in lines  # and not three times 2048


def test_a_killed_front_end_takes_only_its_own_requests_with_it(held):
    clients = until(lambda: clients_of_both(held))
    first, second = (asked(client, held, held.white) for client in clients)
    assert read_line(held) == "holds\n"
    until(lambda: "diracnet_queue_images 2.0" in httpx.get(f"{held.url}/metrics", timeout=60).text)
    os.kill(held.fronts[0], signal.SIGKILL)
    wait_for(held, " died")
    held.let_go()
    while first[0].is_alive() or second[0].is_alive():
        if select.select([held.stdout], [], [], 0.1)[0]:  # the other one was not in the same batch
            assert read_line(held) == "holds\n"
            held.let_go()
    outcomes = [answers[0] for _, answers in (first, second)]
    lost = [outcome for outcome in outcomes if isinstance(outcome, httpx.TransportError)]
    assert len(lost) == 1
    assert [outcome.status_code for outcome in outcomes if outcome not in lost] == [200]
    for client in clients:
        client.close()


def clients_of_both(server):
    """Two clients whose connections belong to different front ends; None if they belong to one, and none is kept.

    Both are new: an idle connection is closed after five seconds, and the next may be that of the other front end.
    """
    clients = [httpx.Client(timeout=60) for _ in range(2)]
    ids = [client.get(f"{server.url}/healthz").headers["x-request-id"] for client in clients]
    if len({name.partition("-")[0] for name in ids}) == 2:
        return clients
    for client in clients:
        client.close()
    return None


def test_a_killed_device_process_answers_its_batch_503_and_is_replaced(held, pixels, encode):
    with httpx.Client() as client:
        thread, answers = asked(client, held, held.white)
        assert read_line(held) == "holds\n"
        os.kill(held.device, signal.SIGKILL)
        thread.join(60)
        (answer,) = answers
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["type"] == "urn:diracnet:problem:not-ready"
        assert ask(held, encode(pixels[0])).status_code == 200  # by the one that took its place: it waited
    assert f"device process {held.device} died" in wait_for(held, " died")


def test_sigterm_finishes_what_is_under_way(held):
    with httpx.Client() as client:
        thread, answers = asked(client, held, held.white)
        assert read_line(held) == "holds\n"
        held.send_signal(signal.SIGTERM)
        held.let_go()
        thread.join(60)
    assert answers[0].status_code == 200
    assert held.wait(60) == 0


@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_bytes(b"no model")])
def test_a_device_process_comes_back_with_the_model_that_served_last(front_ends, artefact, pixels, encode, damage):
    server, file = front_ends(), encode(pixels[0])
    before = ask(server, file).json()
    damage(artefact)
    os.kill(server.device, signal.SIGKILL)
    wait_for(server, " died")
    wait_for(server, " serves")
    assert ask(server, file).json() == before
    server.send_signal(signal.SIGHUP)
    wait_for(server, "the old model keeps serving")
    assert ask(server, file).json() == before


def test_sighup_reaches_all_front_ends(front_ends, artefact, other_artefact, pixels, encode):
    server, file = front_ends(), encode(pixels[0])
    shutil.copy(other_artefact, artefact)
    server.send_signal(signal.SIGHUP)
    wait_for(server, "now serving DiracNet-10-0.25")
    new, seen = sha256(other_artefact.read_bytes()).hexdigest(), set()

    def both_have_it():
        answer = ask(server, file)
        assert answer.status_code == 200
        if answer.json()["model"]["digest"] == new:
            seen.add(answer.headers["x-request-id"].partition("-")[0])
        return len(seen) == 2

    until(both_have_it)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(front_ends, end):
    server = front_ends("--drain-seconds", 1, start_new_session=True)
    os.killpg(server.pid, end)  # as a terminal does, and systemd
    assert server.wait(60) == 0
    server.communicate(timeout=60)  # its pipes close when the last of its processes has ended


def test_front_ends_end_with_their_supervisor(front_ends):
    server = front_ends()
    server.kill()
    server.communicate(timeout=60)


def test_front_ends_that_cannot_be_are_one_line(artefact, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        ([artefact, "--front-ends", 0], "--front-ends must be 1 or more, got 0"),
        ([artefact, "--front-ends", 2, "--workers", 2], "choose one of the two"),
        ([artefact, "--front-ends", 2, "--shadow", artefact], "use it with --workers"),
        ([artefact, "--front-ends", 2, "--devices", 0, 1, 2], "3 devices need at least as many --front-ends, got 2"),
        ([artefact, "--front-ends", 64], "max_decoded_bytes must be 545,259,520 for the decoders of 64 processes"),
    ):
        done = subprocess.run(command("run.py", *argv, "--port", 0), capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_model_that_cannot_be_served_ends_the_server(tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    argv = command("run.py", tmp_path / "text.onnx", "--port", 0, "--front-ends", 2, "--runtime", "onnxruntime")
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("error: text.onnx is not a valid ONNX file") == 1
    assert "no device process serves, and none can start" in done.stderr
    assert "Traceback" not in done.stderr


FULL = """
import os, sys
os.posix_fallocate = lambda file, start, length: (_ for _ in ()).throw(OSError(28, "No space left on device"))
"""


def test_no_shared_memory_is_said_at_the_start_once(artefact, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FULL)
    argv = command("run.py", artefact, "--port", 0, "--front-ends", 2, "--runtime", "onnxruntime")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.count("bytes of shared memory for pixels (no space left on device)") == 1


def test_each_of_two_devices_has_a_process_that_is_replaced_and_one_front_end(start, artefact, pixels, encode):
    argv = [str(artefact), "--front-ends", "2", "--devices", "0", "1", "--port", "0"]
    server = start(
        program=[sys.executable, str(ROOT / "bench" / "servers" / "simulated.py"), *argv],
        waits=False,
        env=os.environ | {"DIRACNET_SIMULATED_US": "200,4"},
    )
    found = [re.search(r"(front end|device process) (\d+) serves", wait_for(server, " serves")) for _ in range(4)]
    devices = [int(match[2]) for match in found if match[1] == "device process"]
    read_greeting(server)
    assert server.greeting == "2 front ends, 2 device processes\n"
    until(lambda: [num_areas(device) for device in devices] == [1, 1])
    os.kill(devices[0], signal.SIGKILL)
    wait_for(server, " died")
    (after,) = re.findall(r"device process (\d+) serves", wait_for(server, " serves"))
    front_ends = set()

    def both_answer():
        answer = ask(server, encode(pixels[0]))
        assert answer.status_code in (200, 503)  # of a front end that has not seen the new process yet
        if answer.status_code == 200:
            front_ends.add(answer.headers["x-request-id"].partition("-")[0])
        return len(front_ends) == 2

    until(both_answer)
    until(lambda: [num_areas(device) for device in (int(after), devices[1])] == [1, 1])
