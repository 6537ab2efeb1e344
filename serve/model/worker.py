"""The program of serve/model/process.py: loads a model and answers images.

It has a connection to its parent as descriptor 0. The parent sends a `ServeConfig`, and gets the model and the
description of its runtime, or why it is refused. Then the parent sends images uint8 [N, H, W, C], and gets the seconds
they took and logits float32 [N, K], or after an error 0 and its text.
"""

import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np

from common.refusal import Refusal, one_line
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.model.check import warm_up
from serve.model.load import load
from serve.processes.signals import end_with_parent
from serve.watching import logs


def run(parent: str, nice: str) -> None:
    """Answer until the parent is gone. `parent` is its process id."""
    end_with_parent(signal.SIGKILL, int(parent))
    os.nice(int(nice))
    connection = Connection(0)
    with suppress(EOFError, OSError):
        try:
            runtime = _load(connection.recv())
        except Refusal as refusal:
            return connection.send(Refusal(one_line(refusal, 2000)))
        connection.send((runtime.model, runtime.description))
        while True:
            connection.send(answer_batch(runtime, connection.recv()))


def _load(config: ServeConfig) -> Runtime:
    """The first of the model's runtimes; all are checked and warmed up."""
    logs.configure(config.log_level)
    runtimes = load(config)
    warm_up(runtimes, config.max_batch)
    return runtimes[0]


def answer_batch(runtime: Runtime, images: np.ndarray) -> tuple[float, np.ndarray | str]:
    """Seconds and logits, or 0 and the text of an error."""
    start = perf_counter()
    try:
        logits = runtime(images)
    except Exception as error:  # libraries raise their own
        return 0.0, f"{type(error).__name__}: {one_line(error, 300)}"
    return perf_counter() - start, logits.astype(np.float32)
