"""What operators see of a request: its id, timings, metrics, log and span."""

import io
import json
import logging
import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from serve import tracing
from serve.app import make_app
from serve.limits import Limits
from serve.logs import JsonFormatter, RequestLog

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def seen(runtime, pixels, encode):
    """`seen(observer)`: after one prediction, one refusal and one page."""

    def seen(*observers):
        with TestClient(make_app(runtime, Limits(), observers=observers)) as client:
            headers = {"X-Request-Id": "mine", "traceparent": PARENT}
            client.post("/predict", content=encode(pixels[0]), headers=headers)
            client.post("/predict", content=b"hello")
            client.get("/healthz")
            client.post("/v2/models/other/infer")
            return client.get("/metrics").text

    return seen


@pytest.mark.parametrize("given", ["abc-1", "x" * 128])
def test_a_request_keeps_its_id(client, given):
    assert client.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    assert client.post("/predict", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["x" * 129, "two words", "", "ü"])
def test_a_request_without_a_sound_id_gets_its_own(client, given):
    ids = [client.get("/healthz", headers={"X-Request-Id": given.encode()}).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch(r"[0-9a-f]{12}-\d+", made) for made in ids)
    assert len(set(ids)) == 2


def test_an_answer_says_where_its_time_went(client, pixels, encode):
    header = client.post("/predict", content=encode(pixels[0])).headers["server-timing"]
    times = dict(re.findall(r"(\w+);dur=(\d+\.\d\d)", header))
    assert list(times) == ["decode", "queue", "model", "total"]
    assert float(times["total"]) > 0


def test_metrics_count_requests_and_measure_their_stages(seen, runtime):
    lines = seen().splitlines()
    assert 'diracnet_requests_total{path="/predict",status="200"} 1.0' in lines
    assert 'diracnet_requests_total{path="/predict",status="422"} 1.0' in lines
    assert 'diracnet_requests_total{path="other",status="200"} 1.0' in lines
    for stage in ("decode", "queue", "model", "total"):
        assert f'diracnet_predict_seconds_count{{stage="{stage}"}} 1.0' in lines
    assert 'diracnet_requests_total{path="/v2/…/infer",status="404"} 1.0' in lines
    assert "diracnet_batch_images_count 1.0" in lines
    assert "diracnet_queue_images 0.0" in lines
    assert any(line.startswith("diracnet_model_info{") and runtime.model.digest in line for line in lines)
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


def test_every_app_counts_for_itself(seen):
    assert 'status="200"} 1.0' in seen()
    assert 'diracnet_requests_total{path="/predict",status="200"} 1.0' in seen()


def test_each_request_is_one_line_of_json(seen):
    stream = io.BytesIO()
    seen(RequestLog(stream))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["message"], line["status"], line["images"]) for line in lines] == [
        ("POST /predict", 200, 1),
        ("POST /predict", 422, 0),
        ("GET /healthz", 200, 0),
        ("POST /v2/models/other/infer", 404, 0),
        ("GET /metrics", 200, 0),
    ]
    assert lines[0]["id"] == "mine"
    assert lines[0]["total_ms"] >= lines[0]["model_ms"] > 0


def test_a_failure_is_one_line_too():
    try:
        raise RuntimeError("gone")
    except RuntimeError as error:
        record = logging.LogRecord(
            "a", logging.ERROR, "a.py", 1, "request %s failed", ("7",), (type(error), error, None)
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "request 7 failed"
    assert json.loads(line)["traceback"].endswith("RuntimeError: gone")


def test_each_request_is_a_span_below_its_clients(seen):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    seen(tracing.Tracing(provider))
    predicted, refused, health, *_ = exporter.get_finished_spans()
    assert predicted.name == "POST /predict"
    assert f"{predicted.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{predicted.parent.span_id:016x}" == PARENT.split("-")[2]
    assert predicted.attributes["http.response.status_code"] == 200
    assert predicted.attributes["diracnet.images"] == 1
    assert predicted.end_time > predicted.start_time
    assert refused.attributes["http.response.status_code"] == 422
    assert health.parent is None


def test_nothing_is_traced_unless_somebody_asks(monkeypatch):
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert tracing.find_tracing({}) is None
    assert tracing.find_tracing({**endpoint, "OTEL_SDK_DISABLED": "true"}) is None
    asked = tracing.find_tracing(endpoint)
    assert isinstance(asked, tracing.Tracing)
    monkeypatch.setattr(tracing, "_PACKAGES", ("opentelemetry.missing",))
    assert tracing.find_tracing(endpoint) is None
    monkeypatch.setattr(tracing, "_PACKAGES", ("missing.package",))
    assert tracing.find_tracing(endpoint) is None
