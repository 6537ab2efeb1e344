import pytest
from starlette.testclient import TestClient

from common.refusal import Refusal
from serve.request.access import Access, read_api_key
from serve.request.app import make_app
from serve.request.limits import Limits

KEY = "s3cret"


@pytest.fixture
def guarded(runtime):
    access = Access(KEY.encode(), cors_origins=("https://example.org",))
    with TestClient(make_app(runtime, Limits(), access=access)) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Api-Key": "s3cre"}, {"X-Api-Key": "s3cretx"}],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("GET", "/model"), ("GET", "/metrics")])
def test_without_the_key_nothing_is_said(guarded, method, path, headers):
    response = guarded.request(method, path, headers=headers, content=b"x" if method == "POST" else None)
    assert response.status_code == 401
    assert response.json()["type"] == "urn:diracnet:problem:unauthorized"
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}])
def test_with_the_key_all_is_open(guarded, headers, pixels, encode):
    assert guarded.post("/predict", content=encode(pixels[0]), headers=headers).status_code == 200
    assert guarded.get("/model", headers={"X-Api-Key": KEY}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz"])
def test_pages_and_probes_need_no_key(guarded, path):
    assert guarded.get(path).status_code == 200


def test_reload_exists_only_with_a_key(runtime, guarded):
    assert guarded.post("/admin/reload", headers={"X-Api-Key": KEY}).status_code == 404  # nothing to load from
    with TestClient(make_app(runtime, Limits(), load=lambda: [runtime])) as client:
        assert client.post("/admin/reload").status_code == 404


def test_listed_origins_may_ask_and_others_may_not(guarded, pixels, encode):
    headers = "authorization, content-type, x-api-key, x-request-id"
    for method, status in (("GET", 200), ("POST", 200), ("DELETE", 400)):
        preflight = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
        allowed = guarded.options("/predict", headers={"Origin": "https://example.org", **preflight})
        assert allowed.status_code == status
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    asked = guarded.post(
        "/predict", content=encode(pixels[0]), headers={"Origin": "https://example.org", "X-Api-Key": KEY}
    )
    assert asked.headers["access-control-allow-origin"] == "https://example.org"
    assert asked.headers["access-control-expose-headers"] == "Retry-After, Server-Timing, X-Request-Id"
    other = guarded.options("/predict", headers={"Origin": "https://example.com", **preflight})
    assert "access-control-allow-origin" not in other.headers


def test_the_key_comes_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_api_key(file, {"DIRACNET_API_KEY": "other"}) == KEY.encode()
    assert read_api_key(None, {"DIRACNET_API_KEY": KEY}) == KEY.encode()
    assert read_api_key(None, {}) is None
    assert KEY not in repr(Access(KEY.encode()))


@pytest.mark.parametrize(("mode", "is_said"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_a_key_that_every_user_can_read_is_warned_of(tmp_path, caplog, mode, is_said):
    file = tmp_path / "key.txt"
    file.write_text(KEY)
    file.chmod(mode)
    read_api_key(file, {})
    said = [record.getMessage() for record in caplog.records]
    assert said == ["every user of this machine can read key.txt, which holds the server's key: chmod o-r it"] * is_said


@pytest.mark.parametrize("text", ["", " \n", "two words", "schlüssel"])
def test_what_is_no_key_is_refused(tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(Refusal, match="must hold one key"):
        read_api_key(file, {})
    with pytest.raises(Refusal, match="DIRACNET_API_KEY must hold one key"):
        read_api_key(None, {"DIRACNET_API_KEY": text})
