"""A model in its own process, where it may crash, hang or be slow without harming the one that serves."""

import os
import pickle
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from common.child import Child, ProcessFailed
from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.config import ServeConfig
from serve.request.access import KEY_VARIABLE


class BatchFailed(Exception):
    """The model raised; its process continues."""


class ModelProcess(AbstractContextManager["ModelProcess"]):
    """A process whose `model` is loaded, checked and warmed up."""

    def __init__(self, config: ServeConfig, *, nice: int = 0, stderr: int | None = None) -> None:
        """Refuses what serve/run.py refuses, and a model that is not ready within `reload_seconds`."""
        environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        self._child = Child("serve.model.worker", os.getpid(), nice, env=environment, stderr=stderr)
        try:
            config = replace(config, log_level="error")
            loaded: Refusal | tuple[Model, str] = self._exchange(config, config.reload_seconds)
            if isinstance(loaded, Refusal):
                raise loaded
            self.model, self.description = loaded
        except BaseException as failure:
            self._child.close()
            if not isinstance(failure, ProcessFailed):
                raise
            name = " and ".join(path.name for path in config.model_paths)
            todo = "export it again, or allow it more time with --reload-seconds"
            raise Refusal(f"{name} cannot be loaded: {failure}; {todo}") from None

    def __exit__(self, *error: object) -> None:
        self._child.close()

    def kill(self) -> None:
        """End the process and any call of `ask`; from any thread."""
        self._child.kill()

    def ask(self, images: np.ndarray, patience_s: float) -> tuple[float, np.ndarray]:
        """Seconds, and logits float32 [N, K]; raises BatchFailed or ProcessFailed."""
        seconds, logits = self._exchange(images, patience_s)
        if isinstance(logits, str):
            raise BatchFailed(logits)
        expected = (len(images), len(self.model.spec.labels))
        if logits.shape != expected:
            raise BatchFailed(f"it gives logits {list(logits.shape)}, not {list(expected)}")
        return seconds, logits

    def _exchange(self, message: object, patience_s: float) -> Any:
        """The process's answer; raises ProcessFailed."""
        self._child.send(message)
        return pickle.loads(self._child.receive(patience_s))
