"""From a file to a runtime, by its suffix and by name."""

from pathlib import Path
from typing import Literal

from common.refusal import Refusal
from export.model_file.reading import NO_HINTS, ReadingHints
from export.runtimes.runtime import Runtime

RuntimeName = Literal["onnxruntime", "mnn", "tensorrt", "torch"]
# By suffix; the first one is taken where none is named.
RUNTIMES: dict[str, tuple[RuntimeName, ...]] = {".onnx": ("onnxruntime", "mnn", "torch"), ".engine": ("tensorrt",)}
NAMED_ONLY = ("torch",)  # never tried for its speed: PyTorch is large, and has not been measured here on a GPU


def load_runtime(
    path: Path,
    *,
    name: RuntimeName | None = None,
    device: int | None = None,
    num_threads: int = 0,
    shares_cores: bool = False,
    hints: ReadingHints = NO_HINTS,
) -> Runtime:
    """`.onnx` through ONNX Runtime, MNN or PyTorch, `.engine` through TensorRT; anything else is refused.

    `device` is the number of a CUDA device; None takes the first one, or the CPU where there is none.
    `num_threads` is for the CPU; 0 lets the runtime choose. A session of ONNX Runtime that `shares_cores` with another
    one, in turns, gives them up after each call. `hints` are for third-party .onnx files.
    """
    match _runtime_of(path, name, hints):
        case "onnxruntime":
            from export.runtimes.onnx_session import OnnxSession

            return OnnxSession(path, device=device, num_threads=num_threads, shares_cores=shares_cores, hints=hints)
        case "mnn":
            from export.runtimes.mnn_module import MnnModule

            if device is not None:
                raise Refusal(f"MNN runs only on the CPU; leave device {device} out, or use --runtime onnxruntime")
            return MnnModule(path, num_threads=num_threads)
        case "torch":
            try:
                from export.runtimes.torch_graphs import TorchGraphs
            except ImportError as error:
                raise Refusal(f"--runtime torch needs PyTorch and ONNX: pip install torch onnx ({error})") from error

            return TorchGraphs(path, device=device)
        case "tensorrt":
            from export.runtimes.tensorrt_engine import TensorRTEngine

            return TensorRTEngine(path, device=device or 0)


def _runtime_of(path: Path, name: RuntimeName | None, hints: ReadingHints) -> RuntimeName:
    """The runtime for a file: `name`, or by its suffix; refuses one that does not run the file, or not with hints."""
    if path.suffix not in RUNTIMES:
        raise Refusal(f"{path} is neither an .onnx nor an .engine file; make one with export/to_onnx.py")
    if hints.sources and path.suffix != ".onnx":
        raise Refusal(f"{path} is read as its card says; give --mean and the like to export/to_trt.py")
    if hints.sources and name in ("mnn", "torch"):
        own = "files of this project, which say themselves how they are read"
        raise Refusal(f"{name} runs only {own}; leave {hints.flags} out, or use --runtime onnxruntime")
    names = RUNTIMES[path.suffix]
    if name and name not in names:
        raise Refusal(f"{name} does not run {path}; {path.suffix} files are for {' or '.join(names)}")
    return name or names[0]
