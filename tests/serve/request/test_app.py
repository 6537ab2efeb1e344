import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from common.image import FORMATS
from serve.request.access import Access
from serve.request.app import make_app
from serve.request.connection import Connection
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[3]
PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}


def probabilities(logits):
    """Softmax in the plainest way, in float64."""
    powers = np.array([[np.exp(np.float64(value)) for value in row] for row in logits])
    return powers / powers.sum(axis=1, keepdims=True)


def in_json(*files):
    return {"images": [base64.b64encode(file).decode() for file in files]}


def in_form(*files):
    return [("image", (f"{index}.png", file, "image/png")) for index, file in enumerate(files)]


def assert_problem(response, status, name, detail=""):
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert (response.status_code, problem["status"]) == (status, status)
    assert problem["type"] == f"urn:diracnet:problem:{name}"
    assert detail in problem["detail"]


def assert_problem_of_any(response, status, name):
    """As `assert_problem`, under /v2 too."""
    assert (response.status_code, response.json()["type"]) == (status, f"urn:diracnet:problem:{name}")


def test_an_answer_is_the_softmax_of_the_models_logits(client, runtime, pixels, encode):
    response = client.post("/predict", content=encode(pixels[0]), headers=PNG)
    assert response.status_code == 200
    answer = response.json()
    assert answer["model"] == {"name": "DiracNet-10-0.25", "digest": runtime.model.digest}
    (result,) = answer["results"]
    expected = probabilities(runtime(pixels[:1]))[0]
    order = sorted(range(10), key=lambda index: -expected[index])[:5]
    assert [guess["index"] for guess in result["top"]] == order
    assert [guess["label"] for guess in result["top"]] == [f"label {index}" for index in order]
    np.testing.assert_allclose([guess["probability"] for guess in result["top"]], expected[order], rtol=1e-12)
    assert {key: result[key] for key in ("label", "index", "probability")} == result["top"][0]


def test_the_logits_are_divided_by_the_temperature_of_the_model(runtime, pixels, encode):
    def warmer(images):
        return runtime(images)

    spec = replace(runtime.model.spec, temperature=2.5)
    warmer.model, warmer.description = replace(runtime.model, spec=spec), "warmer"
    with TestClient(make_app(warmer, Limits())) as client:
        (result,) = client.post("/predict", content=encode(pixels[0]), headers=PNG).json()["results"]
    expected = probabilities(runtime(pixels[:1]) / 2.5)[0]
    assert result["probability"] == pytest.approx(expected[result["index"]], rel=1e-6)


def test_raw_forms_and_json_agree_and_keep_the_order(client, pixels, encode):
    files = [encode(image) for image in pixels[:3]]
    one_by_one = [client.post("/predict", content=file, headers=PNG).json()["results"][0] for file in files]
    by_form = client.post("/predict", files=in_form(*files)).json()["results"]
    by_json = client.post("/predict", json=in_json(*files)).json()["results"]
    for results in (by_form, by_json):
        assert [result["index"] for result in results] == [result["index"] for result in one_by_one]
        np.testing.assert_allclose(
            [result["probability"] for result in results],
            [result["probability"] for result in one_by_one],
            rtol=1e-4,  # another batch size, another order of float32 sums
        )
    assert len({result["probability"] for result in one_by_one}) == 3


@pytest.mark.parametrize(("kind", "media_type"), [("PNG", "image/png"), ("BMP", "image/bmp"), ("WEBP", "image/webp")])
def test_lossless_formats_give_one_answer(client, pixels, encode, kind, media_type):
    expected = client.post("/predict", content=encode(pixels[0]), headers=PNG).json()
    options = {"lossless": True} if kind == "WEBP" else {}
    for headers in ({"Content-Type": media_type}, {"Content-Type": "application/octet-stream"}, {}):
        content = encode(pixels[0], kind, **options)
        assert client.post("/predict", content=content, headers=headers).json() == expected


@pytest.mark.parametrize(
    "media_type", ["application/x-www-form-urlencoded", "image/x-png", "image/jpeg", "IMAGE/*", "image/svg+xml; a=b"]
)
def test_the_first_bytes_say_what_an_image_is(client, pixels, encode, media_type):
    """The first is what curl --data-binary says of every file."""
    expected = client.post("/predict", content=encode(pixels[0]), headers=PNG).json()
    response = client.post("/predict", content=encode(pixels[0]), headers={"Content-Type": media_type})
    assert response.json() == expected


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow was built without AVIF")
def test_an_avif_is_taken(client, pixels, encode):
    content = encode(pixels[0], "AVIF", quality=100)
    response = client.post("/predict", content=content, headers={"Content-Type": "image/avif"})
    assert response.status_code == 200
    cut = client.post("/predict", content=content[:-50], headers={"Content-Type": "image/avif"})
    assert_problem(cut, 422, "undecodable", "the image is")


def test_a_gif_is_taken(client, encode):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    as_gif = client.post("/predict", content=encode(grey, "GIF"), headers={"Content-Type": "image/gif"})
    assert as_gif.json()["results"] == client.post("/predict", content=encode(grey), headers=PNG).json()["results"]


def test_jpeg_of_another_size_is_taken(client, encode):
    photograph = np.full((90, 120, 3), 128, np.uint8)
    response = client.post("/predict", content=encode(photograph, "JPEG"), headers={"Content-Type": "image/jpeg"})
    assert response.status_code == 200


@pytest.mark.parametrize(("top_k", "num"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_top_k_says_how_many_classes(client, pixels, encode, top_k, num):
    top = client.post(f"/predict?top_k={top_k}", content=encode(pixels[0]), headers=PNG).json()["results"][0]["top"]
    assert len(top) == num
    shares = [guess["probability"] for guess in top]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("top_k", ["0", "-1", "many"])
def test_a_wrong_top_k_is_refused(client, pixels, encode, top_k):
    response = client.post(f"/predict?top_k={top_k}", content=encode(pixels[0]), headers=PNG)
    assert_problem(response, 400, "bad-request", f"got {top_k!r}")


@pytest.mark.parametrize(
    ("body", "headers", "status", "name", "detail"),
    [
        (b"", PNG, 400, "bad-request", "the request has no body"),
        (b"hello", PNG, 422, "undecodable", f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"),
        (b"hello", {"Content-Type": "text/plain"}, 415, "media-type", "got text/plain"),
        (b"x", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "media-type", "with curl: --data-binary"),
        (b"x" * 20_001, PNG, 413, "too-large", "larger than 20,000 bytes"),
        (b"{", {"Content-Type": "application/json"}, 400, "bad-request", "the body is not valid JSON"),
        (b"[" * 19_000, {"Content-Type": "application/json"}, 400, "bad-request", "the body is not valid JSON"),
        (b"[]", {"Content-Type": "application/json"}, 400, "bad-request", 'must be {"images"'),
        (b'{"images": []}', {"Content-Type": "application/json"}, 400, "bad-request", 'must be {"images"'),
        (b'{"images": ["?"]}', {"Content-Type": "application/json"}, 400, "bad-request", "images[0] is not base64"),
        (b'{"images": [1]}', {"Content-Type": "application/json"}, 400, "bad-request", "images[0] is not base64"),
        (b'{"images": ["data:,abc"]}', JSON, 400, "bad-request", "images[0] is a data URL without base64"),
        (b"x", {"Content-Type": "image/png", "Content-Encoding": "gzip"}, 415, "media-type", "encoded as gzip; send"),
        (
            b"II*\0",
            {"Content-Type": "image/tiff"},
            422,
            "undecodable",
            "is TIFF, which is not decoded here; convert it",
        ),
        (b"x", {"Content-Type": "image/avif"}, 422, "undecodable", "not a PNG"),
        (b"", {"Content-Type": "application/x-www-form-urlencoded"}, 400, "bad-request", "the request has no body"),
        (
            b'{"images": ["\xff"]}',
            {"Content-Type": "application/json"},
            400,
            "bad-request",
            "the body is not valid JSON",
        ),
        (b"--", {"Content-Type": "multipart/form-data"}, 400, "bad-request", "the form cannot be read"),
        (b"x", {"Content-Type": "multipart/form-data; boundary=a"}, 400, "bad-request", "the form"),
        (b"--a--\r\n", {"Content-Type": "multipart/form-data; boundary=a"}, 400, "bad-request", "contains no file"),
    ],
)
def test_what_cannot_be_used_is_a_problem(client, body, headers, status, name, detail):
    assert_problem(client.post("/predict", content=body, headers=headers), status, name, detail)


@pytest.mark.parametrize(
    "spell",
    [
        base64.b64encode,
        base64.encodebytes,  # lines of 76 characters, as `base64 FILE` writes them
        base64.urlsafe_b64encode,
        lambda content: b"data:image/png;base64," + base64.b64encode(content),
    ],
)
def test_base64_is_taken_as_it_is_usually_spelt(client, runtime, pixels, encode, spell):
    content = encode(pixels[0])
    assert {"+", "/"} <= set(base64.b64encode(content).decode())  # or the URL-safe spelling is the plain one
    response = client.post("/predict", json={"images": [spell(content).decode()]})
    assert response.json()["results"][0]["index"] == runtime(pixels[:1]).argmax()


def test_a_file_input_that_was_left_empty_is_left_out(client, pixels, encode):
    head = '--a\r\nContent-Disposition: form-data; name="image"; filename="{}"\r\nContent-Type: image/png\r\n\r\n'
    chosen, unchosen = (head.format(name).encode() for name in ("a.png", ""))
    headers = {"Content-Type": "multipart/form-data; boundary=a"}
    body = chosen + encode(pixels[0]) + b"\r\n" + unchosen + b"\r\n--a--\r\n"
    assert len(client.post("/predict", content=body, headers=headers).json()["results"]) == 1
    response = client.post("/predict", content=unchosen + b"\r\n--a--\r\n", headers=headers)
    assert_problem(response, 400, "bad-request", "the form contains no file")


def test_a_jpeg_without_its_last_bytes_is_said_to_be_cut_short(client, pixels, encode):
    content = encode(np.tile(pixels[0], (8, 8, 1)), "JPEG")
    response = client.post("/predict", content=content[: len(content) // 2], headers=PNG)
    assert_problem(response, 422, "undecodable", "the image is cut short: its last bytes are missing")


def test_a_body_of_unknown_length_ends_at_the_limit(client):
    response = client.post("/predict", content=(b"x" * 1000 for _ in range(100)), headers=PNG)
    assert_problem(response, 413, "too-large")


def test_too_many_images_and_pixels_are_refused(client, pixels, encode):
    files = [encode(image) for image in pixels[:4]]
    assert_problem(client.post("/predict", json=in_json(*files)), 413, "too-many-images", "3 images at most")
    assert_problem(client.post("/predict", files=in_form(*files)), 413, "too-many-images", "3 images at most")
    large = encode(np.zeros((1000, 1001), np.uint8))
    assert_problem(client.post("/predict", content=large, headers=PNG), 413, "too-many-pixels", "1001x1000")


def test_every_bad_image_is_named(client, pixels, encode):
    response = client.post("/predict", json=in_json(b"a", encode(pixels[0]), b"b"))
    assert_problem(response, 422, "undecodable", "image 1 of 3: ")
    assert "image 3 of 3: " in response.json()["detail"]
    assert "image 2" not in response.json()["detail"]


def test_a_form_field_of_text_is_refused(client):
    response = client.post("/predict", files=[("image", (None, "text"))])
    assert_problem(response, 400, "bad-request", "the field 'image' holds text; send files")


def test_unknown_addresses_and_methods_are_problems(client):
    assert_problem(client.get("/nothing"), 404, "not-found", "/docs lists what does")
    response = client.get("/predict")
    assert_problem(response, 405, "method-not-allowed", "/predict takes POST, got GET")
    assert response.headers["allow"] == "POST"
    response = client.post("/healthz")
    assert_problem(response, 405, "method-not-allowed", "/healthz takes GET, HEAD, got POST")
    assert response.headers["allow"] == "GET, HEAD"


def test_nobody_is_sent_to_the_host_that_a_request_names(client):
    for address in ("/predict/", "/healthz/", "/v2/models/DiracNet-10-0.25/"):
        response = client.post(address, headers={"Host": "evil.example"}, follow_redirects=False)
        assert_problem_of_any(response, 404, "not-found")
        assert "evil" not in response.text + str(response.headers)


@pytest.mark.parametrize("address", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/model", "/"])
def test_head_is_answered_as_get_is_without_the_body(live, runtime, address):
    with (
        live(make_app(runtime, Limits()), http=Connection) as url,
        httpx.Client(base_url=url, timeout=60) as connection,
    ):
        whole, head = connection.get(address), connection.head(address)
        assert connection.get(address).status_code == 200  # nothing is left over on the connection
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.content))


def test_head_of_what_takes_no_get_is_refused(client):
    response = client.head("/predict")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("address", ["/", "/docs", "/predict", "/healthz", "/nothing", "/metrics", "/v2/models/x"])
def test_no_answer_is_taken_for_another_media_type(runtime, method, address):
    access = Access(cors_origins=("https://example.org",))
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with TestClient(make_app(runtime, Limits(), access=access)) as client:
        response = client.request(method, address, headers=preflight)
    assert response.headers.get_list("x-content-type-options") == ["nosniff"]


class Broken:
    """A runtime whose GPU has gone."""

    description = "broken"

    def __init__(self, runtime):
        self.model, self.is_broken = runtime.model, False

    def __call__(self, images):
        if self.is_broken:
            raise RuntimeError("secret path /etc")
        return np.zeros((len(images), 10), np.float32)


def test_a_failure_says_nothing_of_the_inside(runtime, pixels, encode):
    broken = Broken(runtime)
    with TestClient(make_app(broken, Limits()), raise_server_exceptions=False) as client:
        broken.is_broken = True  # from after the warm-up on
        response = client.post("/predict", content=encode(pixels[0]), headers=PNG)
    assert_problem(response, 500, "internal", "see its log")
    assert "secret" not in response.text


def test_logits_that_overflow_are_no_answer(runtime, pixels, encode):
    def overflow(images):
        return np.full((len(images), 10), np.inf, np.float32)

    overflow.model, overflow.description = replace(runtime.model), "overflow"
    with TestClient(make_app(overflow, Limits()), raise_server_exceptions=False) as client:
        response = client.post("/predict", content=encode(pixels[0]), headers=PNG)
    assert_problem(response, 500, "not-a-number", "export the model in a higher precision")


def test_ready_only_after_the_model_has_run(runtime):
    client = TestClient(make_app(runtime, Limits()))
    assert client.get("/healthz").json() == {"status": "ok"}
    assert_problem(client.get("/readyz"), 503, "not-ready")
    with client:
        assert client.get("/readyz").json() == {"status": "ready"}


def test_the_model_says_what_it_is(client, runtime):
    card = client.get("/model").json()
    assert (card["name"], card["digest"]) == ("DiracNet-10-0.25", runtime.model.digest)
    assert card["input"] == {"height": 8, "width": 8, "channels": 3, "resize": 8}
    assert card["labels"][9] == "label 9"
    assert card["provenance"] == {"training": {}}


@pytest.mark.parametrize("address", ["/", "/docs"])
def test_pages_ask_no_other_host_for_anything(client, address):
    response = client.get(address)
    assert response.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.findall(r"<[^>]* (?:style|on\w+)=", response.text)  # which no hash would let through
    assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", response.text)
    assert "innerHTML" not in response.text


def test_openapi_describes_bodies_answers_and_problems(client):
    predict = client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    bodies = set(predict["requestBody"]["content"])
    assert {"image/png", "image/jpeg", "multipart/form-data", "application/json"} <= bodies
    assert {"200", "400", "413", "415", "422", "500"} <= set(predict["responses"])
    assert list(predict["responses"]["415"]["content"]) == ["application/problem+json"]


def test_openapi_describes_every_error_as_a_problem(client):
    response = client.get("/openapi.json")
    document = response.json()
    errors = [
        (path, method, status, list(answer["content"]))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status, answer in operation["responses"].items()
        if status >= "400"
    ]
    assert len(errors) > 40
    assert not [row for row in errors if row[3] != ["application/problem+json"]]
    schemas = document["components"]["schemas"]
    assert not [name for name in schemas if f'"#/components/schemas/{name}"' not in response.text]


def test_the_openapi_document_is_written_once(client, monkeypatch):
    first = client.get("/openapi.json")
    monkeypatch.setattr(JSONResponse, "render", lambda *_: pytest.fail("written again"))
    again = client.get("/openapi.json")
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
