"""The model alone, without a server: imported by a fresh process, so that it loads no PyTorch."""

from functools import partial
from pathlib import Path

import numpy as np

from bench.lab.rounds import median_ms
from common.image import decode
from export.runtimes.onnx_session import OnnxSession


def time_alone(model: Path, png: bytes, seconds: float) -> dict[str, float]:
    """Milliseconds of batches of 1 and 32: `model_1`, `model_32`; and of one image with its decoding."""
    runtime = OnnxSession(model, num_threads=1)
    spec = runtime.model.spec.image
    image = decode(png, spec)
    actions = {f"model_{size}": partial(runtime, np.repeat(image[None], size, 0)) for size in (1, 32)}
    actions["decode_and_model_1"] = lambda: runtime(decode(png, spec)[None])
    return {name: median_ms(action, seconds, min_calls=1) for name, action in actions.items()}
