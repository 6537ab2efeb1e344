"""python bench/without.py PLAIN: serve/run.py without the one shortcut that DIRACNET_WITHOUT names."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from serve.config import ServeConfig

WITHOUT = "DIRACNET_WITHOUT"
EXAMPLES = ("DIRACNET_WITHOUT=gc.freeze python bench/without.py models/fashion-mnist.onnx",)


def _without_freeze() -> None:
    gc.freeze = lambda: None


# What each shortcut does, and how it is switched off before the server starts.
SHORTCUTS: dict[str, tuple[str, Callable[[], None]]] = {
    "gc.freeze": ("garbage collections skip what was loaded at the start", _without_freeze),
}


def serve(config: ServeConfig) -> int:
    """The server of serve/run.py without one shortcut."""
    from serve.run import serve

    if name := os.environ.get(WITHOUT):
        SHORTCUTS[name][1]()
    return serve(config)


if __name__ == "__main__":
    sys.exit(run_command(serve, ServeConfig, examples=EXAMPLES))
