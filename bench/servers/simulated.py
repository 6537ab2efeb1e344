"""python bench/servers/simulated.py PLAIN: serve/run.py with a simulated device: t0 + n t1 for n images, and no core.

Every answer is the same, whatever the images: measured is the work around the model.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from common.cli import run_command
from export.runtimes.onnx_session import OnnxSession
from export.runtimes.runtime import Runtime
from serve.config import ServeConfig
from serve.model.load import Roles

TIMES = "DIRACNET_SIMULATED_US"  # "t0,t1" in microseconds
EXAMPLES = ("DIRACNET_SIMULATED_US=200,4 python bench/servers/simulated.py models/fashion-mnist.onnx --front-ends 2",)


class Simulated:
    """A runtime that gives every image the same logits, after `fixed_s` and `each_s` for each image."""

    platform = description = library = "simulated"

    def __init__(self, path: Path, fixed_s: float, each_s: float) -> None:
        self.model, self._fixed_s, self._each_s = OnnxSession(path, num_threads=1).model, fixed_s, each_s
        logits = np.arange(len(self.model.spec.labels), dtype=np.float32)
        self._logits = np.broadcast_to(logits, (1_000_000, len(logits)))  # more than any batch; one row of memory

    def __call__(self, images: np.ndarray) -> np.ndarray:
        time.sleep(self._fixed_s + len(images) * self._each_s)
        return self._logits[: len(images)]


def load(roles: Roles, home: Path | None = None) -> Sequence[Runtime]:
    """The simulated device, with the times that the environment gives, instead of the model in the file."""
    fixed_s, each_s = (float(text) * 1e-6 for text in os.environ[TIMES].split(","))
    return [Simulated(roles.served.model_paths[0], fixed_s, each_s)]


def serve(config: ServeConfig) -> int:
    """The server, whole or in front ends and a device process."""
    from bench.servers import simulated  # a class of __main__ would have no name in other processes
    from serve.processes import serving
    from serve.run import listen

    with listen(config.host, config.port) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving.load = lambda config: list(load(Roles(config)))
        return serving.run(config, listener, url, load_on_device=simulated.load)


if __name__ == "__main__":
    sys.exit(run_command(serve, ServeConfig, examples=EXAMPLES))
