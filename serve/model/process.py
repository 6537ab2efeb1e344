"""A model in its own process, where it may crash, hang or be slow without harming the one that serves."""

import os
import shlex
from dataclasses import replace

import numpy as np

from common import child
from common.cli import given_arguments
from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.config import ServeConfig
from serve.request.access import KEY_VARIABLE


class ProcessFailed(Exception):
    """The process has ended, or must be ended."""


class BatchFailed(Exception):
    """The model raised; its process continues."""


class ModelProcess:
    """A process whose `model` is loaded, checked and warmed up. A context manager."""

    def __init__(self, config: ServeConfig, *, nice: int = 0, stderr: int | None = None) -> None:
        """Refuses what serve/run.py refuses, and a model that is not ready within `reload_seconds`.

        `stderr` is that of `subprocess.Popen`.
        """
        paths = config.model_paths
        options = shlex.split(given_arguments(replace(config, models=(), shadow=None, log_level="error")))
        environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        arguments = os.getpid(), nice, *paths, *options
        self._process, self._connection = child.start("serve.model.worker", *arguments, env=environment, stderr=stderr)
        try:
            name = " and ".join(path.name for path in paths)
            self.model, self.description = self._read_model(name, config.reload_seconds)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> "ModelProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._connection.close()

    def kill(self) -> None:
        """End the process and any call of `ask`; from any thread."""
        self._process.kill()
        self._process.wait()

    def ask(self, images: np.ndarray, patience_s: float) -> tuple[float, np.ndarray]:
        """Seconds, and logits float32 [N, K]; raises BatchFailed or ProcessFailed."""
        try:
            self._connection.send(images)
            if not self._connection.poll(patience_s):
                raise ProcessFailed(f"it did not answer within {patience_s:g} s")
            seconds, logits = self._connection.recv()
        except (EOFError, OSError):
            raise ProcessFailed(f"its process ended with status {self._process.wait()}") from None
        if isinstance(logits, str):
            raise BatchFailed(logits)
        expected = (len(images), len(self.model.spec.labels))
        if logits.shape != expected:
            raise BatchFailed(f"it gives logits {list(logits.shape)}, not {list(expected)}")
        return seconds, logits

    def _read_model(self, name: str, patience_s: float) -> tuple[Model, str]:
        try:
            if not self._connection.poll(patience_s):
                raise Refusal(f"{name} does not answer within {patience_s:g} s; give it longer with --reload-seconds")
            answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise Refusal(f"{name} ends the process that loads it with status {status}; export it again") from None
        if isinstance(answer, Refusal):
            raise answer
        return answer
