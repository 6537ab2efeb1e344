"""ONNX Runtime: an .onnx file made callable on the best provider that can really load."""

import ctypes
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.runtimes.runtime import Model
from train.files import read_whole, sha256
from train.refusal import Refusal
from train.spec import ImageSpec, Spec


class OnnxSession:
    """One ONNX Runtime session; `model` and `description` as in `Runtime`.

    A net of ours takes `images` uint8 [N, H, W, C]. Somebody else's may take uint8 or float,
    [N, H, W, C] or [N, C, H, W]; float input gets pixels scaled to [0, 1], and labels are generic.
    """

    def __init__(self, path: Path, *, providers: tuple[str, ...] | None = None, num_threads: int = 0) -> None:
        content = read_whole(path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(content, options, providers=list(providers or loadable_providers()))
        except Exception as error:  # ONNX Runtime raises a private hierarchy of its own
            raise Refusal(f"{path} cannot be loaded as an ONNX model: {_first_line(error)}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._input, self._output = (
            _only(path, "input", self._session.get_inputs()),
            self._session.get_outputs()[0],
        )
        self._channels_first, sizes = _layout(path, self._input)
        if "spec" in metadata:
            spec = Spec.from_json(metadata["spec"])
            name, provenance = spec.name, json.loads(metadata.get("provenance", "{}"))
        else:
            spec = _generic_spec(sizes, num_classes=self._count_classes(path, sizes))
            name, provenance = path.stem, {}
        self.model = Model(name=name, digest=sha256(content), spec=spec, provenance=provenance)
        self.description = f"ONNX Runtime {ort.__version__}, {self._session.get_providers()[0]}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        batch = self._input.shape[0]
        if isinstance(batch, int) and len(images) != batch:  # a fixed batch: in pieces, the last one padded
            pieces = [images[start : start + batch] for start in range(0, len(images), batch)]
            return np.concatenate([self._run(_pad(piece, batch))[: len(piece)] for piece in pieces])
        return self._run(images)

    def _run(self, images: np.ndarray) -> np.ndarray:
        x = images.transpose(0, 3, 1, 2) if self._channels_first else images
        if self._input.type != "tensor(uint8)":
            x = x.astype(np.float16 if self._input.type == "tensor(float16)" else np.float32) / 255
        logits = self._session.run([self._output.name], {self._input.name: np.ascontiguousarray(x)})[0]
        return logits.reshape(len(images), -1).astype(np.float32, copy=False)

    def _count_classes(self, path: Path, sizes: tuple[int, int, int]) -> int:
        num_classes = self._output.shape[-1] if self._output.shape else None
        if isinstance(num_classes, int):
            return num_classes
        batch = self._input.shape[0] if isinstance(self._input.shape[0], int) else 1
        num_classes = self._run(np.zeros((batch, *sizes), np.uint8)).shape[-1]
        if num_classes < 2:
            raise Refusal(f"{path} gives {num_classes} value per image; a classifier gives one per class")
        return num_classes


def loadable_providers() -> tuple[str, ...]:
    """The compiled-in providers whose libraries load here, best first.

    Asking a session for one that does not load prints red errors, so the libraries are probed first.
    """
    needs = {
        "TensorrtExecutionProvider": ("libcuda.so.1", "libnvinfer.so.10"),
        "CUDAExecutionProvider": ("libcuda.so.1", "libcudart.so.12"),
    }
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" in available and _loads("libcuda.so.1"):
        # cuDNN and the CUDA runtime lie in pip packages; this puts them where the provider finds them.
        ort.preload_dlls()
        needs["CUDAExecutionProvider"] = ("libcuda.so.1",)
    gpu = [name for name, libraries in needs.items() if name in available and all(map(_loads, libraries))]
    return (*gpu, "CPUExecutionProvider")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _only(path: Path, what: str, tensors: list) -> ort.NodeArg:
    if len(tensors) != 1:
        raise Refusal(f"{path} has {len(tensors)} {what}s; a classifier has one")
    return tensors[0]


def _layout(path: Path, tensor: ort.NodeArg) -> tuple[bool, tuple[int, int, int]]:
    """Whether channels come first, and (height, width, channels)."""
    shape = tensor.shape
    if tensor.type not in ("tensor(uint8)", "tensor(float)", "tensor(float16)"):
        raise Refusal(f"{path} takes {tensor.type}; images must be uint8, float or float16")
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
        raise Refusal(f"{path} takes {tensor.name} {shape}; export it with a fixed height, width and channels")
    if shape[3] in (1, 3):
        return False, (shape[1], shape[2], shape[3])
    if shape[1] in (1, 3):
        return True, (shape[2], shape[3], shape[1])
    raise Refusal(f"{path} takes {tensor.name} {shape}; images have 1 or 3 channels")


def _generic_spec(sizes: tuple[int, int, int], *, num_classes: int) -> Spec:
    height, width, channels = sizes
    return Spec(
        family="unknown",
        depth=0,
        width=0.0,
        nonlinearity="relu",
        image=ImageSpec(height, width, channels, (0.0,) * channels, (1.0,) * channels, resize=None),
        labels=tuple(f"class {index}" for index in range(num_classes)),
    )


def _pad(images: np.ndarray, batch: int) -> np.ndarray:
    return np.concatenate([images, np.zeros((batch - len(images), *images.shape[1:]), images.dtype)])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
