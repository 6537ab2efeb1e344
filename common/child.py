"""Modules of this project in Python processes of their own."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, sys
_, sys.path[0], module, *args = sys.argv
sys.exit(importlib.import_module(module).run(*args))
"""


def command(module: str, *args: object) -> list[str]:
    """The command line that calls `run` of `module` with `args` as text, from any folder."""
    return [sys.executable, "-c", PROGRAM, str(_ROOT), module, *map(str, args)]


def start(
    module: str, *args: object, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that runs `command`, and a connection to it, which the process has as descriptor 0.

    Its standard output is discarded: libraries print on it. Ctrl-C is for the parent alone.
    """
    connection, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            command(module, *args),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env=env,
            pass_fds=pass_fds,
            process_group=0,
        )
    return process, connection
