"""What every runtime is to parity and to the server: images in, logits out. No torch, no onnx."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.spec import Spec
from export.model_file.signature import Reading


@dataclass(frozen=True)
class Model:
    """What an exported file says of itself."""

    name: str  # "DiracNet-16-1", or the file's stem for a net without our spec
    digest: str  # sha256 of the artefact, hex
    spec: Spec
    provenance: dict[str, Any]  # what training, fold and export recorded; empty for somebody else's net
    num_bytes: int = 0  # of the artefact
    reading: Reading | None = None  # how somebody else's net is read; None for ours

    @property
    def gives_probabilities(self) -> bool:
        """Whether what the net gives are probabilities already."""
        return self.reading is not None and self.reading.scores == "probabilities"


class Runtime(Protocol):
    """An exported file made callable. Safe to call from one thread at a time; what it holds ends with it."""

    model: Model
    platform: str  # for programs, as the Open Inference Protocol spells it: "onnxruntime_onnx"
    description: str  # for people: "ONNX Runtime, CPUExecutionProvider"
    library: str  # for the log and never for clients: "onnxruntime 1.31.1"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] → logits float32 [N, K], for any N ≥ 1."""
        ...
