"""ONNX Runtime without telemetry: `from export.runtimes.offline import ort`.

Since 1.31 its releases keep a number for the device and a database of usage in ~/.cache and send them to
Microsoft, unless this variable is set before the import.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort


def cpu_session(model: bytes, **options: object) -> ort.InferenceSession:
    """A session on the CPU that reports errors only; `options` are attributes of `ort.SessionOptions`."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


__all__ = ["cpu_session", "ort"]
