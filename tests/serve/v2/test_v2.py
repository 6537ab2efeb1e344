"""The Open Inference Protocol, asked by NVIDIA's client over real HTTP and by hand."""

import base64
import json

import numpy as np
import pytest
import tritonclient.http as triton
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from serve.request.access import Access
from serve.request.app import make_app
from serve.request.limits import Limits
from serve.request.problems import Problem
from serve.v2 import tensors
from serve.v2.routes import model_name

NAME = "DiracNet-10-0.25"
INFER = f"/v2/models/{NAME}/infer"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture
def triton_client(live, runtime):
    """NVIDIA's client of a real server."""
    with (
        live(make_app(runtime, Limits(max_images=40))) as url,
        triton.InferenceServerClient(url.removeprefix("http://")) as client,
    ):
        yield client


def images_of(array, datatype="UINT8", *, binary=True, name="images"):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return [tensor]


def in_json(pixels, **members):
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    return {"inputs": [{**tensor, **members}]}


def assert_protocol_problem(response, status, name, detail=""):
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"]) == (status, status), problem
    assert problem["type"] == f"urn:diracnet:problem:{name}"
    assert problem["error"] == problem["detail"]
    assert detail in problem["error"]


def test_nvidias_client_reads_health_and_metadata(triton_client):
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready(NAME)
    assert triton_client.is_model_ready(NAME, "1")
    assert not triton_client.is_model_ready("other")
    assert not triton_client.is_model_ready(NAME, "2")
    server = triton_client.get_server_metadata()
    assert set(server) == {"name", "version", "extensions"}
    assert server["extensions"] == ["binary_tensor_data", "classification"]
    expected = {
        "name": NAME,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }
    assert triton_client.get_model_metadata(NAME) == expected
    assert triton_client.get_model_metadata(NAME, "1") == expected


@pytest.mark.parametrize("sends_bytes", [True, False])
@pytest.mark.parametrize("takes_bytes", [True, False, None])
def test_nvidias_client_gets_the_models_logits(triton_client, runtime, pixels, sends_bytes, takes_bytes):
    outputs = None if takes_bytes is None else [triton.InferRequestedOutput("logits", binary_data=takes_bytes)]
    for num_images in (1, 5):
        images = pixels[:num_images]
        result = triton_client.infer(
            NAME, images_of(images, binary=sends_bytes), outputs=outputs, request_id="a b", model_version="1"
        )
        answer = result.get_response()
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a b", NAME, "1")
        logits = result.as_numpy("logits")
        assert (logits.dtype, logits.shape) == (np.float32, (num_images, 10))
        np.testing.assert_allclose(logits, runtime(images), rtol=1e-5, atol=1e-5)


def test_files_in_json_are_those_in_bytes(triton_client, pixels, encode):
    files = np.array([encode(image) for image in pixels[:3]], dtype=np.object_)
    logits = triton_client.infer(NAME, images_of(files, "BYTES")).as_numpy("logits")
    texts = np.array([base64.b64encode(file) for file in files], dtype=np.object_)
    by_json = triton_client.infer(NAME, images_of(texts, "BYTES", binary=False)).as_numpy("logits")
    np.testing.assert_array_equal(by_json, logits)


def test_classes_in_json_are_those_in_bytes(triton_client, pixels):
    outputs = (triton.InferRequestedOutput("logits", binary_data=takes, class_count=3) for takes in (True, False))
    results = [triton_client.infer(NAME, images_of(pixels[:2]), outputs=[output]) for output in outputs]
    assert {result.get_output("logits")["datatype"] for result in results} == {"BYTES"}
    in_bytes, in_json = (result.as_numpy("logits") for result in results)
    assert [[text.decode() for text in row] for row in in_bytes] == in_json.tolist()


def test_nvidias_client_learns_of_wrong_names(triton_client, pixels):
    with pytest.raises(InferenceServerException, match=f"the model here is '{NAME}', version '1'; got 'other'"):
        triton_client.infer("other", images_of(pixels))
    with pytest.raises(InferenceServerException, match=r"outputs\.0\.name: Input should be 'logits', got 'other'"):
        triton_client.infer(NAME, images_of(pixels), outputs=[triton.InferRequestedOutput("other")])
    with pytest.raises(InferenceServerException, match="encoded as gzip; send it as it is, without Content-Encoding"):
        triton_client.infer(NAME, images_of(pixels), request_compression_algorithm="gzip")


def test_data_may_be_nested_as_the_shape(client, pixels):
    flat = client.post(INFER, json=in_json(pixels[:2])).json()
    nested = client.post(INFER, json=in_json(pixels[:2], data=pixels[:2].tolist())).json()
    assert nested == flat
    assert flat["outputs"][0]["shape"] == [2, 10]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"data": [256] * 192}, "from 0 to 255, got 256"),
        ({"data": [-1] * 192}, "from 0 to 255, got -1"),
        ({"data": [2**63] * 192}, "from 0 to 255"),
        ({"data": [0.5] * 192}, "whole numbers from 0 to 255, got 0.5"),
        ({"data": [10**40] * 192}, "whole numbers from 0 to 255, got 1e"),
        ({"data": [0] * 191 + [True]}, "whole numbers from 0 to 255, got True"),
        ({"data": ["0"] * 192}, "whole numbers from 0 to 255, got '0'"),
        ({"data": [None] * 192}, "whole numbers from 0 to 255, got None"),
        ({"data": [0] * 191 + [[0]]}, "whole numbers from 0 to 255, got a list"),
        ({"data": [{}] * 192}, "whole numbers from 0 to 255, got an object"),
        ({"data": [0] * 191}, "need 192 elements, got 191"),
        ({"data": []}, "need 192 elements, got 0"),
        ({"data": None}, "need 192 elements, got 0"),
        ({"data": "0" * 192}, "inputs.0.data: Input should be a valid list, got '000"),
        ({"data": {"0": 0}}, "inputs.0.data: Input should be a valid list, got an object"),
        ({"data": [[0] * 192]}, "neither flat nor nested as its shape"),
        ({"data": [[[[0] * 3] * 8] * 7 + [0]]}, "neither flat nor nested as its shape"),
        ({"data": [[[[0] * 3] * 8] * 8] * 2}, "neither flat nor nested as its shape"),
        ({"data": [[[[[0]] * 3] * 8] * 8]}, "whole numbers from 0 to 255, got a list"),
        ({"shape": [True, 8, 8, 3]}, "inputs.0.shape.0: Input should be a valid integer, got True"),
        ({"shape": [1.0, 8, 8, 3]}, "inputs.0.shape.0: Input should be a valid integer, got 1.0"),
        ({"shape": [1, "8", 8, 3]}, "inputs.0.shape.1: Input should be a valid integer, got '8'"),
        ({"shape": 1}, "inputs.0.shape: Input should be a valid list, got 1"),
        ({"shape": None}, "inputs.0.shape: Input should be a valid list"),
        ({"datatype": None}, "inputs.0.datatype: Input should be 'UINT8' or 'BYTES', got None"),
        ({"datatype": 8}, "inputs.0.datatype: Input should be 'UINT8' or 'BYTES', got 8"),
        ({"name": None}, "inputs.0.name: Input should be 'images', got None"),
        ({"name": ["images"]}, "inputs.0.name: Input should be 'images', got a list"),
        ({"parameters": []}, "inputs.0.parameters: Input should be a valid dictionary"),
        ({"parameters": {"binary_data_size": 192}}, "binary_data_size of images is 192, and 0 bytes follow"),
        ({"parameters": {"binary_data_size": 0}}, "data in the header and binary_data_size"),
        ({"parameters": {"binary_data_size": True}}, "binary_data_size: Input should be a valid integer, got True"),
        ({"datatype": "BYTES", "shape": [1]}, "is not base64"),
        ({"datatype": "BYTES", "shape": [1], "data": ["?"]}, "is not base64"),
        ({"datatype": "BYTES", "shape": [2], "data": ["AAAA"]}, "need 2 elements, got 1"),
    ],
)
def test_hostile_tensors_are_problems(client, pixels, change, detail):
    assert_protocol_problem(client.post(INFER, json=in_json(pixels[:1], **change)), 400, "bad-request", detail)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"inputs": None}, "inputs: Input should be a valid list"),
        ({"inputs": {}}, "inputs: Input should be a valid list, got an object"),
        ({"inputs": [1, [], "x"]}, "inputs: List should have at most 1 item"),
        ({"id": 7}, "id: Input should be a valid string, got 7"),
        ({"parameters": "x"}, "parameters: Input should be a valid dictionary"),
        (
            {"parameters": {"binary_data_output": 1}},
            "parameters.binary_data_output: Input should be a valid boolean, got 1",
        ),
        ({"outputs": [{"name": "logits"}] * 2}, "outputs: List should have at most 1 item"),
        (
            {"outputs": [{"name": "logits", "parameters": {"binary_data": "yes"}}]},
            "binary_data: Input should be a valid boolean, got 'yes'",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": 0}}]},
            "classification: Input should be greater than 0, got 0",
        ),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": True}}]},
            "classification: Input should be a valid integer, got True",
        ),
    ],
)
def test_hostile_requests_are_problems(client, pixels, change, detail):
    response = client.post(INFER, json={**in_json(pixels[:1]), **change})
    assert_protocol_problem(response, 400, "bad-request", detail)


def test_a_refusal_names_what_was_found_and_writes_no_more_of_it_than_it_shows(monkeypatch):
    lengths = []
    monkeypatch.setattr(tensors, "repr", lambda value: lengths.append(len(value)) or repr(value), raising=False)
    body = json.dumps({"inputs": [{"name": "x" * 10_000, "datatype": "UINT8", "shape": [1, 1, 1, 1]}]}).encode()
    with pytest.raises(Problem, match="got 'xxx"):
        tensors.read_inference(body, None, Limits())
    assert lengths == [60]
    with pytest.raises(Problem, match=r"^the request: .* got a list"):
        tensors.read_inference(b"[]", None, Limits())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff" * 50,
        b"[" * 19_000,
        b'{"inputs": ' * 1000,
        b'{"id": "\xed\xa0\x80"}',
        b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [NaN]}]}',
        b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": '
        + b"[" * 900
        + b"]" * 900
        + b"}]}",
    ],
)
def test_what_is_no_request_is_a_problem(client, body):
    assert_protocol_problem(client.post(INFER, content=body), 400, "bad-request")


def binary_request(content, *, shape=(1, 8, 8, 3), size=None):
    size = len(content) if size is None else size
    tensor = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + content, len(header)


@pytest.mark.parametrize(
    ("header_bytes", "detail"),
    [
        ("0", "is 0, and the body has"),
        ("99999", "is 99999, and the body has"),
        ("9" * 5000, "must be a whole number"),
        ("-1", "must be a whole number, got '-1'"),
        ("1.5", "must be a whole number"),
        ("", "must be a whole number, got ''"),
        ("²", "must be a whole number"),
        ("20", "the inference header is not valid JSON"),
    ],
)
def test_hostile_header_lengths_are_problems(client, header_bytes, detail):
    body, _ = binary_request(bytes(192))
    response = client.post(INFER, content=body, headers={LENGTH: header_bytes.encode("latin-1")})
    assert_protocol_problem(response, 400, "bad-request", detail)


@pytest.mark.parametrize(
    ("size", "detail"),
    [
        (191, "binary_data_size of images is 191, and 192 bytes follow"),
        (-1, "binary_data_size of images is -1"),
        (10**15, "and 192 bytes follow"),
    ],
)
def test_wrong_byte_counts_are_problems(client, size, detail):
    body, header_bytes = binary_request(bytes(192), size=size)
    response = client.post(INFER, content=body, headers={LENGTH: str(header_bytes)})
    assert_protocol_problem(response, 400, "bad-request", detail)


def test_bytes_without_a_size_are_a_problem(client, pixels):
    header = json.dumps(in_json(pixels[:1])).encode()
    response = client.post(INFER, content=header + b"12345", headers={LENGTH: str(len(header))})
    assert_protocol_problem(response, 400, "bad-request", "binary_data_size of images is 0, and 5 bytes follow")


def test_the_limits_are_those_of_predict(client, encode):
    assert_protocol_problem(client.post(INFER, content=b"x" * 20_001), 413, "too-large")
    body, header_bytes = binary_request(bytes(768), shape=(4, 8, 8, 3))
    response = client.post(INFER, content=body, headers={LENGTH: str(header_bytes)})
    assert_protocol_problem(response, 413, "too-many-images", "3 images at most")
    file = base64.b64encode(encode(np.zeros((1000, 1001), np.uint8))).decode()
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [file]}
    assert_protocol_problem(client.post(INFER, json={"inputs": [tensor]}), 413, "too-many-pixels", "1001x1000")


def test_every_refusal_under_v2_has_the_protocols_member(client):
    assert_protocol_problem(client.get("/v2/nothing"), 404, "not-found")
    assert_protocol_problem(client.get(INFER), 405, "method-not-allowed", "takes POST, got GET")
    assert_protocol_problem(client.get(f"/v2/models/{NAME}/versions/2"), 404, "not-found", "got 'DiracNet")
    assert "error" not in client.get("/v3").json()


def test_not_ready_before_the_model_has_run(runtime):
    client = TestClient(make_app(runtime, Limits()))
    assert client.get("/v2/health/live").json() == {"live": True}
    for path in ("/v2/health/ready", f"/v2/models/{NAME}/ready", f"/v2/models/{NAME}/versions/1/ready"):
        assert_protocol_problem(client.get(path), 503, "not-ready")
    with client:
        assert client.get("/v2/health/ready").json() == {"ready": True}


def test_a_broken_model_is_a_problem_of_its_own(runtime, pixels):
    def overflow(images):
        return np.full((len(images), 10), np.inf, np.float32)

    def fail(images):
        if images.any():  # the black image warms up
            raise RuntimeError("secret")
        return np.zeros((len(images), 10), np.float32)

    for broken, name in ((overflow, "not-a-number"), (fail, "internal")):
        broken.model, broken.description, broken.platform = runtime.model, "broken", "none"
        with TestClient(make_app(broken, Limits()), raise_server_exceptions=False) as client:
            response = client.post(INFER, json=in_json(pixels[:1]))
        assert_protocol_problem(response, 500, name)
        assert "secret" not in response.text


def test_an_answer_says_where_the_time_went(client, pixels):
    response = client.post(INFER, json=in_json(pixels[:1]), headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert "model;dur=" in response.headers["server-timing"]


def test_a_name_for_an_address_has_no_spaces(runtime):
    model = runtime.model.__class__("My net (v2)/é", "", runtime.model.spec, {})
    assert model_name(model) == "My-net--v2---"


def test_a_key_guards_the_model_and_not_the_probes(runtime):
    with TestClient(make_app(runtime, Limits(), access=Access(api_key=b"key"))) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        assert_protocol_problem(client.get(f"/v2/models/{NAME}"), 401, "unauthorized")
        assert_protocol_problem(client.post(INFER, content=b"{}"), 401, "unauthorized")
        assert client.get(f"/v2/models/{NAME}", headers={"X-Api-Key": "key"}).json()["name"] == NAME
