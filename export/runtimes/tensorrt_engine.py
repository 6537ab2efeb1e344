"""TensorRT: an .engine file made callable on the GPU that it was built for."""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole, sha256
from common.refusal import Refusal
from export.model_file.engine_card import EngineCard, card_path, read_card
from export.runtimes import gpu
from export.runtimes.runtime import Model, answer_in_pieces, next_power_of_two

# NVIDIA's two libraries, tensorrt and tensorrt_rtx, have one interface.
INSTALL_TENSORRT = "pip install -e '.[tensorrt]' (its libraries come from NVIDIA's own package index)"


class TensorRTEngine:
    """One engine on one stream; `model` and `description` as in `Runtime`.

    Batches run as CUDA graphs of 1, 2, 4, ... images and the profile's smallest and largest number; others are padded
    to the next of them. Its memory on the device is freed with the last reference to it.
    """

    platform = "tensorrt_plan"

    def __init__(self, path: Path, *, device: int = 0) -> None:
        content = read_whole(path)
        card = read_card(path)
        trt = _fitting_library(path, content, card, device)
        reading = card.signature.reading
        self.model = Model(card.name, card.engine_sha256, card.spec, card.provenance, len(content), reading)
        self.description, self.library = f"{card.builder}, {card.precision}", f"{card.builder} {trt.__version__}"
        self._card, self._device = card, device
        self._logger = make_logger(trt)
        self._runtime, self._engine = load_engine(trt, self._logger, content, card, what=str(path))
        self._graphs: dict[int, Any] = {}  # by batch size; None if the engine cannot be captured
        self._allocate(trt)
        self._context = self._make_context()
        self._captured: list[Any] = []  # contexts, which must outlive their graphs

    def __call__(self, images: np.ndarray) -> np.ndarray:
        gpu.use(self._device)  # CUDA keeps the current device per thread
        return answer_in_pieces(self._run, images, self._card.batch[2], self._next_size)

    def _next_size(self, num: int) -> int:
        """The smallest batch with a graph that holds `num` images."""
        smallest, _, largest = self._card.batch
        return smallest if num <= smallest else min(next_power_of_two(num), largest)

    def _allocate(self, trt: Any) -> None:
        """Buffers for the largest batch, scratch memory, and a stream."""
        names, largest = self._card.signature, self._card.batch[2]
        num_classes = len(self._card.spec.labels)
        self._dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(names.output_name)))
        self._input = gpu.Buffer(largest * int(np.prod(names.sizes)) * np.dtype(names.dtype).itemsize)
        self._output = gpu.Buffer(largest * num_classes * self._dtype.itemsize)
        # One scratch memory for all contexts: they run one after another, on one stream.
        self._unallocated = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._scratch_bytes = max(1, self._engine.device_memory_size_v2)
        self._scratch = gpu.allocate(self, self._scratch_bytes)
        self._stream = gpu.call(gpu.cudart.cudaStreamCreate())
        gpu.when_gone(self, gpu.release, self._stream, self._graphs)

    def _make_context(self) -> Any:
        context, names = self._engine.create_execution_context(self._unallocated), self._card.signature
        context.set_device_memory(self._scratch, self._scratch_bytes)
        context.set_tensor_address(names.input_name, int(self._input.device))
        context.set_tensor_address(names.output_name, int(self._output.device))
        return context

    def _run(self, images: np.ndarray) -> np.ndarray:
        x, batch = self._card.signature.to_input(images), len(images)
        if batch not in self._graphs:
            self._graphs[batch] = self._capture(x.shape)
        self._input.upload(x, self._stream)
        if (graph := self._graphs[batch]) is None:
            self._enqueue(self._context, x.shape)
        else:
            gpu.launch(graph, self._stream)
        shape = (batch, len(self._card.spec.labels))
        return self._output.download(shape, self._dtype, self._stream).astype(np.float32, copy=False)

    def _capture(self, shape: tuple[int, ...]) -> Any:
        """A graph of the engine for inputs of `shape`; None if the engine cannot be captured.

        It has its own context, because another shape would change a context under its graph. The first run is not
        captured, since it may still allocate.
        """
        context = self._make_context()
        self._enqueue(context, shape)
        graph = gpu.capture(self._stream, lambda: self._enqueue(context, shape))
        if graph is not None:
            self._captured.append(context)
        return graph

    def _enqueue(self, context: Any, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(self._card.signature.input_name, shape):
            raise RuntimeError(f"the engine does not take {shape}: {self._logger.last_error()}")
        if not context.execute_async_v3(int(self._stream)):
            raise RuntimeError(f"the engine failed: {self._logger.last_error()}")


def import_library(name: str) -> Any:
    """`tensorrt` or `tensorrt_rtx`; if it is missing or does not load, the refusal says what to install."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        how = INSTALL_TENSORRT if name == "tensorrt" else "pip install -e '.[rtx]'"
        raise Refusal(f"{name} is not installed here: {how} ({error})") from error


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors in `messages` instead of printing them."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append((severity, message))

        def last_error(self) -> str:
            errors = [text for severity, text in self.messages if severity != trt.ILogger.WARNING]
            return errors[-1] if errors else "the library does not say why"

    return Logger()


def load_engine(trt: Any, logger: Any, content: bytes, card: EngineCard, *, what: str) -> tuple[Any, Any]:
    """The runtime, which must outlive its engine, and the engine; a refusal calls it `what`."""
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = card.version_compatible  # such an engine contains the code that runs it
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise Refusal(f"{what} cannot be loaded: {logger.last_error()}")
    return runtime, engine


def _fitting_library(path: Path, content: bytes, card: EngineCard, device: int) -> Any:
    """The library that built the engine; refuses a card that does not fit this machine, naming the field."""
    again = f"(see {card_path(path).name}); build it again here with export/to_trt.py"
    if sha256(content) != card.engine_sha256:
        raise Refusal(f"{path} does not fit its card: engine_sha256 differs {again}")
    trt = import_library(card.builder)
    if trt.__version__ != card.builder_version and not _runs_older(trt, card):
        raise Refusal(f"{path}: builder_version is {card.builder_version}, here is {trt.__version__} {again}")
    if not gpu.num_devices():
        raise Refusal(f"{path} needs an NVIDIA GPU and its driver, and none is found here; serve the .onnx instead")
    gpu.use(device)
    if gpu.compute_capability() not in card.compute_capabilities:
        offered = ", ".join(card.compute_capabilities)
        if card.builder == "tensorrt_rtx":
            again = f"(see {card_path(path).name}); build it with tensorrt instead: {INSTALL_TENSORRT}"
        raise Refusal(f"{path}: compute_capabilities are {offered}, this GPU's is {gpu.compute_capability()} {again}")
    # TensorRT chooses kernels for one GPU model; another of the same architecture may have less memory.
    if card.gpu and card.gpu != (here := gpu.device_name()):
        raise Refusal(f"{path}: gpu is {card.gpu}, here is {here} {again}")
    return trt


def _runs_older(trt: Any, card: EngineCard) -> bool:
    """Whether the engine is version-compatible and the library here is no older than its builder."""
    here, builder = (
        [int(part) for part in re.findall(r"\d+", version)[:2]] for version in (trt.__version__, card.builder_version)
    )
    return card.version_compatible and here >= builder
