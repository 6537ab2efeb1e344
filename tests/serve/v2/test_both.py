"""What the Open Inference Protocol says alike over HTTP and gRPC: one table of cases, sent over each."""

import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from rpc_calls import NAME
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from serve.request import problems

PROTOCOLS = ("http", "grpc")


@pytest.fixture(params=PROTOCOLS)
def nvidia(request, served_rpc):
    """NVIDIA's `library` for a protocol, and its `client` of a server that speaks both."""
    library, address = {
        "http": (tritonclient.http, served_rpc.url.removeprefix("http://")),
        "grpc": (tritonclient.grpc, served_rpc.target),
    }[request.param]
    with library.InferenceServerClient(address) as client:
        yield SimpleNamespace(library=library, client=client)


def infer(nvidia, array, datatype="UINT8", *, name="images", **output):
    """What the client gets for its images as bytes; `output` is what it asks of the logits."""
    tensor = nvidia.library.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    outputs = [nvidia.library.InferRequestedOutput("logits", **output)]
    return nvidia.client.infer(NAME, [tensor], outputs=outputs).as_numpy("logits")


def test_more_images_than_a_batch_keep_their_order(nvidia, runtime, images):
    many = images(40)
    np.testing.assert_allclose(infer(nvidia, many), runtime(many), rtol=1e-4, atol=1e-4)


def test_files_are_decoded_as_predict_does(nvidia, runtime, pixels, encode):
    files = np.array([encode(image) for image in pixels[:3]], dtype=np.object_)
    np.testing.assert_allclose(infer(nvidia, files, "BYTES"), runtime(pixels[:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (3, 3), (99, 10)])
def test_classification_gives_score_index_and_label(nvidia, runtime, pixels, asked, given):
    classes = infer(nvidia, pixels[:2], class_count=asked)
    assert classes.shape == (2, given)
    for row, logits in zip(classes, runtime(pixels[:2]), strict=True):
        best = sorted(range(10), key=lambda index: -logits[index])[:given]
        for text, index in zip(row, best, strict=True):
            score, number, label = text.decode().split(":")
            assert (int(number), label) == (index, f"label {index}")
            assert float(score) == pytest.approx(logits[index], abs=1e-5)
            assert len(score.partition(".")[2]) == 6


BLACK = np.zeros((1, 8, 8, 3), np.uint8)
NOT_A_NUMBER = np.full(BLACK.shape, np.nan, np.float32)
NO_IMAGE = np.array([b"no image"], np.object_)


@pytest.mark.parametrize(
    ("array", "datatype", "name", "message"),
    [
        (np.zeros((1, 9, 8, 3), np.uint8), "UINT8", "images", r"of shape \[N, 8, 8, 3\], got \[1, 9, 8, 3"),
        (np.zeros((8, 8, 3), np.uint8), "UINT8", "images", r"must be \[N, H, W, C\], got \[8, 8, 3\]"),
        (BLACK[:0], "UINT8", "images", r"inputs\.0\.shape\.0: Input should be greater than 0, got 0"),
        (np.zeros((41, 8, 8, 3), np.uint8), "UINT8", "images", "takes 40 images at most"),
        (NOT_A_NUMBER, "FP32", "images", "datatype: Input should be 'UINT8' or 'BYTES', got 'FP32'"),
        (BLACK.astype(bool), "BOOL", "images", "got 'BOOL'"),
        (BLACK, "UINT8", "input", "name: Input should be 'images', got 'input'"),
        (NO_IMAGE, "BYTES", "images", "not a PNG"),
        (NO_IMAGE[:, None], "BYTES", "images", r"must be \[N\], got \[1, 1\]"),
    ],
)
def test_nvidias_client_learns_what_was_wrong(nvidia, array, datatype, name, message):
    with pytest.raises(InferenceServerException, match=message):
        infer(nvidia, array, datatype, name=name)


def post(served, tensor, content):
    """The type of the problem and its words: a header in JSON, and the bytes behind it."""
    header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(content)}}]}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    response = httpx.post(f"{served.url}/v2/models/{NAME}/infer", content=header + content, headers=length, timeout=60)
    problem = response.json()
    assert response.status_code == problem["status"] == 400
    assert problem["error"] == problem["detail"]
    return problem["type"], problem["error"]


def call(served, tensor, content):
    """The same of a message with the bytes in raw_input_contents."""
    request = pb.ModelInferRequest(model_name=NAME, inputs=[tensor], raw_input_contents=[content])
    status, said, metadata = served.raw(request.SerializeToString())
    assert status == "INVALID_ARGUMENT"
    return metadata["problem-type"], said


FILES = {"datatype": "BYTES", "shape": [3]}


@pytest.mark.parametrize(
    ("change", "content", "detail"),
    [
        ({"name": "pixels"}, bytes(192), "inputs.0.name: Input should be 'images', got 'pixels'"),
        ({"name": "x" * 5000}, bytes(192), "got 'xxxx"),
        ({"datatype": ""}, bytes(192), "inputs.0.datatype: Input should be 'UINT8' or 'BYTES', got ''"),
        ({"datatype": "x" * 5000}, bytes(192), "got 'xxx"),
        ({"shape": []}, bytes(192), "inputs.0.shape: List should have at least 1 item"),
        ({"shape": [1] * 5000}, bytes(192), "inputs.0.shape: List should have at most 4 items"),
        ({"shape": [1, 8, 8]}, bytes(192), "must be [N, H, W, C], got [1, 8, 8]"),
        ({"shape": [0, 8, 8, 3]}, bytes(192), "inputs.0.shape.0: Input should be greater than 0, got 0"),
        ({"shape": [-1, 8, 8, 3]}, bytes(192), "inputs.0.shape.0: Input should be greater than 0, got -1"),
        ({"shape": [1, -8, -8, 3]}, bytes(192), "inputs.0.shape.1: Input should be greater than 0, got -8"),
        ({"shape": [1, 2**62, 2**62, 3]}, bytes(192), "elements, got 192"),
        ({"shape": [1, 2**31, 2**31, 4]}, bytes(192), "elements, got 192"),  # 0 in 64 bits
        ({"shape": [1, 4, 16, 3]}, bytes(192), "takes images of shape [N, 8, 8, 3], got [1, 4, 16, 3]"),
        ({"shape": [2, 8, 8, 3]}, bytes(192), "need 384 elements, got 192"),
        ({}, bytes(191), "need 192 elements, got 191"),
        ({}, b"", "need 192 elements, got 0"),
        ({"datatype": "BYTES", "shape": [1]}, bytes(192), "need 1 elements, got 48"),
        (FILES, b"\x05\0\0\0hell", "an image of type BYTES ends at byte 9 of 8"),
        (FILES, b"\xff\xff\xff\xff", "an image of type BYTES ends at byte 4294967299 of 4"),
        (FILES, b"\0\0", "an image of type BYTES ends at byte 4 of 2"),
        (FILES, bytes(4 * 4000), "need 3 elements, got 4,000"),
        (FILES, b"", "need 3 elements, got 0"),
    ],
)
@pytest.mark.parametrize("ask", [post, call], ids=PROTOCOLS)
def test_hostile_tensors_are_bad_requests(served_rpc, ask, change, content, detail):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], **change}
    kind, said = ask(served_rpc, tensor, content)
    assert kind == problems.BAD_REQUEST.type
    assert detail in said
    assert len(said) < 400
