"""The torch runtime, with the GPU itself played: what a graph captures runs at each replay, and at no other time.

Every call is held against the real one's signature. The real GPU is in tests/gpu.
"""

import contextlib
import gc
import inspect
import threading
import weakref

import numpy as np
import onnx
import pytest
import torch

from common.refusal import Refusal
from export.compare import compare
from export.graphs.graph import to_onnx
from export.runtimes import torch_graphs
from export.runtimes.load import load_runtime
from export.runtimes.torch_graphs import TorchNet
from fold.graph import fold

TO_LOGITS = TorchNet.__call__
REAL = {name: getattr(torch.cuda, name) for name in ("CUDAGraph", "Stream", "graph", "stream", "graph_pool_handle")}


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    alive = weakref.WeakSet()  # noqa: RUF012

    def __init__(self):
        inspect.signature(REAL["CUDAGraph"].__new__).bind(REAL["CUDAGraph"])
        inspect.signature(REAL["CUDAGraph"].replay).bind(self)
        self.work, self.num_replays = [], 0  # a net, what it reads, and where its logits lie
        Graph.alive.add(self)

    def replay(self):
        self.num_replays += 1
        with torch.no_grad():
            for net, images, logits in self.work:
                logits.copy_(TO_LOGITS(net, images))


class Stream:
    def __init__(self, *args):
        inspect.signature(REAL["Stream"].__new__).bind(REAL["Stream"], *args)
        self.num_waits = 0

    def synchronize(self):
        assert Device.graph is None
        self.num_waits += 1


class Device:
    """The graph that is captured now, and every capture so far."""

    graph: Graph | None = None
    captures: list[dict] = []  # noqa: RUF012

    @staticmethod
    @contextlib.contextmanager
    def capture(*args, **kwargs):
        given = inspect.signature(REAL["graph"].__init__).bind(None, *args, **kwargs).arguments
        Device.captures.append(given)
        Device.graph = given["cuda_graph"]
        yield
        Device.graph = None

    @staticmethod
    def run(net, images):
        """In the place of TorchNet.__call__: a capture notes what is to be done, and does nothing."""
        logits = TO_LOGITS(net, images)
        if Device.graph:
            Device.graph.work.append((net, images, logits.zero_()))
        return logits


@pytest.fixture
def cuda(monkeypatch):
    """A device of which there is one, with the CPU's memory."""
    numbers = iter(range(1000))

    def use(stream):
        inspect.signature(REAL["stream"]).bind(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Device.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(numbers)))
    monkeypatch.setattr(TorchNet, "__call__", Device.run)
    monkeypatch.setattr(torch_graphs, "_place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch_graphs, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(torch_graphs, "_IDLE", torch_graphs.defaultdict(list))
    monkeypatch.setattr(Device, "captures", [])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture
def load(write_onnx, cuda):
    """(Dirac net, its runtime) on the played device."""

    def make(**fields):
        net, path = write_onnx(**fields)
        return net, load_runtime(path, name="torch", device=0)

    return make


def expected(net, pixels):
    with torch.no_grad():
        return net(torch.from_numpy(pixels)).numpy()


def test_graphs_of_every_size_answer_as_the_dirac_net_whatever_ran_before(load, images):
    net, runtime = load()
    assert runtime.description == "PyTorch, CUDA graphs, fp32"
    for num in (3, 1, 8, 4, 3, 2, 7):
        pixels = images(num) ^ np.uint8(num)
        answer = runtime(pixels)
        assert compare(("Dirac net", expected(net, pixels)), ("graph", answer))
        assert answer.dtype == np.float32


def test_a_size_is_captured_once_and_its_neighbours_are_padded_to_it(load, images):
    _, runtime = load()
    for num in (5, 8, 6, 7, 5):
        runtime(images(num))
    (given,) = Device.captures
    assert given["cuda_graph"].num_replays == 5
    assert given["capture_error_mode"] == "thread_local", "or another thread's model would break it"
    for num in (1, 2, 3, 4):
        runtime(images(num))
    assert len(Device.captures) == 4
    assert len({capture["pool"] for capture in Device.captures}) == 1
    assert len({id(capture["stream"]) for capture in Device.captures}) == 1


def test_more_images_than_the_largest_graph_holds_are_cut(load, images, monkeypatch):
    monkeypatch.setattr(torch_graphs, "LARGEST", 4)
    net, runtime = load()
    pixels = images(9)
    assert compare(("Dirac net", expected(net, pixels)), ("graph", runtime(pixels)))
    assert sorted(runtime._answer._batches) == [1, 4]


def test_each_call_waits_once_for_its_own_stream(load, images):
    _, runtime = load()
    runtime(images(2))
    before = runtime._answer._stream.num_waits
    runtime(images(2))
    assert runtime._answer._stream.num_waits == before + 1


def test_an_answer_stays_as_it_was_given(load, images):
    """The buffer that it was read from is that of the next call."""
    _, runtime = load()
    answer = runtime(images(2))
    kept = answer.copy()
    runtime(images(2) ^ np.uint8(255))
    assert np.array_equal(answer, kept)


def test_float32_is_without_tf32_and_kernels_are_searched_before_the_capture(load, images):
    load()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark


def test_float16_is_that_of_the_file(make_net, make_spec, cuda, images, tmp_path):
    net, path = make_net(), tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold(net), make_spec(), {}, precision="fp16").SerializeToString())
    runtime, pixels = load_runtime(path, name="torch", device=0), images(3)
    assert runtime.description == "PyTorch, CUDA graphs, fp16"
    # sqrt(10) roundings of 2^-11, as export/compare.py derives it.
    error = np.abs(runtime(pixels) - expected(net, pixels)).max() / np.abs(expected(net, pixels)).max()
    assert 1e-6 < error < 1e-2


def test_what_a_model_holds_goes_with_it_and_its_stream_is_used_again(load, images):
    """Without the help of the garbage collector, which a server freezes."""
    gc.collect()
    before, streams = len(Graph.alive), set()
    gc.disable()
    try:
        for _ in range(5):
            _, runtime = load()
            runtime(images(3))
            streams.add(runtime._answer._stream)
            Device.captures.clear()
            del runtime
    finally:
        gc.enable()
    assert len(Graph.alive) == before
    assert len(streams) == 1


def test_two_models_at_once_have_streams_of_their_own(load):
    (_, one), (_, other) = load(), load()
    assert one._answer._stream is not other._answer._stream


def test_one_capture_at_a_time(load, images, monkeypatch):
    """PyTorch can do one in a process; models of two devices, or an old and a new one, have threads of their own."""
    asked, lock = threading.Event(), threading.Lock()

    class Lock:
        def __enter__(self):
            asked.set()
            lock.acquire()

        def __exit__(self, *args):
            lock.release()

    monkeypatch.setattr(torch_graphs, "_CAPTURING", Lock())
    _, runtime = load()
    with lock:
        thread = threading.Thread(target=runtime, args=(images(2),))
        thread.start()
        assert asked.wait(60)
        assert not Device.captures
    thread.join()
    assert len(Device.captures) == 1


def test_a_device_that_is_not_there_is_refused(write_onnx, cuda):
    _, path = write_onnx()
    with pytest.raises(Refusal, match="no CUDA device 1 here"):
        load_runtime(path, name="torch", device=1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda model: model.graph.node[3].__setattr__("op_type", "Hardmax"), "does not run Hardmax here"),
        (lambda model: model.graph.node[3].__setattr__("domain", "com.microsoft"), "does not run"),
        (lambda model: model.graph.node[3].ClearField("output"), "cannot be loaded"),
        (lambda model: model.ClearField("metadata_props"), "not a model of this project"),
    ],
)
def test_what_it_does_not_know_is_refused_in_one_line(write_onnx, damage, reason):
    _, path = write_onnx()
    model = onnx.load(path)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Refusal, match=reason) as refusal:
        load_runtime(path, name="torch")
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)
