"""The Open Inference Protocol over gRPC, asked by NVIDIA's client and by hand, of a server that speaks HTTP too."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from rpc_calls import NAME, SERVICE, Raw, images_of, request_of, tritons
from serving import until
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from serve.request import problems
from serve.request.access import EVERYBODY, Access
from serve.request.batcher import Batcher
from serve.request.job import Served
from serve.request.limits import Limits
from serve.v2.grpc_server import GrpcServer


def logits_of(message):
    answer = pb.ModelInferResponse.FromString(message)
    return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)


def test_nvidias_client_reads_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready(NAME, "2")
    assert client.get_server_metadata(as_json=True)["extensions"] == ["classification"]
    expected = {
        "name": NAME,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": ["-1", "8", "8", "3"]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": ["-1", "10"]}],
    }
    assert client.get_model_metadata(NAME, as_json=True) == expected
    assert client.get_model_metadata(NAME, "1", as_json=True) == expected


def test_nvidias_client_gets_the_models_logits(client, runtime, pixels):
    for num_images in (1, 5):
        images = pixels[:num_images]
        result = client.infer(NAME, images_of(images), request_id="a b", model_version="1")
        answer = result.get_response()
        assert (answer.id, answer.model_name, answer.model_version) == ("a b", NAME, "1")
        logits = result.as_numpy("logits")
        assert (logits.dtype, logits.shape) == (np.float32, (num_images, 10))
        np.testing.assert_allclose(logits, runtime(images), rtol=1e-5, atol=1e-5)


def test_a_message_that_is_read_in_a_thread_gives_the_same(serve_rpc, runtime, images):
    """384 images of 192 bytes are longer than what the event loop reads itself."""
    many = images(384)
    with serve_rpc(runtime, Limits(max_images=384)) as served, tritons(served.target) as client:
        logits = client.infer(NAME, images_of(many)).as_numpy("logits")
    np.testing.assert_allclose(logits, runtime(many), rtol=1e-4, atol=1e-4)


def test_typed_tensors_are_answered_with_typed_ones(served_rpc, runtime, pixels, encode):
    expected = runtime(pixels[:2])
    for datatype, shape, contents in (
        ("UINT8", pixels[:2].shape, {"uint_contents": pixels[:2].ravel().tolist()}),
        ("BYTES", [2], {"bytes_contents": [encode(image) for image in pixels[:2]]}),
    ):
        tensor = {"name": "images", "datatype": datatype, "shape": shape, "contents": contents}
        message = request_of(pixels, inputs=[tensor], raw_input_contents=[])
        answer = pb.ModelInferResponse.FromString(served_rpc.raw(message)[1])
        assert not answer.raw_output_contents
        assert list(answer.outputs[0].shape) == [2, 10]
        logits = np.reshape(answer.outputs[0].contents.fp32_contents, (2, 10))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_typed_classes_are_those_of_the_bytes(served_rpc, client, pixels):
    outputs = [triton.InferRequestedOutput("logits", class_count=2)]
    expected = client.infer(NAME, images_of(pixels[:1]), outputs=outputs).as_numpy("logits")
    contents = {"uint_contents": pixels[:1].ravel().tolist()}
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "contents": contents}
    asked = {"name": "logits", "parameters": {"classification": {"int64_param": 2}}}
    message = request_of(pixels, inputs=[tensor], raw_input_contents=[], outputs=[asked])
    answer = pb.ModelInferResponse.FromString(served_rpc.raw(message)[1])
    assert list(answer.outputs[0].contents.bytes_contents) == expected[0].tolist()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_http_and_grpc_answer_side_by_side_on_one_event_loop(serve_rpc, runtime, pixels, encode, loop):
    """Both loops that uvicorn takes: gRPC reads its events through a socket of theirs."""
    file = encode(pixels[0])
    with serve_rpc(runtime, loop=loop) as served, ThreadPoolExecutor(8) as threads, httpx.Client(timeout=60) as http:
        rpc = [threads.submit(served.raw, request_of(pixels[:1])) for _ in range(200)]
        headers = {"Content-Type": "image/png"}
        web = [threads.submit(http.post, f"{served.url}/predict", content=file, headers=headers) for _ in range(50)]
        answers = [call.result()[:2] for call in rpc]
        assert {answer.result().status_code for answer in web} == {200}
    assert {status for status, _ in answers} == {"OK"}
    np.testing.assert_allclose([logits_of(said)[0] for _, said in answers], [runtime(pixels[:1])[0]] * 200, rtol=1e-4)


def test_an_answer_has_the_requests_id_and_says_where_the_time_went(served_rpc, pixels):
    _, _, metadata = served_rpc.raw(request_of(pixels[:1]), metadata=[("x-request-id", "mine")])
    assert metadata["x-request-id"] == "mine"
    times = dict(re.findall(r"(\w+);dur=(\d+\.\d\d)", metadata["server-timing"]))
    assert list(times) == ["decode", "queue", "model", "total"]
    assert float(times["total"]) > 0
    visit = served_rpc.visits.get(timeout=60)
    assert (visit.id, visit.path, visit.status, visit.num_images) == (b"mine", f"{SERVICE}ModelInfer", 200, 1)
    assert visit.client == "127.0.0.1"


def test_calls_stand_in_the_metrics_beside_requests(served_rpc, pixels):
    served_rpc.raw(request_of(pixels[:1]))
    served_rpc.raw(request_of(pixels[:1], model_name="other"))
    served_rpc.raw(b"", "ModelConfig")  # is not there, and makes no series
    shown = httpx.get(f"{served_rpc.url}/metrics", timeout=60).text
    for status in (200, 404):
        assert f'diracnet_requests_total{{path="{SERVICE}ModelInfer",status="{status}"}} 1.0' in shown
    assert "ModelConfig" not in shown
    assert 'diracnet_predict_seconds_count{stage="total"} 1.0' in shown


def test_every_method_has_a_series_and_no_other_address_makes_one(served_rpc):
    methods = ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"]
    for method in methods:
        served_rpc.raw(b"", method)
    for made_up in ("", "Made-up", "ModelInfer/1"):
        httpx.get(f"{served_rpc.url}{SERVICE}{made_up}", timeout=60)
    shown = httpx.get(f"{served_rpc.url}/metrics", timeout=60).text
    paths = set(re.findall(r'diracnet_requests_total\{path="([^"]*)"', shown))
    assert paths == {*(SERVICE + method for method in methods), "other"}


def test_a_key_guards_the_model_and_not_the_probes(serve_rpc, runtime, pixels):
    with serve_rpc(runtime, access=Access(api_key=b"key")) as served, tritons(served.target) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        for method in ("ServerMetadata", "ModelMetadata", "ModelReady", "ModelInfer"):
            status, said, metadata = served.raw(b"", method)
            assert (status, metadata["problem-type"]) == ("UNAUTHENTICATED", problems.UNAUTHORIZED.type)
            assert "send the server's key" in said
        assert served.raw(request_of(pixels), metadata=[("x-api-key", "kez")])[0] == "UNAUTHENTICATED"
        for headers in ({"x-api-key": "key"}, {"authorization": "Bearer key"}):
            assert client.infer(NAME, images_of(pixels), headers=headers).as_numpy("logits").shape == (5, 10)


def test_what_is_reloaded_answers(serve_rpc, runtime, other_runtime, pixels):
    options = {"access": Access(api_key=b"key"), "load": lambda: (other_runtime,)}
    key = {"x-api-key": "key"}
    with serve_rpc(runtime, **options) as served, tritons(served.target) as client:
        before = client.infer(NAME, images_of(pixels), headers=key).as_numpy("logits")
        assert httpx.post(f"{served.url}/admin/reload", headers=key, timeout=60).status_code == 200
        after = client.infer(NAME, images_of(pixels), headers=key).as_numpy("logits")
    np.testing.assert_allclose(before, runtime(pixels), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after, other_runtime(pixels), rtol=1e-4, atol=1e-4)


def test_an_answer_has_the_labels_of_the_model_that_computed_it(serve_rpc, runtime, pixels):
    """A model with other labels takes the place of the first one while that computes."""
    spec = replace(runtime.model.spec, labels=tuple(f"new {index}" for index in range(10)))
    new = Served((SimpleNamespace(model=replace(runtime.model, spec=spec), description="new", platform="new"),))

    class Replaced:
        model, description, platform = runtime.model, "old", "old"

        def __call__(self, images):
            if images.any():  # the black image warms up
                batcher.served = new
            return runtime(images)

    batcher = Batcher(Served((Replaced(),)), Limits())
    outputs = [triton.InferRequestedOutput("logits", class_count=1)]
    with serve_rpc(batcher) as served, tritons(served.target) as client:
        ((text,),) = client.infer(NAME, images_of(pixels[:1]), outputs=outputs).as_numpy("logits")
    assert text.decode().split(":")[2] == f"label {runtime(pixels[:1]).argmax()}"


def test_the_deadline_is_the_servers_and_counts_from_before_the_message(serve_rpc, runtime, pixels, monkeypatch):
    begins, deadlines, receive = [], [], GrpcServer._receive

    async def noting(self, *given):
        begins.append(asyncio.get_running_loop().time())
        return await receive(self, *given)

    class Noting(Batcher):
        async def classify(self, *given, deadline, **options):
            deadlines.append(deadline)
            return await super().classify(*given, deadline=deadline, **options)

    monkeypatch.setattr(GrpcServer, "_receive", noting)
    limits = Limits(deadline_s=1000)
    with serve_rpc(Noting(Served((runtime,)), limits), limits) as served:
        assert served.raw(request_of(pixels), timeout=2000)[0] == "OK"
    assert deadlines[0] - limits.deadline_s <= begins[0]


def test_a_model_that_is_not_ready_is_said_to_be_so(served_rpc, client):
    served_rpc.app.prober._batcher.find_fault = lambda: "memory may be damaged"
    assert not client.is_server_ready()
    assert not client.is_model_ready(NAME)


def test_a_full_queue_is_unavailable_and_says_when_to_come_again(serve_rpc, gated, pixels):
    gated.open()
    with serve_rpc(gated, Limits(max_images=5, max_queue=5)) as served:
        gated.close()
        first = served.raw.start(request_of(pixels))
        gated.wait()
        status, said, metadata = served.raw(request_of(pixels[:1]))
        assert (status, metadata["problem-type"]) == ("UNAVAILABLE", problems.OVERLOADED.type)
        assert "5 images are waiting; retry in 1 s" in said
        assert (metadata["retry-after"], metadata["grpc-retry-pushback-ms"]) == ("1", "1000")
        gated.open()
        assert logits_of(first.result()).shape == (5, 10)


class Ahead:
    """The context of a call, by a clock that is ahead of its client's."""

    def __init__(self, context, by_s):
        self._context, self._by_s = context, by_s

    def time_remaining(self):
        return max(0.0, self._context.time_remaining() - self._by_s)

    def __getattr__(self, name):
        return getattr(self._context, name)


def late(call):
    """The outcome of the first call whose message was read within its short deadline."""
    return until(lambda: (outcome := call())[2]["problem-type"] != problems.TIMEOUT.type and outcome)


def test_the_deadline_of_a_call_holds_while_the_model_is_busy(serve_rpc, gated, pixels, monkeypatch):
    """Client and server count it down each by itself, and the first to find it over ends the call."""
    ahead_s, infer = 0.0, GrpcServer._infer
    monkeypatch.setattr(GrpcServer, "_infer", lambda self, context, visit: infer(self, Ahead(context, ahead_s), visit))
    gated.open()
    with serve_rpc(gated) as served:
        gated.close()
        first = served.raw.start(request_of(pixels))
        gated.wait()
        for timeout in (0.001, 0.3):  # it may never leave its client, or end before it is in the queue
            assert served.raw(request_of(pixels[:1]), timeout=timeout)[0] == "DEADLINE_EXCEEDED"
        ahead_s = 59.7
        status, _, metadata = late(lambda: served.raw(request_of(pixels[:1])))
        assert (status, metadata["problem-type"]) == ("DEADLINE_EXCEEDED", problems.DEADLINE.type)
        gated.open()
        assert first.result()
        statuses = {served.visits.get_nowait().status for _ in range(served.visits.qsize())}
        assert {200, 504} <= statuses <= {200, 408, 499, 504}
        assert gated.batches == [5]  # what came too late was not computed


@pytest.mark.parametrize(("left_s", "status"), [(0, 504), (5.0, 499), (None, 499)])
def test_a_call_that_grpc_ends_was_late_or_its_client_has_gone(left_s, status):
    async def ended(context, visit):
        raise asyncio.CancelledError

    visits, address = [], "ipv4:127.0.0.1:1234"
    server = GrpcServer("", None, SimpleNamespace(finish=visits.append), None, Limits(), EVERYBODY)
    context = SimpleNamespace(invocation_metadata=tuple, peer=lambda: address, time_remaining=lambda: left_s)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(server._handle(f"{SERVICE}ModelInfer", "/v2/models", ended, None, context))
    assert [visit.status for visit in visits] == [status]


def test_a_server_without_an_answer_says_so_at_its_own_deadline(serve_rpc, gated, pixels):
    gated.open()
    with serve_rpc(gated, Limits(deadline_s=0.2)) as served:
        gated.close()
        status, said, metadata = late(lambda: served.raw(request_of(pixels), timeout=None))
        assert (status, metadata["problem-type"]) == ("DEADLINE_EXCEEDED", problems.DEADLINE.type)
        assert "no answer within 0.2 s" in said
        gated.open()


def test_a_call_that_is_cancelled_leaves_the_queue(serve_rpc, gated, pixels):
    gated.open()
    with serve_rpc(gated, Limits(max_images=5, max_queue=10)) as served:
        gated.close()
        first, second = (served.raw.start(request_of(pixels)) for _ in range(2))
        gated.wait()
        until(lambda: served.app.prober._batcher.num_held == 10)  # the second is there too
        second.cancel()
        visit = served.visits.get(timeout=60)
        assert visit.status == 499
        third = served.raw.start(request_of(pixels))  # has its place
        gated.open()
        assert first.result()
        assert third.result()


def test_a_broken_model_is_a_problem_of_its_own(serve_rpc, runtime, pixels):
    def overflow(images):
        return np.full((len(images), 10), np.inf, np.float32)

    def fail(images):
        if images.any():  # the black image warms up
            raise RuntimeError("secret")
        return np.zeros((len(images), 10), np.float32)

    for broken, kind in ((overflow, problems.NOT_A_NUMBER), (fail, problems.INTERNAL)):
        broken.model, broken.description, broken.platform = runtime.model, "broken", "none"
        with serve_rpc(broken) as served:
            status, said, metadata = served.raw(request_of(pixels))
        assert (status, metadata["problem-type"]) == ("INTERNAL", kind.type)
        assert "secret" not in said


def test_what_is_under_way_is_answered_when_the_server_stops_and_nothing_more(serve_rpc, gated, pixels):
    gated.open()
    with serve_rpc(gated) as served:
        gated.close()
        first = served.raw.start(request_of(pixels))
        gated.wait()
        served.app.grpc.begin_stop()
        refused = served.raw(request_of(pixels[:1]))
        assert refused[:2] == ("UNAVAILABLE", "the server is stopping; try another one")
        assert (refused[2]["problem-type"], refused[2]["retry-after"]) == (problems.NOT_READY.type, "1")
        assert served.raw(b"", "ServerLive")[0] == "UNAVAILABLE"
        gated.open()
        assert logits_of(first.result()).shape == (5, 10)


def test_what_is_still_under_way_at_the_end_of_the_drain_is_refused(serve_rpc, gated, pixels):
    gated.open()
    with serve_rpc(gated, drain_s=0.1) as served:
        gated.close()
        first = served.raw.start(request_of(pixels))
        gated.wait()
        loop, stop = served.app.grpc._loop, served.app.grpc.stop
        asyncio.run_coroutine_threadsafe(stop(), loop).result(60)
        assert (first.code().name, first.details()) == ("UNAVAILABLE", "the server is stopping; try another one")
        gated.open()


def test_two_connections_share_one_server(served_rpc, pixels):
    barrier = threading.Barrier(2, timeout=60)

    def ask():
        raw = Raw(served_rpc.target)
        barrier.wait()
        return raw(request_of(pixels))[0]

    with ThreadPoolExecutor(2) as threads:
        assert [call.result() for call in [threads.submit(ask) for _ in range(2)]] == ["OK", "OK"]


def test_nvidias_client_raises_what_the_server_says(client, pixels):
    with pytest.raises(InferenceServerException, match=r"\[StatusCode.NOT_FOUND\] the model here is 'DiracNet-10"):
        client.infer("other", images_of(pixels))
    with pytest.raises(InferenceServerException, match=r"version '1'; got 'DiracNet-10-0.25', version '7'"):
        client.infer(NAME, images_of(pixels), model_version="7")
