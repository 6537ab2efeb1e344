"""What the core can do without a server: the model alone, and one image decoded and classified."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from common.image import decode
from export.runtimes.onnx_session import OnnxSession

BATCH_SIZES = (1, 32)


def time_alone(model: Path, png: bytes, seconds: float) -> dict[str, float]:
    """Milliseconds, in a process on the servers' core: `model_1` and `model_32` of a batch, `decode_and_model_1`."""
    return in_a_process(_time, model, png, seconds)


def in_a_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """What a function of a module gives in a process of its own on core 0."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=os.sched_setaffinity, initargs=(0, {0})) as pool:
        return pool.submit(function, *arguments).result()


def _time(model: Path, png: bytes, seconds: float) -> dict[str, float]:
    runtime = OnnxSession(model, num_threads=1)
    spec = runtime.model.spec.image
    image = decode(png, spec)
    times = {
        f"model_{size}": _median_ms(partial(runtime, np.repeat(image[None], size, 0)), seconds) for size in BATCH_SIZES
    }
    return {**times, "decode_and_model_1": _median_ms(lambda: runtime(decode(png, spec)[None]), seconds)}


def _median_ms(action: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
