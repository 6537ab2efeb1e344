"""A model in its own process, where it may crash, hang or be slow without harming the one that serves."""

import json
import os
import shlex
import struct
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import numpy as np

from common import child
from common.cli import given_arguments
from common.refusal import Refusal
from export.runtimes.runtime import Model
from serve.config import ServeConfig
from serve.request.access import KEY_VARIABLE

REFUSED, SECONDS = "refused", "<d"


class ProcessFailed(Exception):
    """The process has ended, or must be ended."""


class BatchFailed(Exception):
    """The model raised; its process continues."""


@dataclass(frozen=True)
class Identity:
    """The properties of a model that decide whether another one can shadow it."""

    name: str
    digest: str
    runtime: str
    image: tuple[int, ...]  # height, width, channels
    resize: int | None  # as in ImageSpec; both models get the same pixels
    labels: tuple[str, ...]
    gives_probabilities: bool
    temperature: float

    @classmethod
    def of(cls, model: Model, runtime: str = "") -> "Identity":
        spec, image = model.spec, model.spec.image
        prepared = image.shape, image.resize
        answered = spec.labels, model.gives_probabilities, spec.temperature
        return cls(model.name, model.digest, runtime, *prepared, *answered)

    @classmethod
    def from_json(cls, content: bytes) -> "Identity":
        """Reads the first message of serve/model/worker.py; raises the Refusal that it may hold."""
        fields: Any = json.loads(content)
        if REFUSED in fields:
            raise Refusal(str(fields[REFUSED]))
        fields["image"], fields["labels"] = tuple(fields["image"]), tuple(fields["labels"])
        return cls(**fields)


class ModelProcess:
    """A process whose model, described by `identity`, is loaded, checked and warmed up. A context manager."""

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
            self.identity = self._read_identity(" and ".join(map(str, paths)), config.reload_seconds)
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
            self._connection.send_bytes(images.tobytes())
            if not self._connection.poll(patience_s):
                raise ProcessFailed(f"it did not answer within {patience_s:g} s")
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise ProcessFailed(f"its process ended with status {self._process.wait()}") from None
        return read_answer(answer, (len(images), len(self.identity.labels)))

    def _read_identity(self, name: str, patience_s: float) -> Identity:
        try:
            if not self._connection.poll(patience_s):
                raise Refusal(f"{name} does not answer within {patience_s:g} s; give it longer with --reload-seconds")
            return Identity.from_json(self._connection.recv_bytes())
        except (EOFError, OSError):
            status = self._process.wait()
            raise Refusal(f"{name} ends the process that loads it with status {status}; export it again") from None


def read_answer(answer: bytes, shape: tuple[int, int]) -> tuple[float, np.ndarray]:
    """Reads the answer of serve/model/worker.py for a batch; raises BatchFailed."""
    head = struct.calcsize(SECONDS)
    (seconds,) = struct.unpack(SECONDS, answer[:head])
    if isnan(seconds):
        raise BatchFailed(answer[head:].decode(errors="replace").splitlines()[0][:300])
    if len(answer) != head + 4 * shape[0] * shape[1]:
        raise BatchFailed(f"it gives {len(answer) - head} bytes for logits {list(shape)}")
    return seconds, np.frombuffer(answer[head:], np.float32).reshape(shape)
