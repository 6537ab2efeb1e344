"""Modules of this project in Python processes of their own."""

import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, sys
_, sys.path[0], module, *args = sys.argv
sys.exit(importlib.import_module(module).run(*args))
"""


def start(module: str, *args: object, **options: Any) -> tuple[subprocess.Popen[Any], Connection]:
    """A process that calls `run` of `module` with `args` as text, and a connection that it has as descriptor 0.

    `options` are those of Popen. Standard output is discarded, as libraries print on it. Ctrl-C is only for the parent.
    """
    argv = [sys.executable, "-c", PROGRAM, str(_ROOT), module, *map(str, args)]
    connection, theirs = Pipe()
    with theirs:
        options = {"stdin": theirs.fileno(), "stdout": subprocess.DEVNULL, "process_group": 0, **options}
        return subprocess.Popen(argv, **options), connection
