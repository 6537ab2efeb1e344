"""Modules of this project in Python processes of their own, which may crash or hang without harming this one."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, sys
_, sys.path[0], module, *args = sys.argv
sys.exit(importlib.import_module(module).run(*args))
"""


class ProcessFailed(Exception):
    """The process has ended with `status`, or does not answer in time: then `status` is None."""

    def __init__(self, what: str, status: int | None = None) -> None:
        super().__init__(what)
        self.status = status


class Child:
    """A process that calls `run` of `module` with `args` as text, and has its end of a connection as descriptor 0.

    Messages call it `name`. `options` are those of Popen. Standard output is discarded, as libraries print on it.
    Ctrl-C is only for the parent.
    """

    def __init__(self, module: str, *args: object, name: str = "its process", **options: Any) -> None:
        argv, self._name = [sys.executable, "-c", PROGRAM, str(_ROOT), module, *map(str, args)], name
        self._connection, theirs = Pipe()
        with theirs:
            options = {"stdin": theirs.fileno(), "stdout": subprocess.DEVNULL, "process_group": 0, **options}
            self.process = subprocess.Popen(argv, **options)

    def send(self, message: object) -> None:
        """Send bytes as they are, and anything else pickled. Raises ProcessFailed."""
        with self._ending():
            self._connection.send_bytes(message if isinstance(message, bytes) else pickle.dumps(message))

    def receive(self, patience_s: float | None = None) -> bytes:
        """The next message, for which it waits as long as `patience_s`. Raises ProcessFailed."""
        with self._ending():
            if self._connection.poll(patience_s):
                return self._connection.recv_bytes()
        raise ProcessFailed(f"{self._name} does not answer within {patience_s:g} s")

    def kill(self) -> None:
        """End the process, and with it `receive`; from any thread."""
        self.process.kill()

    def close(self) -> None:
        """End the process and the connection."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            status = self.process.wait()
            raise ProcessFailed(f"{self._name} ended with status {status}", status) from None
