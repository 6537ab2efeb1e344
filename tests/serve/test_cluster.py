"""Ray Serve, in a real cluster of two nodes on this machine."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from serving import PATIENCE_S, patience

from common.refusal import Refusal
from serve.client import Client
from serve.client_protocol import Retry
from serve.cluster import Settings, read_artefact, read_settings

ROOT = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 300
# Workers of Ray are nicer than everything else unless told otherwise; on a busy machine they would not start in time.
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "DIRACNET_API_KEY": "secret"}
TWO_NODES = """
from ray.cluster_utils import Cluster

node = dict(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(**node)
print("address", cluster.address, flush=True)
input()
cluster.shutdown()
"""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `cluster` is not installed")


def lines_until(process, beginning):
    """The first line of a process that starts so."""
    with patience(process):
        for line in iter(process.stdout.readline, ""):
            if line.startswith(beginning):
                return line
    raise AssertionError(f"{process.args} ended: {process.communicate()}")


def start(*argv):
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture
def two_nodes():
    cluster = start("-c", TWO_NODES)
    try:
        yield cluster, lines_until(cluster, "address").split()[1]
    finally:
        cluster.communicate("\n", timeout=PATIENCE_S)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def replicas(cluster):
    """{process: its raylet} of the replicas that run on the nodes of `cluster`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_replica = (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica")
            raylet = parent(folder.name) if is_replica else 0
            if is_replica and parent(raylet) == cluster.pid:
                found[int(folder.name)] = raylet
        except OSError:
            continue  # it has ended meanwhile
    return found


@needs_ray
@pytest.mark.slow
def test_a_killed_replica_loses_no_request_that_is_tried_once_more(two_nodes, artefact, pixels, encode, tmp_path, port):
    cluster, address = two_nodes
    config = tmp_path / "cluster.toml"
    config.write_text(
        f'[cluster]\naddress = "{address}"\n[http]\nport = {port}\n[replicas]\nfewest = 2\nmost = 2\ncpus = 1\n'
    )
    server = start(ROOT / "serve" / "cluster.py", artefact, "--config", config)
    url, body = f"http://127.0.0.1:{port}", encode(pixels[0])
    is_under_load = threading.Event()

    def ask(index):
        with Client(url, api_key="secret", retry=Retry(attempts=2)) as client:
            (result,) = client.predict([body])
        if index == NUM_REQUESTS // 5:
            is_under_load.set()
        return result.label

    try:
        assert url in lines_until(server, "serving at")
        processes = replicas(cluster)
        assert len(set(processes.values())) == 2  # one on each node
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, index) for index in range(NUM_REQUESTS)]
            assert is_under_load.wait(PATIENCE_S)
            os.kill(next(iter(processes)), signal.SIGKILL)
            results = [answer.result() for answer in answers]
        assert httpx.post(f"{url}/predict", content=body, timeout=60).status_code == 401
        assert httpx.get(f"{url}/readyz", timeout=60).json() == {"status": "ready"}
    finally:
        server.send_signal(signal.SIGTERM)
        output, error = server.communicate(timeout=PATIENCE_S)
    assert len(set(results)) == 1
    assert (server.returncode, output.splitlines()[-1]) == (0, "stopped"), error


def test_the_example_holds_the_defaults():
    assert read_settings(ROOT / "deploy" / "cluster.toml") == read_settings(None) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not valid TOML"),
        ("http = 1", "http must be a table"),
        ("[htpp]\nport = 1", r"there is no table \[htpp\]"),
        (
            '[http]\nport = "80"\nprot = 1',
            r"\[http\] has no prot; \[http\] port cannot be '80' \(expected: a whole number\)",
        ),
        ("[http]\nport = true", r"port cannot be True \(expected: a whole number\)"),
        ("[http]\non_every_machine = 1", r"on_every_machine cannot be 1 \(expected: true or false\)"),
        ("[replicas]\ncpus = true", r"cpus cannot be True \(expected: a number\)"),
        ("[replicas]\nfewest = 5", "fewest must be from 1 to most, got 5 and 4"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(Refusal, match=message):
        read_settings(tmp_path / "cluster.toml")


def test_whole_numbers_are_numbers(tmp_path):
    (tmp_path / "cluster.toml").write_text("[replicas]\ncpus = 2")
    assert read_settings(tmp_path / "cluster.toml").replicas.cpus == 2


def test_an_artefact_travels_whole_or_is_refused(artefact, tmp_path):
    assert read_artefact(artefact) == {"plain.onnx": artefact.read_bytes()}
    (tmp_path / "plain.engine").write_bytes(b"")
    for path, message in (
        (tmp_path / "plain.engine", "has no card"),
        (tmp_path / "missing.onnx", "No such file"),
        (tmp_path / "plain.pt", "neither an .onnx nor"),
    ):
        with pytest.raises(Refusal, match=message):
            read_artefact(path)


def test_weights_in_a_folder_of_their_own_keep_their_place(artefact, tmp_path):
    (tmp_path / "there" / "weights").mkdir(parents=True)
    path = tmp_path / "there" / "plain.onnx"
    model = onnx.load(artefact)
    onnx.save(model, path, save_as_external_data=True, location="weights/all.bin", size_threshold=0)
    assert [*read_artefact(path)] == ["plain.onnx", "weights/all.bin"]


def test_a_model_that_answers_wrongly_is_refused_before_it_travels(artefact):
    model = onnx.load(artefact)
    weights = model.graph.initializer[-1]
    weights.CopyFrom(numpy_helper.from_array(np.full(weights.dims, np.inf, np.float32), weights.name))
    onnx.save(model, artefact)
    with pytest.raises(Refusal, match="gives values that are not finite"):
        read_artefact(artefact)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto", "nowhere:port"])
def test_a_cluster_that_is_not_there_is_one_line(artefact, tmp_path, address):
    (tmp_path / "cluster.toml").write_text(f'[cluster]\naddress = "{address}"')
    server = start(ROOT / "serve" / "cluster.py", artefact, "--config", tmp_path / "cluster.toml")
    output, error = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, output) == (2, "")
    assert f"no Ray cluster at '{address}'" in error
    assert error.count("\n") == 1
