"""ONNX Runtime, without telemetry: an .onnx file made callable on the best provider that loads here."""

import ctypes
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole
from common.refusal import Refusal, one_line
from export.model_file.onnx_reader import digest_of, find_weights, read_graph, read_header
from export.model_file.probe import refuse_batch_dependence
from export.model_file.reading import NO_HINTS, ReadingHints
from export.model_file.signature import Value, find_signature, find_spec
from export.runtimes.runtime import Model, answer_in_pieces, next_power_of_two, pad

# Its releases from 1.31 on keep a number for the device and a database of usage in ~/.cache and send them to Microsoft,
# unless this variable is set before the import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort


class OnnxSession:
    """One ONNX Runtime session and its signature; the rest as in `Runtime`."""

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
        if device is not None and asked[0][0] == "CPUExecutionProvider":
            raise Refusal(f"ONNX Runtime finds no CUDA device {device} here; leave the device out to use the CPU")
        open_session = partial(ort.InferenceSession, content, options, providers=asked)
        try:
            self._session = open_session()
        except Exception as error:  # ONNX Runtime's exceptions are private
            raise Refusal(f"{path} cannot be loaded as an ONNX model: {one_line(error, 300)}") from error
        self.provider = self._session.get_providers()[0]  # the one in use
        is_named = providers is not None or device is not None
        if is_named and self.provider != asked[0][0]:  # ONNX Runtime only prints that it falls back to the CPU
            raise Refusal(f"{asked[0][0]} does not start here for {path}; its libraries do not fit the driver or GPU")
        self._reopen = open_session if self.provider == "CUDAExecutionProvider" else None
        self._by_size: dict[int, ort.InferenceSession] = {}
        self.description, self.library = f"ONNX Runtime, {self.provider}", f"onnxruntime {ort.__version__}"
        inputs, outputs = ([*map(_value, get())] for get in (self._session.get_inputs, self._session.get_outputs))
        self.signature, hints = find_signature(path, header, graph, inputs, outputs, hints)
        num_classes = len(header.spec.labels) if header.spec else self._count_classes(path)
        spec = find_spec(path, header, self.signature, hints, num_classes)
        name, reading = spec.name if header.spec else path.stem, self.signature.reading
        self.model = Model(name, digest_of(path, content), spec, header.provenance, len(content), reading)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        batch = self.signature.batch
        if batch and len(images) != batch:
            return answer_in_pieces(self._run, images, batch, lambda num: batch)
        return self._run(images)

    def _run(self, images: np.ndarray) -> np.ndarray:
        names, session, num_images = self.signature, self._session, len(images)
        if self._reopen and not names.batch:
            # The CUDA provider plans its convolutions anew when the batch size changes, 57 ms a call on an H200 where
            # the batch itself takes 2 (docs/gpu.md): every size has a session of its own.
            size = next_power_of_two(num_images)
            if size not in self._by_size:
                self._by_size[size] = self._reopen() if self._by_size else session
            images, session = pad(images, size), self._by_size[size]
        output = np.asarray(session.run([names.output_name], {names.input_name: names.to_input(images)})[0])
        return output.reshape(len(output), -1).astype(np.float32, copy=False)[:num_images]  # it may be [N, K, 1, 1]

    def _count_classes(self, path: Path) -> int:
        """Of a third-party net; refuses one whose answer to an image depends on its batch."""
        try:
            return refuse_batch_dependence(path, self, self.signature.sizes).shape[1]
        except Refusal:
            raise
        except Exception as error:  # a private one of ONNX Runtime, or no memory
            raise Refusal(f"{path} fails on images of noise: {one_line(error, 300)}") from error


def quiet_options(weights_folder: Path | None = None) -> ort.SessionOptions:
    """Options of a session that reports errors only; `weights_folder` holds the weights that are not in the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if weights_folder:  # the default is the working directory
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights_folder.resolve()))
    return options


def quiet_session(
    model: bytes, *, provider: str = "CPUExecutionProvider", weights_folder: Path | None = None, **attributes: object
) -> ort.InferenceSession:
    """A session that reports errors only; `attributes` are those of `ort.SessionOptions`."""
    options = quiet_options(weights_folder)
    for name, value in attributes.items():
        setattr(options, name, value)
    return ort.InferenceSession(model, options, providers=[provider])


def provider_options(name: str, device: int) -> dict[str, str]:
    """The options of a provider: the CUDA device, and no TF32, whose 10 bits of mantissa would pass for fp32.

    The default search for convolution algorithms times all of them, again for each new batch size, and a server's
    batches are of any size: cuDNN's own estimate is used instead.
    """
    options = {
        "CUDAExecutionProvider": {"device_id": str(device), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        "TensorrtExecutionProvider": {"device_id": str(device)},
    }
    return options.get(name, {})


def loadable_providers() -> tuple[str, ...]:
    """The compiled-in providers whose libraries load here, best first.

    Asking a session for one that does not load prints red errors, so the libraries are probed first.
    """
    cuda, tensorrt = ("libcuda.so.1",), ("libcuda.so.1", "libnvinfer.so.10")
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" in available and _loads("libcuda.so.1"):
        # cuDNN and the CUDA runtime lie in pip packages; this puts them where the provider finds them.
        ort.preload_dlls()
    needs = {"TensorrtExecutionProvider": tensorrt, "CUDAExecutionProvider": cuda}
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
