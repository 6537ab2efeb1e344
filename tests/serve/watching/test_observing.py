"""What operators see of a request: its id, timings, metrics, log and span."""

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from serve.request.app import make_app
from serve.request.batcher import Batcher
from serve.request.connection import Door
from serve.request.job import Served
from serve.request.limits import Limits
from serve.request.predict import Visit
from serve.watching import tracing
from serve.watching.logs import JsonFormatter, LogStream, RequestLog
from serve.watching.metrics import Metrics

ROOT = Path(__file__).resolve().parents[3]
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
            client.get("/v2/models/other")
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


@pytest.fixture
def timed(monkeypatch):
    """A visit whose times differ: 1 s of decoding, 2 in the queue, 4 in the model, 8 in all."""
    clock = iter([100.0, 108.0])
    monkeypatch.setattr("serve.request.predict.monotonic", lambda: next(clock))
    visit = Visit({"method": "POST", "path": "/predict"}, {})
    visit.take(SimpleNamespace(num_images=3, decode_s=1.0, queue_s=2.0, model_s=4.0))
    visit.status, visit.total_s = 200, 8.0
    return visit


def test_the_header_and_the_metrics_give_each_time_its_name(timed, runtime):
    assert timed.server_timing() == b"decode;dur=1000.00, queue;dur=2000.00, model;dur=4000.00, total;dur=8000.00"
    metrics = Metrics(Batcher(Served((runtime,)), Limits()), Door(1))
    metrics(timed)
    lines = metrics.render().decode().splitlines()
    for stage, seconds in (("decode", 1.0), ("queue", 2.0), ("model", 4.0), ("total", 8.0)):
        assert f'diracnet_predict_seconds_sum{{stage="{stage}"}} {seconds}' in lines


def test_the_log_and_the_span_give_each_time_its_name(timed):
    async def log(stream):
        RequestLog(stream)(timed)
        await asyncio.sleep(0)

    stream, exporter, provider = io.BytesIO(), InMemorySpanExporter(), TracerProvider()
    asyncio.run(log(stream))
    line = json.loads(stream.getvalue())
    assert [line[f"{name}_ms"] for name in ("decode", "queue", "model", "total")] == [1000, 2000, 4000, 8000]
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.Tracing(provider)(timed)
    (span,) = exporter.get_finished_spans()
    assert [span.attributes[f"diracnet.{name}_ms"] for name in ("decode", "queue", "model")] == [1000, 2000, 4000]
    assert span.end_time - span.start_time == 8_000_000_000


def test_metrics_count_requests_and_measure_their_stages(seen, runtime):
    lines = seen().splitlines()
    assert 'diracnet_requests_total{path="/predict",status="200"} 1.0' in lines
    assert 'diracnet_requests_total{path="/predict",status="422"} 1.0' in lines
    assert 'diracnet_requests_total{path="other",status="200"} 1.0' in lines
    for stage in ("decode", "queue", "model", "total"):
        assert f'diracnet_predict_seconds_count{{stage="{stage}"}} 1.0' in lines
    for path in ("/v2/…/infer", "other"):
        assert f'diracnet_requests_total{{path="{path}",status="404"}} 1.0' in lines
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
        ("GET /v2/models/other", 404, 0),
        ("GET /metrics", 200, 0),
    ]
    assert lines[0]["id"] == "mine"
    assert lines[0]["total_ms"] >= lines[0]["model_ms"] > 0


@pytest.fixture
def full():
    """A file descriptor of a disk that is full."""
    file = os.open("/dev/full", os.O_WRONLY)
    yield file
    os.close(file)


def test_lines_that_a_full_disk_does_not_take_are_counted_and_the_log_goes_on(full, tmp_path):
    stream, told = LogStream(full), []
    stream.on_drop = told.append
    for number in range(3):
        stream.write(b'{"message":"%d"}\n' % number)
        stream.flush(60)
    assert stream.num_dropped == sum(told) == 3
    with (tmp_path / "log").open("wb") as file:
        os.dup2(file.fileno(), full)  # there is room again
    stream.write(b'{"message":"4"}\n')
    stream.flush(60)
    missing, line = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (missing["level"], line["message"]) == ("warning", "4")
    assert missing["message"] == "3 lines of the log are missing: they could not be written"
    assert stream.num_dropped == 0


def test_lines_that_nobody_reads_are_bounded_and_counted():
    reader, writer = os.pipe()
    stream, told = LogStream(writer, most_bytes=200_000), []
    stream.on_drop = told.append
    line = b"x" * 999 + b"\n"
    for _ in range(1000):  # of which 200 wait or are being written, and as many are written as the pipe holds
        stream.write(line)
    lines = []
    with open(reader, "rb") as file:
        reading = threading.Thread(target=lambda: lines.extend(file))
        reading.start()
        stream.flush(60)
        stream.write(b"last\n")
        stream.flush(60)
        os.close(writer)
        reading.join(60)
    said = [json.loads(found)["message"] for found in lines if found.startswith(b"{")]
    num_missing = sum(int(message.split()[0]) for message in said)
    assert lines[-1] == b"last\n"
    assert lines.count(line) + num_missing == 1000
    assert num_missing == sum(told) > 500


def test_a_line_that_was_cut_is_ended_before_the_next():
    """The file takes what fits, and then no more: here a limit of the system's on its size, in another process."""
    program = """
import os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
from serve.watching.logs import LogStream
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
stream = LogStream(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT))
stream.write(b"first line that is too long\\n")
stream.flush(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
stream.write(b"second\\n")
stream.flush(60)
"""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        subprocess.run([sys.executable, "-c", program, str(ROOT), str(log)], check=True)
        first, missing, second = log.read_text().splitlines()
    assert (first, second) == ("first line", "second")
    assert json.loads(missing)["message"].startswith("1 lines of the log are missing")


def test_half_a_character_does_not_lose_a_line():
    record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "label \ud800", (), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "label ?"


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
    for package in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)  # it cannot be imported
            assert tracing.find_tracing(endpoint) is None


def test_packages_that_do_not_fit_together_are_not_taken_for_missing_ones(monkeypatch):
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match="cannot import name 'OTLPSpanExporter'"):
        tracing.find_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
