"""The servers that are compared: how each is installed and started, and what its clients send for a PNG."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from common.files import read_whole, write_whole
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
_BOUNDARY = "----the-images-of-the-benchmark"


@dataclass(frozen=True)
class Way:
    """One kind of request. `encode` makes its body from a PNG, `find_index` finds the class in the answer."""

    title: str
    path: str
    media_type: str
    encode: Callable[[bytes], bytes]
    find_index: Callable[[Any], int]


@dataclass(frozen=True)
class Contestant:
    """A server. `command` is what Python runs, word by word with {model}, {port} and the folder {peers}."""

    name: str
    command: str
    ways: tuple[Way, ...]
    note: str

    @property
    def is_ours(self) -> bool:
        """Whether it runs in this Python, and not in an environment with the packages of peers/NAME.txt."""
        return self.name == "ours"

    def arguments(self, model: Path, port: int) -> list[str]:
        return [word.format(model=model, port=port, peers=PEERS) for word in self.command.split()]


def make_environment(name: str, folder: Path) -> Path:
    """The Python of a virtual environment with the packages of peers/NAME.txt, made below `folder` if missing.

    Refuses, with the last line of pip, packages that cannot be installed here.
    """
    requirements = PEERS / f"{name}.txt"
    environment = (folder / name).absolute()
    python, installed = environment / "bin" / "python", environment / "requirements.txt"
    wanted = read_whole(requirements)
    if installed.exists() and installed.read_bytes() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(environment)], name)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "-r", str(requirements)], name)
    write_whole(installed, wanted)  # last, so that an interrupted installation is repeated
    return python


def _run(argv: list[str], name: str) -> None:
    done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refusal(f"{name} cannot be installed: {last[:300]}")


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


_FORM = f"multipart/form-data; boundary={_BOUNDARY}"
CONTESTANTS = (
    Contestant(
        "ours",
        # All run ONNX Runtime; by default, ours would choose the fastest runtime at every start.
        "{peers}/../../serve/run.py {model} --port {port} --runtime onnxruntime",
        tuple(
            Way(f"ours, {kind}", "/predict", media_type, encode, lambda answer: answer["results"][0]["index"])
            for kind, media_type, encode in (("raw body", "image/png", bytes), ("form", _FORM, as_form("image")))
        ),
        "`serve/run.py --runtime onnxruntime`, since all others run that; otherwise its ordinary command, which logs "
        "every request, answers with the five best classes and keeps its limits, deadlines and metrics",
    ),
    Contestant(
        "fastapi",
        "{peers}/with_fastapi.py {port}",
        (
            Way("FastAPI handler, form", "/predict", _FORM, as_form("image"), itemgetter("index")),
            Way("FastAPI handler, raw body", "/raw", "image/png", bytes, itemgetter("index")),
        ),
        "the naive handler: UploadFile (or the raw body), Pillow, one run of the model for each request",
    ),
    Contestant(
        "litserve",
        "{peers}/with_litserve.py {port}",
        (Way("LitServe", "/predict", _FORM, as_form("image"), itemgetter("index")),),
        "a form, as its documentation sends images; batches of 32 at most, 2 ms; one worker beside the HTTP process",
    ),
    Contestant(
        "bentoml",
        "-m bentoml serve with_bentoml:Service --working-dir {peers} --host 127.0.0.1 --port {port}",
        (Way("BentoML", "/predict", _FORM, as_form("images"), lambda answer: answer[0]["index"]),),
        "a form; adaptive batching, 32 at most; metrics off",
    ),
    Contestant(
        "ray",
        "{peers}/with_ray.py {port}",
        (Way("Ray Serve", "/", "image/png", bytes, itemgetter("index")),),
        "the raw body; one replica, serve.batch of 32 at most, 2 ms; no dashboard",
    ),
    Contestant(
        "mlserver",
        "{peers}/with_mlserver.py {port}",
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
    Contestant(
        "mosec",
        "{peers}/with_mosec.py --address 127.0.0.1 --port {port} --log-level warning",
        (Way("mosec", "/inference", "image/png", bytes, itemgetter("index")),),
        "the raw body; HTTP and batching in Rust, one worker process in Python; batches of 32 at most, 2 ms",
    ),
)
