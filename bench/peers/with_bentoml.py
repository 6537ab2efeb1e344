"""BentoML: one service whose adaptive batching joins the images of many requests."""

from pathlib import Path

import bentoml
from classifier import Classifier, Prediction


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Service:
    def __init__(self) -> None:
        self.classify = Classifier()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, images: list[Path]) -> list[Prediction]:
        return self.classify([path.read_bytes() for path in images])
