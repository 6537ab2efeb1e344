"""The table of servers that are compared: how each is started, and what its clients send for a PNG."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
_BOUNDARY = "----the-images-of-the-benchmark"


@dataclass(frozen=True)
class Way:
    """One way to ask a server. `encode` makes the body of a PNG, `find_index` finds the class in an answer."""

    title: str
    path: str
    media_type: str
    encode: Callable[[bytes], bytes]
    find_index: Callable[[Any], int]


@dataclass(frozen=True)
class Server:
    """`arguments` of Python are made from the model's file and a port; `environment` names peers/NAME.txt."""

    name: str
    environment: str | None  # None: the Python that runs the benchmark
    arguments: Callable[[Path, int], list[str]]
    ways: tuple[Way, ...]
    note: str


def as_form(field: str) -> Callable[[bytes], bytes]:
    """A form with one file, as curl -F writes it."""
    head = f'Content-Disposition: form-data; name="{field}"; filename="image.png"\r\nContent-Type: image/png'

    def encode(png: bytes) -> bytes:
        return f"--{_BOUNDARY}\r\n{head}\r\n\r\n".encode() + png + f"\r\n--{_BOUNDARY}--\r\n".encode()

    return encode


def as_inference_request(png: bytes) -> bytes:
    """The V2 protocol's JSON with one base64 element, as MLServer's codec for files writes it."""
    element = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"content_type": "base64"}}
    return json.dumps({"inputs": [{**element, "data": [base64.b64encode(png).decode()]}]}).encode()


def _script(name: str) -> Callable[[Path, int], list[str]]:
    return lambda model, port: [str(PEERS / name), str(port)]


def _ours(model: Path, port: int) -> list[str]:
    # All run ONNX Runtime; left to itself, ours would choose the fastest runtime anew at every start.
    return [str(ROOT / "serve" / "run.py"), str(model), "--port", str(port), "--runtime", "onnxruntime"]


def _bentoml(model: Path, port: int) -> list[str]:
    service = ["with_bentoml:Service", "--working-dir", str(PEERS)]
    return ["-m", "bentoml", "serve", *service, "--host", "127.0.0.1", "--port", str(port)]


def _mosec(model: Path, port: int) -> list[str]:
    return [str(PEERS / "with_mosec.py"), "--address", "127.0.0.1", "--port", str(port), "--log-level", "warning"]


def _of_answer(answer: Any) -> int:
    return answer["index"]


def _of_results(answer: Any) -> int:
    return answer["results"][0]["index"]


_FORM = f"multipart/form-data; boundary={_BOUNDARY}"
OURS = Server(
    "ours",
    None,
    _ours,
    (
        Way("ours, raw body", "/predict", "image/png", bytes, _of_results),
        Way("ours, form", "/predict", _FORM, as_form("image"), _of_results),
    ),
    "`serve/run.py --runtime onnxruntime`, since all others run that; else its ordinary command, which logs every "
    "request, answers with the five best classes and keeps its limits, deadlines and metrics",
)
SERVERS = (
    OURS,
    Server(
        "fastapi",
        "fastapi",
        _script("with_fastapi.py"),
        (
            Way("FastAPI handler, form", "/predict", _FORM, as_form("image"), _of_answer),
            Way("FastAPI handler, raw body", "/raw", "image/png", bytes, _of_answer),
        ),
        "the naive handler: UploadFile (or the raw body), Pillow, one run of the model for each request",
    ),
    Server(
        "litserve",
        "litserve",
        _script("with_litserve.py"),
        (Way("LitServe", "/predict", _FORM, as_form("image"), _of_answer),),
        "a form, as its documentation sends images; batches of 32 at most, 2 ms; one worker beside the HTTP process",
    ),
    Server(
        "bentoml",
        "bentoml",
        _bentoml,
        (Way("BentoML", "/predict", _FORM, as_form("images"), lambda answer: answer[0]["index"]),),
        "a form; adaptive batching, 32 at most; metrics off",
    ),
    Server(
        "ray",
        "ray",
        _script("with_ray.py"),
        (Way("Ray Serve", "/", "image/png", bytes, _of_answer),),
        "the raw body; one replica, serve.batch of 32 at most, 2 ms; no dashboard",
    ),
    Server(
        "mlserver",
        "mlserver",
        _script("with_mlserver.py"),
        (
            Way(
                "MLServer",
                "/v2/models/classifier/infer",
                "application/json",
                as_inference_request,
                lambda answer: answer["outputs"][0]["data"][0],
            ),
        ),
        "V2 protocol: JSON with the PNG in base64, which a runtime written for it decodes; adaptive batching, "
        "32 at most, 2 ms; metrics off; no worker process, which on one core only adds a hand-over",
    ),
    Server(
        "mosec",
        "mosec",
        _mosec,
        (Way("mosec", "/inference", "image/png", bytes, _of_answer),),
        "the raw body; HTTP and batching in Rust, one worker process in Python; batches of 32 at most, 2 ms",
    ),
)
