"""ONNX Runtime without telemetry: `from export.runtimes.offline import ort`.

Since 1.31 its releases keep a number for the device and a database of usage in ~/.cache and send them to Microsoft,
unless this variable is set before the import.
"""

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort


def quiet_options(weights_folder: Path | None = None) -> ort.SessionOptions:
    """Options of a session that reports errors only; `weights_folder` holds the weights that are not in the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if weights_folder:  # the default is the working directory
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights_folder.resolve()))
    return options


def cpu_session(model: bytes, *, weights_folder: Path | None = None, **attributes: object) -> ort.InferenceSession:
    """A quiet session on the CPU; `attributes` are those of `ort.SessionOptions`."""
    options = quiet_options(weights_folder)
    for name, value in attributes.items():
        setattr(options, name, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
