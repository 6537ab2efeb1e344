"""Metrics in the format of Prometheus. Each app has its own counts; workers of one server count together."""

import os
from collections.abc import Iterator
from functools import lru_cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import InfoMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from export.runtimes.cascade import Cascade
from export.runtimes.runtime import Runtime
from serve.model.prober import Prober
from serve.request.batcher import Batcher
from serve.request.connection import Door
from serve.request.predict import Visit
from serve.watching.shared_counts import COUNTS_VARIABLE

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_INFER = "/v2/…/infer"
_RPCS = "ServerLive ServerReady ServerMetadata ModelReady ModelMetadata ModelInfer".split()  # grpc_server.py
_COUNTED = {"/predict", *(f"/inference.GRPCInferenceService/{name}" for name in _RPCS)}
_STAGES = ("decode", "queue", "model", "total")
_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Call it with every finished request; `render` is the response to GET /metrics."""

    def __init__(self, batcher: Batcher, door: Door) -> None:
        self._batcher = batcher
        self.own = own = CollectorRegistry()
        requests = Counter("diracnet_requests", "Requests by address and status", ("path", "status"), registry=own)
        text = "Answered predictions: where their time went"
        seconds = Histogram("diracnet_predict_seconds", text, ("stage",), buckets=_SECONDS, registry=own)
        self._count = lru_cache(requests.labels)  # the lookup would take a fifth of the time of a call
        self._decode, self._queue, self._model, self._total = (seconds.labels(stage) for stage in _STAGES)
        computed = Computed(own)
        gauge = partial(Gauge, registry=own, multiprocess_mode="livesum")
        self._held = gauge("diracnet_queue_images", "Images accepted and not answered")
        connections = gauge("diracnet_connections", "Open connections")
        door.on_change = connections.set
        door.on_refuse = Counter("diracnet_connections_refused", "Connections beyond the limit", registry=own).inc
        replaced = Counter("diracnet_decoders_replaced", "Decoders that ended on an image", registry=own)
        batcher.decoding.on_replace = replaced.inc
        self.count_dropped_lines = Counter("diracnet_log_lines_dropped", "Lines of the log lost", registry=own).inc
        gauge("diracnet_connections_limit", "Connections that may be open").set(door.max_connections)
        self._shown = own
        if COUNTS_VARIABLE in os.environ:
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown)
        ProcessCollector(registry=self._shown)
        self._shown.register(self)
        self._shown.register(batcher.watch)
        if batcher.shadow:
            self._shown.register(batcher.shadow)
        batcher.observe_batch, batcher.observe_run = computed.observe_batch, computed.observe_run

    def __call__(self, visit: Visit) -> None:
        self._count(_label(visit.path), visit.status).inc()
        self._held.set(self._batcher.num_held)
        if visit.num_images:
            self._decode.observe(visit.decode_s)
            self._queue.observe(visit.queue_s)
            self._model.observe(visit.model_s)
            self._total.observe(visit.total_s)

    def render(self) -> bytes:
        """All values now."""
        self._held.set(self._batcher.num_held)
        return generate_latest(self._shown)

    def collect(self) -> Iterator[InfoMetricFamily]:
        """The current model, whenever metrics are collected."""
        served = self._batcher.served
        info = {"name": served.model.name, "digest": served.model.digest, "runtime": served.runtimes[0].description}
        yield InfoMetricFamily("diracnet_model", "The model that answers", value=info)


class Computed:
    """Counts batches, in the process that computes them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        text = "Images that the model computed at once"
        self.observe_batch = Histogram("diracnet_batch_images", text, buckets=_IMAGES, registry=registry).observe
        self._cascade = Counter("diracnet_cascade_images", "Images that a cascade answered", registry=registry)
        self._escalated = Counter("diracnet_cascade_escalated", "Images that int8 left to fp32", registry=registry)

    def observe_run(self, runtime: Runtime) -> None:
        """It has computed a batch."""
        if isinstance(runtime, Cascade):
            self._cascade.inc(runtime.num_last)
            self._escalated.inc(runtime.num_escalated_last)


def watch_probes(metrics: Metrics, prober: Prober) -> None:
    """Export the results of probes; of several workers the largest error and the oldest check."""
    own, text = metrics.own, "Largest relative difference of the probe images' logits from those recorded"
    error = Gauge("diracnet_probe_error", text, registry=own, multiprocess_mode="livemax")
    text = "When they were last compared"
    checked = Gauge("diracnet_probe_timestamp_seconds", text, registry=own, multiprocess_mode="livemin")
    failures = Counter("diracnet_probe_failures", "Comparisons beyond the tolerance", registry=own)

    def observe(prober: Prober) -> None:
        error.set(prober.error or 0.0)
        checked.set(prober.checked or 0.0)
        if prober.fault:
            failures.inc()

    prober.observe = observe


def _label(path: str) -> str:
    """A bounded number of label values, whatever clients ask for."""
    if path.startswith("/v2/") and path.endswith("/infer"):
        return _INFER
    return path if path in _COUNTED else "other"
