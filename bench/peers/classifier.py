"""The work of every peer: Pillow decodes PNGs, and one ONNX Runtime session of one thread finds their classes."""

import io
import json
import os

import numpy as np
import onnxruntime as ort
from PIL import Image
from typing_extensions import TypedDict


class Prediction(TypedDict):
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

    def __call__(self, pngs: list[bytes]) -> list[Prediction]:
        """Grey images of the model's size, one or many, in one run of the model."""
        images = [np.asarray(Image.open(io.BytesIO(png)).convert("L"))[..., None] for png in pngs]
        logits = self._session.run(None, {"images": np.stack(images)})[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        return [
            {"label": self._labels[index], "index": int(index), "probability": float(row[index])}
            for index, row in zip(probabilities.argmax(axis=1), probabilities, strict=True)
        ]
