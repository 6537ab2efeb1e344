"""The program of serve/model/process.py: loads a model and answers images.

Descriptor 0 is a socket to the parent. The first message is JSON: the model's identity, or why it is refused. Then the
parent sends images uint8 [N, H, W, C] in C order, and gets the seconds they took, as a float64, and logits float32
[N, K]; after an error, NaN and its text. The process ends when the parent's end closes.
"""

import json
import os
import signal
import struct
from contextlib import suppress
from dataclasses import asdict
from math import nan
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np

from common.cli import parse
from common.refusal import Refusal
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.model.check import warm_up
from serve.model.load import load
from serve.model.process import REFUSED, SECONDS, Identity
from serve.processes.signals import end_with_parent
from serve.watching import logs


def run(parent: str, nice: str, *argv: str) -> None:
    """Answer until the parent is gone. `parent` is its process id, `argv` the arguments of serve/run.py."""
    end_with_parent(signal.SIGKILL, int(parent))
    os.nice(int(nice))
    connection = Connection(0)
    with suppress(EOFError, OSError):
        try:
            runtime = _load(parse(ServeConfig, argv=argv))
        except Refusal as refusal:
            connection.send_bytes(json.dumps({REFUSED: " ".join(str(refusal).split())}).encode())
            return
        connection.send_bytes(json.dumps(asdict(Identity.of(runtime.model, runtime.description))).encode())
        shape = (-1, *runtime.model.spec.image.shape)
        while True:
            images = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(shape)
            connection.send_bytes(_answer(runtime, images))


def _load(config: ServeConfig) -> Runtime:
    """The first of the model's runtimes; all are checked and warmed up."""
    logs.configure(config.log_level)
    runtimes = load(config)
    for runtime in runtimes:
        warm_up(runtime, config.max_batch)
    return runtimes[0]


def _answer(runtime: Runtime, images: np.ndarray) -> bytes:
    start = perf_counter()
    try:
        logits = runtime(images)
    except Exception as error:  # libraries raise their own
        return struct.pack(SECONDS, nan) + f"{type(error).__name__}: {error}".encode(errors="replace")
    return struct.pack(SECONDS, perf_counter() - start) + logits.astype(np.float32).tobytes()
