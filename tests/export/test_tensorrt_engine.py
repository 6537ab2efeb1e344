"""What surrounds the GPU, with the GPU itself played by arrays. The real one is in tests/gpu."""

import numpy as np
import pytest

from export.compare import compare
from export.engine import build_engine
from export.runtimes import gpu, tensorrt_engine
from export.runtimes.card import card_path
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession
from train.refusal import Refusal

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
        self.session, self.batch, self.memory, self.seen = session, batch, {}, []

    def get_tensor_dtype(self, name):
        return trt.float32

    def create_execution_context(self):
        return self

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
    monkeypatch.setattr(cudart, "cudaStreamCreate", lambda: (cudart.cudaError_t.cudaSuccess, cudart.cudaStream_t(0)))
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, content: device)
    return load_runtime(path.with_suffix(".engine"), device=3), device, session


@pytest.mark.parametrize(("num", "batches"), [(1, [2]), (2, [2]), (4, [4]), (9, [4, 4, 2])])
def test_batches_are_cut_and_padded_to_the_profile(on_a_gpu, images, num, batches):
    runtime, device, session = on_a_gpu
    assert compare(("ONNX Runtime", session(images(num))), ("engine", runtime(images(num))))
    assert device.seen == batches


def test_an_engine_runs_on_its_device_in_whatever_thread(on_a_gpu, images, device_in_use):
    runtime, _, _ = on_a_gpu
    assert device_in_use == [3]
    runtime(images(2))
    assert device_in_use == [3, 3]


def test_a_failed_run_says_so(on_a_gpu, images, monkeypatch):
    runtime, device, _ = on_a_gpu
    assert runtime.description == f"tensorrt_rtx {trt.__version__}, fp32"
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
    buffer = object.__new__(gpu.Buffer)
    buffer.device, buffer._host, buffer._bytes = 0, 0, np.zeros(16, np.uint8)
    with pytest.raises(Refusal, match="CUDA: "):
        buffer.upload(np.arange(4, dtype=np.int32), cudart.cudaStream_t(0))
    assert buffer._bytes.view(np.int32).tolist() == [0, 1, 2, 3]
    with pytest.raises(Refusal, match="CUDA: "):
        buffer.download((4,), np.dtype(np.int32), cudart.cudaStream_t(0))
    with pytest.raises(Refusal, match="CUDA: "):
        gpu.call(cudart.cudaStreamCreate())
    assert tensorrt_engine.import_library("tensorrt_rtx") is trt
