"""What every peer does with a PNG: Pillow decodes it, one ONNX Runtime session of one thread names its class."""

import io
import json
import os

import numpy as np
import onnxruntime as ort
from PIL import Image
from typing_extensions import TypedDict


class Answer(TypedDict):
    """The most probable class of one image."""

    label: str
    index: int
    probability: float


class Classifier:
    """The model of the environment variable MODEL."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self._labels = json.loads(self._session.get_modelmeta().custom_metadata_map["spec"])["labels"]

    def __call__(self, images: list[np.ndarray]) -> list[Answer]:
        """Images uint8 [H, W, 1], one or many, in one run of the model."""
        logits = self._session.run(None, {"images": np.stack(images)})[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        return [
            {"label": self._labels[index], "index": int(index), "probability": float(row[index])}
            for index, row in zip(best, probabilities, strict=True)
        ]


def decode(content: bytes) -> np.ndarray:
    """A PNG of the model's size → uint8 [H, W, 1]."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))[..., None]
