"""ONNX Runtime: an .onnx file made callable on the best provider that loads here."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole
from common.refusal import Refusal
from export.model_file.onnx_reader import digest_of, find_weights, read_graph, read_header
from export.model_file.probe import refuse_batch_dependence
from export.model_file.reading import NO_HINTS, ReadingHints
from export.model_file.signature import Value, find_signature, find_spec
from export.runtimes.offline import ort, quiet_options
from export.runtimes.runtime import Model, answer_in_pieces, next_power_of_two, pad


class OnnxSession:
    """One ONNX Runtime session; `model` and `description` as in `Runtime`."""

    platform = "onnxruntime_onnx"

    def __init__(
        self,
        path: Path,
        *,
        providers: tuple[str, ...] | None = None,
        device: int | None = None,
        num_threads: int = 0,
        optimize: bool = True,
        shares_cores: bool = False,
        hints: ReadingHints = NO_HINTS,
    ) -> None:
        content = read_whole(path)
        header, graph = read_header(path, content), read_graph(path, content)
        options = quiet_options(path.parent if find_weights(path, graph) else None)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = num_threads
        if shares_cores:  # threads that wait busily for more work hold up another session's
            options.add_session_config_entry("session.force_spinning_stop", "1")
        asked = [(name, provider_options(name, device or 0)) for name in providers or loadable_providers()]

        def open_session() -> ort.InferenceSession:
            return ort.InferenceSession(content, options, providers=asked)

        try:
            self._session = open_session()
        except Exception as error:  # ONNX Runtime's exceptions are private
            raise Refusal(f"{path} cannot be loaded as an ONNX model: {_first_line(error)}") from error
        self.provider = self._session.get_providers()[0]  # the one in use
        self._reopen = open_session if self.provider == "CUDAExecutionProvider" else None
        self._by_size: dict[int, ort.InferenceSession] = {}
        is_named = providers is not None or device is not None
        if is_named and self.provider != asked[0][0]:  # ONNX Runtime only prints that it falls back to the CPU
            raise Refusal(f"{asked[0][0]} does not start here for {path}; its libraries do not fit the driver or GPU")
        inputs, outputs = ([*map(_value, get())] for get in (self._session.get_inputs, self._session.get_outputs))
        self._signature, hints = find_signature(path, header, graph, inputs, outputs, hints)
        num_classes = len(header.spec.labels) if header.spec else self._count_classes(path)
        spec = find_spec(path, header, self._signature, hints, num_classes)
        self.model = Model(
            spec.name if header.spec else path.stem,
            digest_of(path, content),
            spec,
            header.provenance,
            num_bytes=len(content),
            reading=self._signature.reading,
        )
        self.description = f"ONNX Runtime, {self.provider}"
        self.library = f"onnxruntime {ort.__version__}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        batch = self._signature.batch
        if batch and len(images) != batch:
            return answer_in_pieces(self._run, images, batch, lambda num: batch)
        return self._run(images)

    def to_input(self, images: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, H, W, C] → what the graph takes."""
        return self._signature.to_input(images)

    def _run(self, images: np.ndarray) -> np.ndarray:
        names, session, num_images = self._signature, self._session, len(images)
        if self._reopen and not names.batch:
            images = pad(images, next_power_of_two(num_images))
            session = self._session_of(len(images), self._reopen)
        logits = session.run([names.output_name], {names.input_name: names.to_input(images)})[0]
        return names.to_output(np.asarray(logits))[:num_images]

    def _session_of(self, size: int, reopen: Callable[[], ort.InferenceSession]) -> ort.InferenceSession:
        """The session that has seen batches of `size` alone.

        The CUDA provider plans its convolutions anew when the batch size changes: 57 ms a call on an H200 where the
        batch itself takes 2 (docs/gpu.md).
        """
        if size not in self._by_size:
            self._by_size[size] = reopen() if self._by_size else self._session
        return self._by_size[size]

    def _count_classes(self, path: Path) -> int:
        """Of somebody else's net; refuses one whose answer to an image depends on its batch."""
        try:
            return refuse_batch_dependence(path, self, self._signature.sizes).shape[1]
        except Refusal:
            raise
        except Exception as error:  # a private one of ONNX Runtime, or no memory
            raise Refusal(f"{path} fails on images of noise: {_first_line(error)}") from error


def provider_options(name: str, device: int) -> dict[str, str]:
    """The options of a provider: the CUDA device, and no TF32, whose 10 bits of mantissa would pass for fp32.

    The default search for convolution algorithms times all of them, again for each new batch size, and a server's
    batches are of any size: cuDNN's own estimate is used instead.
    """
    match name:
        case "CUDAExecutionProvider":
            return {"device_id": str(device), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        case "TensorrtExecutionProvider":
            return {"device_id": str(device)}
        case _:
            return {}


def loadable_providers() -> tuple[str, ...]:
    """The compiled-in providers whose libraries load here, best first.

    Asking a session for one that does not load prints red errors, so the libraries are probed first.
    """
    needs: dict[str, tuple[str, ...]] = {
        "TensorrtExecutionProvider": ("libcuda.so.1", "libnvinfer.so.10"),
        "CUDAExecutionProvider": ("libcuda.so.1",),
    }
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" in available and _loads("libcuda.so.1"):
        # cuDNN and the CUDA runtime lie in pip packages; this puts them where the provider finds them.
        ort.preload_dlls()
    gpu = [name for name, libraries in needs.items() if name in available and all(map(_loads, libraries))]
    return (*gpu, "CPUExecutionProvider")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _value(node: Any) -> Value:
    dtype: str = node.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return Value(node.name, {"float": "float32", "double": "float64"}.get(dtype) or dtype, shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
