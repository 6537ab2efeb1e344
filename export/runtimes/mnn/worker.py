"""One process of export/runtimes/mnn/pool.py: a module of MNN with one thread.

Descriptor 0 is a socket to the parent, which sends images uint8 [N, H, W, C] and gets logits float32 [N, K], both as
bytes in C order; no bytes at the start say that the model is loaded. The process ends when the parent's end closes.
"""

import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np


def run(converted: str, *sizes: str) -> None:
    """Answer until the parent is gone. `converted` is a file in MNN's own format; exit status 1 if it is invalid.

    `sizes` are height, width and channels of an image.
    """
    module = _load(converted)
    connection, shape = Connection(0), (-1, *map(int, sizes))
    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            images = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(shape)
            (logits,) = module.forward([_to_input(images)])
            connection.send_bytes(logits.read())


def _load(converted: str) -> Any:
    from MNN import nn as mnn_nn

    nn = cast(Any, mnn_nn)  # takes its names from an extension module
    manager = nn.create_runtime_manager(({"backend": 0, "numThread": 1, "precision": "high"},))
    try:
        return nn.load_module_from_file(converted, ["images"], ["logits"], runtime_manager=manager)
    except SystemError:  # for every invalid file
        sys.exit(1)


def _to_input(images: np.ndarray) -> Any:
    from MNN import expr as mnn_expr

    expr = cast(Any, mnn_expr)
    # Called NCHW although channels are last: MNN would move what is called NHWC, and the graph does it itself.
    return expr.const(images, list(images.shape), expr.NCHW, expr.dtype.uint8)
