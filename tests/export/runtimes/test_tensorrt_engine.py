"""What surrounds the GPU, with the GPU itself played by arrays. The real one is in tests/gpu."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from common.refusal import Refusal
from export.compare import compare
from export.engines.engine import build_engine
from export.model_file.engine_card import card_path
from export.runtimes import gpu, tensorrt_engine
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")


class Memory:
    """Stands for gpu.Buffer; its address is its place in `all`."""

    all: list["Memory"] = []  # noqa: RUF012

    def __init__(self, num_bytes):
        self.bytes = np.zeros(num_bytes, np.uint8)
        Memory.all.append(self)
        self.device = len(Memory.all) - 1

    def upload(self, array, stream):
        self.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)

    def download(self, shape, dtype, stream):
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[:num_bytes].copy().view(dtype).reshape(shape)


class Device:
    """Stands for a deserialised engine and its context: ONNX Runtime computes in its place."""

    def __init__(self, session, batch):
        self.session, self.batch, self.memory, self.seen, self.num_contexts = session, batch, {}, [], 0
        self.scratch = set()

    def get_tensor_dtype(self, name):
        return trt.float32

    device_memory_size_v2 = 4096

    def create_execution_context(self, strategy):
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.num_contexts += 1
        return self

    def set_device_memory(self, address, size):
        self.scratch.add((address, size))

    def set_tensor_address(self, name, address):
        self.memory[name] = Memory.all[address]

    def set_input_shape(self, name, shape):
        self.shape = shape
        self.seen.append(shape[0])
        return self.batch[0] <= shape[0] <= self.batch[-1]

    def execute_async_v3(self, stream):
        images = self.memory["images"].download(self.shape, np.dtype(np.uint8), stream)
        self.memory["logits"].upload(self.session(images), stream)
        return True


@pytest.fixture
def device_in_use(monkeypatch):
    """The number of every device that was made the current one."""
    used = []
    monkeypatch.setattr(gpu, "use", used.append)
    return used


@pytest.fixture
def on_a_gpu(write_onnx, monkeypatch, device_in_use):
    """(runtime, device, session): an engine for batches of 2 to 4 on the device of this file."""
    _, path = write_onnx()
    engine = build_engine(path, batch=(2, 3, 4))
    path.with_suffix(".engine").write_bytes(engine.content)
    card_path(path.with_suffix(".engine")).write_text(engine.card.to_json())
    session = OnnxSession(path)
    device = Device(session, (2, 3, 4))
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "compute_capability", lambda: engine.card.compute_capabilities[0])
    monkeypatch.setattr(gpu, "Buffer", Memory)
    monkeypatch.setattr(gpu, "allocate", lambda owner, num_bytes: 7 * num_bytes)
    monkeypatch.setattr(gpu, "when_gone", lambda *arguments: None)
    monkeypatch.setattr(gpu, "capture", lambda stream, work: work)
    monkeypatch.setattr(gpu, "launch", lambda graph, stream: graph())
    monkeypatch.setattr(cudart, "cudaStreamCreate", lambda: (cudart.cudaError_t.cudaSuccess, cudart.cudaStream_t(0)))
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, content: device)
    return load_runtime(path.with_suffix(".engine"), device=3), device, session


@pytest.mark.parametrize(("num", "batches"), [(1, [2]), (2, [2]), (3, [4]), (4, [4]), (9, [4, 4, 2])])
def test_batches_are_cut_and_padded_to_the_next_graph(on_a_gpu, images, num, batches):
    runtime, device, session = on_a_gpu
    assert compare(("ONNX Runtime", session(images(num))), ("engine", runtime(images(num))))
    device.seen.clear()
    assert compare(("ONNX Runtime", session(images(num))), ("engine", runtime(images(num))))
    assert device.seen == batches


def test_usual_batches_are_captured_once_in_a_context_of_their_own(on_a_gpu, images):
    runtime, device, _ = on_a_gpu
    assert device.num_contexts == 1
    for num in (1, 2, 3, 4, 2, 3, 4, 9):
        runtime(images(num))
    assert device.num_contexts == 3
    assert all(runtime._graphs.values())
    assert device.scratch == {(7 * 4096, 4096)}  # one memory for all of them


@pytest.mark.parametrize(
    ("profile", "sizes"),
    [
        ((1, 8, 64), {1: 1, 2: 2, 3: 4, 5: 8, 33: 64, 64: 64}),
        ((3, 3, 48), {1: 3, 3: 3, 4: 4, 33: 48}),
        ((5, 5, 5), {1: 5}),
    ],
)
def test_a_batch_is_padded_to_the_next_size_that_has_a_graph(on_a_gpu, profile, sizes):
    runtime, _, _ = on_a_gpu
    runtime._card = replace(runtime._card, batch=profile)
    assert {num: runtime._next_size(num) for num in sizes} == sizes


def test_an_engine_that_cannot_be_captured_runs_node_by_node(on_a_gpu, images, monkeypatch):
    runtime, _, session = on_a_gpu
    monkeypatch.setattr(gpu, "capture", lambda stream, work: None)
    for _ in range(2):
        assert compare(("ONNX Runtime", session(images(4))), ("engine", runtime(images(4))))
    assert runtime._graphs == {4: None}


@pytest.mark.parametrize("broken", ["work", "end"])
def test_a_broken_capture_is_ended_and_forgotten(monkeypatch, broken):
    """The order of the calls, with the driver played: what the real one takes is tested below."""
    success, done = cudart.cudaError_t.cudaSuccess, []

    def played(name, *values, error=success):
        monkeypatch.setattr(cudart, name, lambda *arguments: (done.append(name), (error, *values))[1])

    played("cudaStreamSynchronize")
    played("cudaStreamBeginCapture")
    played("cudaStreamEndCapture", "graph", error=success if broken == "work" else cudart.cudaError_t.cudaErrorUnknown)
    played("cudaGetLastError")

    def work():
        if broken == "work":
            raise RuntimeError("an allocation in the middle")

    assert gpu.capture("stream", work) is None
    assert done == ["cudaStreamSynchronize", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError"]


def test_a_capture_becomes_an_executable_graph(monkeypatch):
    success, done = cudart.cudaError_t.cudaSuccess, []
    values = {
        "cudaStreamSynchronize": (),
        "cudaStreamBeginCapture": (),
        "cudaStreamEndCapture": ("graph",),
        "cudaGraphInstantiate": ("executable",),
        "cudaGraphDestroy": (),
    }
    for name, found in values.items():
        monkeypatch.setattr(
            cudart, name, lambda *arguments, name=name, found=found: (done.append(name), (success, *found))[1]
        )
    assert gpu.capture("stream", lambda: done.append("work")) == "executable"
    names = list(values)
    assert done == [*names[:2], "work", *names[2:]]


def test_an_engine_runs_on_its_device_in_whatever_thread(on_a_gpu, images, device_in_use):
    runtime, _, _ = on_a_gpu
    assert device_in_use == [3]
    runtime(images(2))
    assert device_in_use == [3, 3]


def test_a_failed_run_says_so(on_a_gpu, images, monkeypatch):
    runtime, device, _ = on_a_gpu
    assert runtime.description == "tensorrt_rtx, fp32"
    assert runtime.library == f"tensorrt_rtx {trt.__version__}"
    device.execute_async_v3 = lambda stream: False
    with pytest.raises(RuntimeError, match="the engine failed: the library does not say why"):
        runtime(images(2))


def test_an_engine_that_the_library_refuses_is_refused(write_onnx, monkeypatch, device_in_use):
    """On a machine without a driver the real library refuses every engine."""
    if gpu.num_devices():
        pytest.skip("this machine has a CUDA device, which loads the engine")
    _, path = write_onnx()
    engine = build_engine(path, batch=(1, 2, 4))
    path.with_suffix(".engine").write_bytes(engine.content)
    card_path(path.with_suffix(".engine")).write_text(engine.card.to_json())
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "compute_capability", lambda: engine.card.compute_capabilities[0])
    with pytest.raises(Refusal, match=r"plain\.engine cannot be loaded: .*"):
        load_runtime(path.with_suffix(".engine"))


@pytest.mark.skipif(bool(gpu.num_devices()), reason="this machine has a CUDA device")
def test_cuda_calls_fit_the_installed_bindings_and_say_what_is_missing():
    """Wrong arguments would raise TypeError; what is missing here is only the driver."""
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.Buffer(16)
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.compute_capability()
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.device_name()
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.allocate(Memory, 16)
    buffer = object.__new__(gpu.Buffer)
    buffer.device, buffer._host, buffer._bytes = 0, 0, np.zeros(16, np.uint8)
    with pytest.raises(Refusal, match="CUDA: "):
        buffer.upload(np.arange(4, dtype=np.int32), cudart.cudaStream_t(0))
    assert buffer._bytes.view(np.int32).tolist() == [0, 1, 2, 3]
    with pytest.raises(Refusal, match="CUDA: "):
        buffer.download((4,), np.dtype(np.int32), cudart.cudaStream_t(0))
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.call(cudart.cudaStreamCreate())
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.launch(cudart.cudaGraphExec_t(0), cudart.cudaStream_t(0))
    for made in (
        cudart.cudaStreamBeginCapture(
            cudart.cudaStream_t(0), cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        ),
        cudart.cudaStreamEndCapture(cudart.cudaStream_t(0)),
        cudart.cudaGraphInstantiate(cudart.cudaGraph_t(0), 0),
        cudart.cudaGraphDestroy(cudart.cudaGraph_t(0)),
    ):
        with pytest.raises(Refusal, match="CUDA: "):
            gpu.call(made)
    assert tensorrt_engine.import_library("tensorrt_rtx") is trt


@pytest.fixture
def freed(monkeypatch):
    """What was given back to a played CUDA, in order."""
    success, freed = cudart.cudaError_t.cudaSuccess, []
    for name in ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaStreamDestroy"):
        monkeypatch.setattr(cudart, name, lambda what, name=name: (freed.append((name, what)), (success,))[1])
    return freed


def test_a_buffer_is_freed_with_its_last_reference(monkeypatch, freed):
    success, host = cudart.cudaError_t.cudaSuccess, (ctypes.c_uint8 * 16)()
    monkeypatch.setattr(cudart, "cudaMalloc", lambda num_bytes: (success, 4096))
    monkeypatch.setattr(cudart, "cudaHostAlloc", lambda num_bytes, flags: (success, ctypes.addressof(host)))
    buffer = gpu.Buffer(16)
    assert freed == []
    del buffer
    assert freed == [("cudaFree", 4096), ("cudaFreeHost", ctypes.addressof(host))]


def test_graphs_are_destroyed_before_their_stream(freed):
    gpu.release("stream", {1: "graph", 2: None})
    assert freed == [("cudaGraphExecDestroy", "graph"), ("cudaStreamDestroy", "stream")]


def test_an_engine_gives_its_stream_and_graphs_back(on_a_gpu, images, monkeypatch):
    released = []
    monkeypatch.setattr(gpu, "when_gone", lambda owner, release, *arguments: released.append((release, *arguments)))
    runtime, _, _ = on_a_gpu
    runtime._allocate(trt)
    runtime(images(2))
    assert released == [(gpu.release, runtime._stream, runtime._graphs)]
    assert list(runtime._graphs) == [2]
