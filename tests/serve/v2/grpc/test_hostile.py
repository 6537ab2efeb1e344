"""What a client may send over gRPC that is no request: refused in words, and nobody else is disturbed."""

import threading

import grpc
import numpy as np
import pytest
from rpc_calls import NAME, SERVICE, Raw, images_of, request_of, tritons
from serving import until
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from serve.request import problems
from serve.request.access import Access
from serve.request.limits import Limits
from serve.v2.grpc_server import Intake

BLACK = np.zeros((1, 8, 8, 3), np.uint8)


def tensor(**members):
    return pb.ModelInferRequest.InferInputTensor(
        **{"name": "images", "datatype": "UINT8", "shape": BLACK.shape, **members}
    )


def typed(kind, values):
    return {"inputs": [tensor(contents={kind: values})], "raw_input_contents": []}


class Silent:
    """A call whose message does not come; `end` when the server has answered."""

    def __init__(self, target):
        self._raw, self._ended = Raw(target), threading.Event()
        self.call = self._raw.channel.stream_unary(f"{SERVICE}ModelInfer").future(self._messages(), timeout=60)

    def _messages(self):
        self._ended.wait(60)
        yield from ()

    def end(self):
        self._ended.set()
        self._raw.channel.close()


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"inputs": []}, "inputs: List should have at least 1 item"),
        ({"inputs": [tensor(), tensor()]}, "inputs: List should have at most 1 item"),
        ({"raw_input_contents": []}, "need 192 elements, got 0"),
        ({"raw_input_contents": [bytes(192)] * 2}, "in contents, once; got 2 of raw_input_contents"),
        ({"inputs": [tensor(contents={"uint_contents": [0]})]}, "got 1 of raw_input_contents and uint_contents"),
        (
            typed("fp32_contents", [float("nan")] * 192),
            "images in UINT8 must be in uint_contents, got fp32_contents",
        ),
        (typed("int_contents", [0] * 192), "images in UINT8 must be in uint_contents, got int_contents"),
        (typed("bytes_contents", [bytes(192)]), "images in UINT8 must be in uint_contents, got bytes_contents"),
        (typed("uint_contents", [0] * 191), "need 192 elements, got 191"),
        (typed("uint_contents", [256] * 192), "from 0 to 255, got 256"),
        (typed("uint_contents", [2**32 - 1] * 192), "from 0 to 255, got 4294967295"),
        ({"outputs": [{"name": "classes"}]}, "outputs.0.name: Input should be 'logits', got 'classes'"),
        ({"outputs": [{"name": "logits"}] * 2}, "outputs: List should have at most 1 item"),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": {"string_param": "5"}}}]},
            "classification: Input should be a valid integer, got '5'",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": {}}}]},
            "classification: Input should be a valid integer, got ''",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": {"int64_param": -1}}}]},
            "classification: Input should be greater than 0, got -1",
        ),
    ],
)
def test_hostile_tensors_are_invalid_arguments(served_rpc, change, detail):
    status, said, metadata = served_rpc.raw(request_of(BLACK, **change))
    assert (status, metadata["problem-type"]) == ("INVALID_ARGUMENT", problems.BAD_REQUEST.type)
    assert detail in said
    assert len(said) < 400


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 50,
        b"\0",
        b"\x0a\xff\xff\xff\xff\x0f",  # a name of 4 GB
        b"\x0a\x02\xff\xff",  # a name that is no text
        b"\x2b" * 100_000,  # groups in groups, of which there are none
        b"\x2a\x83\x80\x80\x00" + bytes(100_000),
        request_of(BLACK)[:-1],
    ],
)
def test_what_is_no_message_is_an_invalid_argument(served_rpc, message):
    status, said, _ = served_rpc.raw(message)
    assert status == "INVALID_ARGUMENT"
    assert "the message is not a valid ModelInferRequest" in said
    assert served_rpc.raw(b"\xff" * 50, "ModelMetadata")[0] == "INVALID_ARGUMENT"
    assert served_rpc.raw(request_of(BLACK))[0] == "OK"


def test_other_methods_are_unimplemented(served_rpc):
    for method in ("ModelStreamInfer", "ModelConfig", "RepositoryModelUnload", "SystemSharedMemoryRegister", "Nothing"):
        assert served_rpc.raw(b"", method)[0] == "UNIMPLEMENTED"
    call = served_rpc.raw.channel.unary_unary("/other.Service/ModelInfer").future(b"", timeout=60)
    assert call.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_limits_are_those_of_http(served_rpc, encode):
    status, said, _ = served_rpc.raw(request_of(BLACK, raw_input_contents=[bytes(200_000)]))
    assert (status, "200" in said) == ("RESOURCE_EXHAUSTED", True)
    assert served_rpc.visits.get(timeout=60).status == 413
    many = np.zeros((41, 8, 8, 3), np.uint8)
    status, said, metadata = served_rpc.raw(request_of(many))
    assert (status, metadata["problem-type"]) == ("RESOURCE_EXHAUSTED", problems.TOO_MANY_IMAGES.type)
    assert "40 images at most" in said
    file = encode(np.zeros((1000, 1001), np.uint8))
    files = [tensor(datatype="BYTES", shape=[1], contents={"bytes_contents": [file]})]
    status, said, metadata = served_rpc.raw(request_of(BLACK, inputs=files, raw_input_contents=[]))
    assert (status, metadata["problem-type"]) == ("RESOURCE_EXHAUSTED", problems.TOO_MANY_PIXELS.type)
    assert "1001x1000" in said


def test_a_refusal_of_many_bad_files_is_not_too_long_for_its_client(served_rpc):
    files = np.array([b"no image"] * 40, dtype=np.object_)
    with tritons(served_rpc.target) as client, pytest.raises(InferenceServerException) as caught:
        client.infer(NAME, images_of(files, "BYTES"))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message().startswith("image 1 of 40: not a PNG")


def test_a_compressed_message_is_refused(served_rpc):
    """20 MB of it may be 20 GB."""
    status, said, _ = served_rpc.raw(request_of(BLACK), compression=grpc.Compression.Gzip)
    assert status == "UNIMPLEMENTED"
    assert "is disabled" in said


@pytest.mark.parametrize("field", [b"\x2a\0", b"\x22\0", b"\x32\0", b"\x3a\0", b"\x08\0", b"\x2a\x02\x2a\0"])
def test_a_message_that_would_grow_in_memory_is_refused(served_rpc, field):
    status, said, metadata = served_rpc.raw(field * (190_000 // len(field)))
    assert (status, metadata["problem-type"]) == ("RESOURCE_EXHAUSTED", problems.TOO_LARGE.type)
    assert "more than 4,096 fields" in said


def test_more_bodies_than_may_be_held_are_refused(serve_rpc, gated):
    """A message counts while its images wait, and no longer."""
    gated.open()
    limits = Limits(max_body_bytes=100_000, max_held_bytes=100_000, max_images=4, deadline_s=60)
    large = request_of(BLACK, parameters={"x": {"string_param": "x" * 60_000}})
    with serve_rpc(gated, limits) as served:
        gated.close()
        first = served.raw.start(large)
        gated.wait()
        status, said, metadata = served.raw(large)
        assert (status, metadata["problem-type"]) == ("UNAVAILABLE", problems.OVERLOADED.type)
        assert "100,000 bytes of requests are held already" in said
        gated.open()
        assert first.result()
        assert served.raw(large)[0] == "OK"


def test_a_client_that_sends_nothing_holds_up_nobody(serve_rpc, runtime, monkeypatch):
    """There is one place to receive a message, and whoever sits in it makes room for the next."""
    monkeypatch.setattr(Intake, "patience_s", 0.05)
    limits = Limits(max_body_bytes=100_000, max_held_bytes=100_000, max_images=4)
    with serve_rpc(runtime, limits) as served:
        silent = Silent(served.target)
        until(lambda: served.app.grpc._intake._started)  # it has the place
        assert served.raw(request_of(BLACK))[0] == "OK"
        assert silent.call.code() == grpc.StatusCode.UNAVAILABLE
        assert "not complete within 0.05 s while others waited" in silent.call.details()
        silent.end()


def test_a_message_that_never_comes_ends_at_the_servers_deadline(serve_rpc, runtime):
    with serve_rpc(runtime, Limits(deadline_s=0.2)) as served:
        silent = Silent(served.target)
        assert silent.call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the message was not complete within its deadline" in silent.call.details()
        silent.end()
        assert served.visits.get(timeout=60).status == 408


def test_the_servers_key_is_asked_for_before_a_message_is_received(serve_rpc, runtime):
    with serve_rpc(runtime, access=Access(api_key=b"key")) as served:
        silent = Silent(served.target)
        assert silent.call.code() == grpc.StatusCode.UNAUTHENTICATED
        silent.end()
