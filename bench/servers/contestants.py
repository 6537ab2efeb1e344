"""The servers that are compared: how each is installed and started, and what its clients send for a PNG."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from bench.lab.server import ROOT, Server, free_port
from common.files import read_whole, write_whole
from common.refusal import Refusal

PEERS = ROOT / "bench" / "peers"
FORM = "multipart/form-data; boundary=----the-images-of-the-benchmark"
# None of them may use the network; every library that opens threads of its own gets the one core.
_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Way:
    """One kind of request. `encode` makes its body from a PNG; `index` leads through the answer to the class."""

    title: str
    path: str = "/predict"
    media_type: str = "image/png"
    encode: Callable[[bytes], bytes] = bytes
    index: tuple[str | int, ...] = ("index",)


@dataclass(frozen=True)
class Contestant:
    """A server. `command` is what Python runs, word by word with {model}, {port} and the folder {peers}."""

    name: str
    command: str
    ways: tuple[Way, ...]
    note: str

    def start(self, model: Path, work: Path) -> Server:
        """Serves `model` on core 0, ready when it accepts connections. Peers run in environments below `work`."""
        python, port, env = sys.executable, free_port(), {**os.environ, **_ENVIRONMENT, "MODEL": str(model)}
        if self.name != "ours":
            python, env["PYTHONPATH"] = str(make_environment(self.name, work / "peers")), str(PEERS)
        words = [word.format(model=model, port=port, peers=PEERS) for word in self.command.split()]
        log = model.parent / f"{self.name}.log"
        return Server([python, *words], port, ready_path=None, core=0, log=log, env=env, cwd=model.parent)


def make_environment(name: str, folder: Path) -> Path:
    """The Python of a virtual environment with the packages of peers/NAME.txt, made below `folder` if missing.

    Refuses, with the last line of pip, packages that cannot be installed here.
    """
    requirements, environment = PEERS / f"{name}.txt", folder / name
    python, installed = environment / "bin" / "python", environment / "requirements.txt"
    wanted = read_whole(requirements)
    if installed.exists() and installed.read_bytes() == wanted:
        return python
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", requirements]
    for argv in ([sys.executable, "-m", "venv", "--clear", environment], pip):
        done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Refusal(f"{name} cannot be installed: {last[:300]}")
    write_whole(installed, wanted)  # last, so that an interrupted installation is repeated
    return python


def as_form(field: str, png: bytes) -> bytes:
    """A form with one file."""
    files = {field: ("image.png", png, "image/png")}
    return httpx.Request("POST", "http://server", headers={"Content-Type": FORM}, files=files).read()


def as_inference_request(png: bytes) -> bytes:
    """The V2 protocol's JSON with one base64 element, as MLServer's codec for files writes it."""
    element = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"content_type": "base64"}}
    return json.dumps({"inputs": [{**element, "data": [base64.b64encode(png).decode()]}]}).encode()


_OURS, _INFER = ("results", 0, "index"), "/v2/models/classifier/infer"
_form = partial(Way, media_type=FORM, encode=partial(as_form, "image"))
CONTESTANTS = (
    Contestant(
        "ours",
        # All run ONNX Runtime; by default, ours would choose the fastest runtime at every start.
        "{peers}/../../serve/run.py {model} --port {port} --runtime onnxruntime",
        (Way("ours, raw body", index=_OURS), _form("ours, form", index=_OURS)),
        "`serve/run.py --runtime onnxruntime`, since all others run that; otherwise its ordinary command, which logs "
        "every request, answers with the five best classes and keeps its limits, deadlines and metrics",
    ),
    Contestant(
        "fastapi",
        "{peers}/with_fastapi.py {port}",
        (_form("FastAPI handler, form"), Way("FastAPI handler, raw body", "/raw")),
        "the naive handler: UploadFile (or the raw body), Pillow, one run of the model for each request",
    ),
    Contestant(
        "litserve",
        "{peers}/with_litserve.py {port}",
        (_form("LitServe"),),
        "a form, as its documentation sends images; batches of 32 at most, 2 ms; one worker beside the HTTP process",
    ),
    Contestant(
        "bentoml",
        "-m bentoml serve with_bentoml:Service --working-dir {peers} --host 127.0.0.1 --port {port}",
        (_form("BentoML", encode=partial(as_form, "images"), index=(0, "index")),),
        "a form; adaptive batching, 32 at most; metrics off",
    ),
    Contestant(
        "ray",
        "{peers}/with_ray.py {port}",
        (Way("Ray Serve", "/"),),
        "the raw body; one replica, serve.batch of 32 at most, 2 ms; no dashboard",
    ),
    Contestant(
        "mlserver",
        "{peers}/with_mlserver.py {port}",
        (Way("MLServer", _INFER, "application/json", as_inference_request, ("outputs", 0, "data", 0)),),
        "V2 protocol: JSON with the PNG in base64, which a runtime written for it decodes; adaptive batching, "
        "32 at most, 2 ms; metrics off; no worker process, which on one core only adds a hand-over",
    ),
    Contestant(
        "mosec",
        "{peers}/with_mosec.py --address 127.0.0.1 --port {port} --log-level warning",
        (Way("mosec", "/inference"),),
        "the raw body; HTTP and batching in Rust, one worker process in Python; batches of 32 at most, 2 ms",
    ),
)
