"""From a file to a runtime, by its suffix."""

from pathlib import Path

from export.runtimes.runtime import Runtime
from train.refusal import Refusal


def load_runtime(path: Path, *, device: int | None = None, num_threads: int = 0) -> Runtime:
    """`.onnx` through ONNX Runtime, `.engine` through TensorRT; anything else is refused.

    `device` is the number of a CUDA device; None takes the first one, or the CPU where there is none.
    `num_threads` is for the CPU; 0 lets ONNX Runtime choose.
    """
    match path.suffix:
        case ".onnx":
            from export.runtimes.onnx_session import OnnxSession, loadable_providers

            if device is not None and loadable_providers() == ("CPUExecutionProvider",):
                raise Refusal(f"ONNX Runtime finds no CUDA device {device} here; leave the device out to use the CPU")
            return OnnxSession(path, device=device or 0, num_threads=num_threads)
        case ".engine":
            from export.runtimes.tensorrt_engine import TensorRTEngine

            return TensorRTEngine(path, device=device or 0)
        case _:
            raise Refusal(f"{path} is neither an .onnx nor an .engine file; make one with export/to_onnx.py")
