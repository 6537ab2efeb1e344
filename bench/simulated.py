"""python bench/simulated.py PLAIN: serve/run.py with a device that is pretended: t0 + n t1 for n images, and no core.

It says nothing of the images: every answer is the same. What there is to measure is what goes on around the model.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.cli import run_command
from export.runtimes.onnx_session import OnnxSession
from serve.config import ServeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.runtimes.runtime import Runtime
    from serve.model.load import Roles

TIMES = "DIRACNET_SIMULATED_US"  # "t0,t1" in microseconds
EXAMPLES = ("DIRACNET_SIMULATED_US=200,4 python bench/simulated.py models/fashion-mnist.onnx --front-ends 2",)


class Simulated:
    """A runtime of the device."""

    platform = description = library = "simulated"

    def __init__(self, path: Path) -> None:
        self.model = OnnxSession(path, num_threads=1).model
        self._fixed_s, self._each_s = (float(text) * 1e-6 for text in os.environ[TIMES].split(","))
        self._logits = np.arange(len(self.model.spec.labels), dtype=np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        time.sleep(self._fixed_s + len(images) * self._each_s)
        return np.tile(self._logits, (len(images), 1))


def load(roles: "Roles", home: Path) -> "Sequence[Runtime]":
    """In place of the model that the file holds."""
    return [Simulated(roles.served.model_paths[0])]


def serve(config: ServeConfig) -> int:
    """The server, whole or in front ends and a device process."""
    from bench import simulated  # this one as other processes find it: what runs as a command has no name there
    from serve.front_ends import processes
    from serve.processes import serving
    from serve.run import listen

    with listen(config.host, config.port) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if config.front_ends > 1:
            return processes.run(config, listener, url, load=simulated.load)
        serving.load = lambda config: [Simulated(config.model_paths[0])]
        return serving.run(config, listener, url)


if __name__ == "__main__":
    sys.exit(run_command(serve, ServeConfig, examples=EXAMPLES))
