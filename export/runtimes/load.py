"""From a file to a runtime, by its suffix."""

from pathlib import Path

from export.runtimes.runtime import Runtime
from train.refusal import Refusal


def load_runtime(path: Path) -> Runtime:
    """`.onnx` through ONNX Runtime, `.engine` through TensorRT; anything else is refused."""
    match path.suffix:
        case ".onnx":
            from export.runtimes.onnx_session import OnnxSession

            return OnnxSession(path)
        case ".engine":
            from export.runtimes.tensorrt_engine import TensorRTEngine

            return TensorRTEngine(path)
        case _:
            raise Refusal(f"{path} is neither an .onnx nor an .engine file; make one with export/to_onnx.py")
