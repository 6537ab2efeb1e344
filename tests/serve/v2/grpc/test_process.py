"""Servers of HTTP and gRPC as processes: without gRPC's packages, stopped under load, and several that share a port."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rpc_calls import Raw, request_of
from serving import ROOT, ask, command, popen, wait_for, workers_of

BLACK = np.zeros((1, 8, 8, 3), np.uint8)


def target_of(server):
    return re.search(r"gRPC at (\S+)", server.where).group(1)


def test_a_server_without_grpc_loads_none_of_its_packages():
    program = (
        "import sys; sys.modules['grpc'] = sys.modules['tritonclient'] = None; "
        "import serve.request.app, serve.processes.serving, serve.run; assert 'google.protobuf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_taken_port_ends_the_command_in_one_line(start, artefact):
    server = start(artefact, "--grpc-port", 0)
    port = target_of(server).rpartition(":")[2]
    done = popen(command("run.py", artefact, "--port", 0, "--grpc-port", port))
    _, said = done.communicate(timeout=60)
    assert done.returncode == 2
    assert said == f"error: cannot listen on 127.0.0.1 port {port} for gRPC: address already in use; " + (
        "choose another with --grpc-port\n"
    )


@pytest.mark.slow
def test_sigterm_under_load_refuses_what_comes_and_answers_what_came(start, artefact, pixels, encode):
    """Each client goes on until it is refused; nobody is cut off."""
    server = start(artefact, "--grpc-port", 0)
    target, message, are_answered = target_of(server), request_of(BLACK), threading.Barrier(5)

    def ask_until_refused():
        raw = Raw(target)
        assert raw(message)[0] == "OK"
        are_answered.wait(60)
        while (outcome := raw(message))[0] == "OK":
            pass
        return outcome

    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(ask_until_refused) for _ in range(4)]
        are_answered.wait(60)
        assert all(ask(server, encode(pixels[0])).status_code == 200 for _ in range(20))
        server.send_signal(signal.SIGTERM)
        outcomes = [call.result() for call in calls]
    assert {status for status, _, _ in outcomes} == {"UNAVAILABLE"}
    assert server.wait(60) == 0
    log = server.stderr.read()
    assert "Traceback" not in log
    assert all(line.startswith('{"time":') for line in log.splitlines())


@pytest.mark.slow
def test_workers_share_the_port_and_one_that_is_killed_comes_back(start, artefact):
    """An id that the server gives begins with its process."""
    server = start(artefact, "--grpc-port", 0, "--workers", 2)
    target, message = target_of(server), request_of(BLACK)

    def processes():
        found = set()
        for _ in range(200):
            status, said, metadata = Raw(target)(message)
            assert status == "OK", said
            found.add(metadata["x-request-id"].partition("-")[0])
            if len(found) == 2:
                break
        return found

    before = processes()
    assert len(before) == 2
    os.kill(workers_of(server)[0], signal.SIGKILL)
    wait_for(server, " died")
    wait_for(server, " serves")
    after = processes()
    assert len(after) == 2
    assert len(before & after) == 1
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
