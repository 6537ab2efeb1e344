"""What an operator watches, in the format of Prometheus. Every app counts for itself."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from serve.batcher import Batcher

if TYPE_CHECKING:
    from serve.hot import Visit

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STAGES = ("decode", "queue", "model", "total")
_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Call it with every finished request; `render` is the answer of GET /metrics."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "diracnet_requests", "Requests by address and status", ("path", "status"), registry=self._registry
        )
        seconds = Histogram(
            "diracnet_predict_seconds",
            "Answered predictions: where their time went",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._decode, self._queue, self._model, self._total = (seconds.labels(stage) for stage in _STAGES)
        self._images = Histogram(
            "diracnet_batch_images", "Images that the model computed at once", buckets=_IMAGES, registry=self._registry
        )
        held = Gauge("diracnet_queue_images", "Images accepted and not answered", registry=self._registry)
        held.set_function(lambda: batcher.num_held)
        self._served = Info("diracnet_model", "The model that answers", registry=self._registry)
        batcher.observe_batch = self._images.observe

    def __call__(self, visit: "Visit") -> None:
        path = "/predict" if visit.path == "/predict" else "other"  # as many series as we choose, not as clients do
        self._requests.labels(path, visit.status).inc()
        if visit.num_images:
            self._decode.observe(visit.decode_s)
            self._queue.observe(visit.queue_s)
            self._model.observe(visit.model_s)
            self._total.observe(visit.total_s)

    def render(self) -> bytes:
        """All values now."""
        served = self._batcher.served
        model, runtime = served.model, served.runtimes[0].description
        self._served.info({"name": model.name, "digest": model.digest, "runtime": runtime})
        return generate_latest(self._registry)
