"""ONNX Runtime, told before its import to report nothing: `from export.runtimes.offline import ort`.

Since 1.31 its releases keep a number for the device and a database of usage in ~/.cache and send them to
Microsoft, unless this variable is set first.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

__all__ = ["ort"]
