"""A race of servers: how each is installed and started; one net served by each in turn, its answers checked first."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from bench.lab.load import put_load
from bench.lab.process import in_fresh_process
from bench.lab.rounds import turns
from bench.lab.server import ROOT, Server, free_port
from bench.nets import count_macs, random_net
from bench.servers.page import CONNECTIONS
from bench.servers.request_steps import time_alone
from common.files import read_whole, write_whole
from common.image import decode
from common.progress import make_console, progress
from common.refusal import Refusal
from common.spec import Spec
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from export.to_onnx import DEFAULT_LOWERING
from fold.graph import fold
from fold.lower import lower
from train.data.datasets import info_of

PEERS = ROOT / "bench" / "peers"
MULTIPART = "multipart/form-data; boundary=----the-images-of-the-benchmark"
# No server may use the network, and no library may start a thread pool.
_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
SERVERS_CORE = 0
# Family, depth, width and nonlinearity of seeded random nets for 28x28 grey images. All servers serve the last two.
SIZES = {
    "tiny": ("cifar", 10, 0.25, "ncrelu"),
    "small": ("pooled", 16, 1.0, "relu"),
    "large": ("cifar", 16, 1.0, "ncrelu"),
}


@dataclass(frozen=True)
class Way:
    """One kind of request. `encode` makes its body from a PNG; `index` leads through the answer to the class."""

    title: str
    path: str = "/predict"
    media_type: str = "image/png"
    encode: Callable[[bytes], bytes] = bytes
    index: tuple[str | int, ...] = ("index",)

    def ask(self, body: bytes, client: httpx.Client) -> httpx.Response:
        return client.post(self.path, content=body, headers={"Content-Type": self.media_type})


@dataclass(frozen=True)
class Contestant:
    """A server. `command` is what Python runs, word by word with {model}, {port} and the folder {peers}."""

    name: str
    command: str
    ways: tuple[Way, ...]
    note: str

    def start(self, model: Path, png: bytes, work: Path) -> Server:
        """Serves `model` on core 0, ready when it classifies `png`. Peers run in environments below `work`."""
        python, port, env = sys.executable, free_port(), {**os.environ, **_ENVIRONMENT, "MODEL": str(model)}
        if self.name != "ours":
            python, env["PYTHONPATH"] = str(make_environment(self.name, work / "peers")), str(PEERS)
        words = [word.format(model=model, port=port, peers=PEERS) for word in self.command.split()]
        log, probe = model.parent / f"{self.name}.log", partial(self.ways[0].ask, self.ways[0].encode(png))
        return Server([python, *words], port, probe=probe, core=SERVERS_CORE, log=log, env=env, cwd=model.parent)


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
    files = {field: ("image.png", png, "image/png")}
    return httpx.Request("POST", "http://server", headers={"Content-Type": MULTIPART}, files=files).read()


def as_inference_request(png: bytes) -> bytes:
    """The V2 protocol's JSON with one base64 element, as MLServer's codec for files writes it."""
    element = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": {"content_type": "base64"}}
    return json.dumps({"inputs": [{**element, "data": [base64.b64encode(png).decode()]}]}).encode()


_OURS, _INFER = ("results", 0, "index"), "/v2/models/classifier/infer"
_form = partial(Way, media_type=MULTIPART, encode=partial(as_form, "image"))
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


@dataclass(frozen=True)
class ServedNet:
    """One ONNX file, the images that clients send, and the class that it gives to each of them.

    `record` is filled round by round: milliseconds of the model alone, and in a row for each way to ask a server what
    wrk measured with each number of connections, or why it failed.
    """

    path: Path
    pngs: list[bytes]
    expected: list[int]
    record: dict[str, Any]


def write_net(size: str, contestants: Sequence[Contestant], folder: Path) -> ServedNet:
    """Build, fold and export a net of `SIZES` into `folder`, with an empty record."""
    info = info_of("fashion-mnist")
    family, depth, width, nonlinearity = SIZES[size]
    spec = Spec(family, depth, width, nonlinearity, info.image, info.labels)
    plain = fold(random_net(spec)).float()
    pngs = [path.read_bytes() for path in sorted((ROOT / "models" / "held-out").glob("*.png"))]
    images = np.stack([decode(png, info.image) for png in pngs])
    # Random weights give one class to every image, which would check nothing: standardise each logit over images.
    std, mean = torch.std_mean(plain(torch.from_numpy(images)), dim=0)
    head = plain.graph["fc"].tensors
    head["weight"].div_(std[:, None])
    head["bias"].sub_(mean).div_(std)
    model = to_onnx(lower(plain, DEFAULT_LOWERING), spec, {})
    path = write_whole(folder / f"{size}.onnx", model.SerializeToString())
    expected = OnnxSession(path, num_threads=1)(images).argmax(axis=1).tolist()
    record = {
        "picture": f"server-{size}.png",
        "title": f"{spec.name}, {family}, {nonlinearity}",
        "macs": count_macs(plain, info.image),
        "alone": {},
        "rows": [
            {"server": one.name, "title": way.title, "failed": None, "loads": {str(num): [] for num in CONNECTIONS}}
            for one in contestants
            for way in one.ways
        ],
    }
    return ServedNet(path, pngs, expected, record)


def race(
    contestants: Sequence[Contestant], nets: Sequence[ServedNet], work: Path, *, num_rounds: int, seconds: int
) -> None:
    """Fill the records of `nets`; every second round runs in reverse order."""
    with progress(make_console(), "starts of a server", num_rounds * len(nets) * len(contestants)) as advance:
        for _, turn in turns(contestants, num_rounds):
            for net in nets:
                alone = in_fresh_process(time_alone, net.path, net.pngs[0], seconds / 2, core=SERVERS_CORE)
                for name, milliseconds in alone.items():
                    net.record["alone"].setdefault(name, []).append(milliseconds)
                for contestant in turn:
                    measure(contestant, net, work, seconds=seconds)
                    advance(note=f"{net.record['title']}: {contestant.name}")


def measure(contestant: Contestant, net: ServedNet, work: Path, *, seconds: int) -> None:
    """Start a server once and add a measurement to each of its rows that has not failed."""
    rows = {row["title"]: row for row in net.record["rows"] if not row["failed"]}
    ways = [way for way in contestant.ways if way.title in rows]
    if not ways:
        return
    try:
        with contestant.start(net.path, net.pngs[0], work) as server:
            for way in ways:
                _put_loads(server, way, net, rows[way.title], seconds=seconds)
    except Refusal as refusal:
        for way in ways:
            rows[way.title]["failed"] = str(refusal)


def _put_loads(server: Server, way: Way, net: ServedNet, row: dict[str, Any], *, seconds: int) -> None:
    bodies = [way.encode(png) for png in net.pngs]
    check_answers(server.client, way, bodies, net.expected)
    files = [write_whole(net.path.parent / "bodies" / str(index), body) for index, body in enumerate(bodies)]
    load = partial(put_load, server.url, way.path, way.media_type, files)
    load(num_connections=CONNECTIONS[-1], seconds=1)  # warm up
    for num_connections in CONNECTIONS:
        found = load(num_connections=num_connections, seconds=seconds)
        row["loads"][str(num_connections)].append(found)
        if found["failures"]:
            row["failed"] = f"{found['failures']} failures at {num_connections} connections"


def check_answers(client: httpx.Client, way: Way, bodies: list[bytes], expected: list[int]) -> None:
    """Post every body once; refuses a class that is not the model's own."""
    try:
        found = [reduce(getitem, way.index, way.ask(body, client).raise_for_status().json()) for body in bodies]
    except httpx.HTTPError as error:
        raise Refusal(f"{way.title} does not answer: {error}") from error
    if found != expected:
        raise Refusal(f"{way.title} answers {found} where the model itself gives {expected}")
