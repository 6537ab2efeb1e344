"""A race of servers: one net served by each in turn, its answers checked, then requests without a pause."""

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lab.server import ROOT
from bench.lab.wrk import put_load
from bench.nets import count_macs, random_net
from bench.servers.contestants import Contestant, Way
from common.files import write_whole
from common.image import decode
from common.refusal import Refusal
from common.spec import Spec
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from export.to_onnx import DEFAULT_LOWERING
from fold.lower import lower
from fold.plain import fold_net
from train.data.datasets import info_of

CONNECTIONS = (1, 16, 64)
# Family, depth, width and nonlinearity of the seeded random nets for 28x28 grey images that all servers serve.
SIZES = {"small": ("pooled", 16, 1.0, "relu"), "large": ("cifar", 16, 1.0, "ncrelu")}
_ANSWER_S = 90.0  # for the first answer of a server that listens before its model is loaded


@dataclass
class WayResult:
    """What one way to ask a server reached, round by round, for each number of connections; or why it failed."""

    server: str
    title: str
    failed: str | None = None
    loads: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {str(num): [] for num in CONNECTIONS})


@dataclass(frozen=True)
class ServedNet:
    """One ONNX file, the images that clients send, the class that it gives to each of them, and what is measured."""

    size: str
    path: Path
    title: str
    num_macs: int
    pngs: list[bytes]
    expected: list[int]
    results: dict[str, WayResult]  # by the title of the way
    alone: dict[str, list[float]] = field(default_factory=dict)  # milliseconds of the model alone, round by round

    def to_dict(self) -> dict[str, Any]:
        return {
            "picture": f"server-{self.size}.png",
            "title": self.title,
            "macs": self.num_macs,
            "alone": self.alone,
            "rows": list(map(asdict, self.results.values())),
        }


def write_net(size: str, contestants: Sequence[Contestant], folder: Path) -> ServedNet:
    """Build, fold and export a net of `SIZES` into `folder`, without results as yet."""
    info = info_of("fashion-mnist")
    family, depth, width, nonlinearity = SIZES[size]
    spec = Spec(family, depth, width, nonlinearity, info.image, info.labels)
    plain = fold_net(random_net(spec)).float()
    pngs = [path.read_bytes() for path in sorted((ROOT / "models" / "held-out").glob("*.png"))]
    images = np.stack([decode(png, info.image) for png in pngs])
    with torch.no_grad():
        # Random weights give one class to every image, which would check nothing: standardise each logit over images.
        std, mean = torch.std_mean(plain(torch.from_numpy(images)), dim=0)
        plain.fc.weight /= std[:, None]
        plain.fc.bias.copy_((plain.fc.bias - mean) / std)
    model = to_onnx(lower(plain, DEFAULT_LOWERING), spec, {})
    path = write_whole(folder / f"{size}.onnx", model.SerializeToString())
    expected = OnnxSession(path, num_threads=1)(images).argmax(axis=1).tolist()
    title, num_macs = f"{spec.name}, {family}, {nonlinearity}", count_macs(plain, info.image)
    results = {way.title: WayResult(one.name, way.title) for one in contestants for way in one.ways}
    return ServedNet(size, path, title, num_macs, pngs, expected, results)


def measure(contestant: Contestant, net: ServedNet, work: Path, *, seconds: int, warm_up: bool) -> None:
    """Start a server once and add a measurement to each of its results that has not failed."""
    ways = [way for way in contestant.ways if not net.results[way.title].failed]
    if not ways:
        return
    try:
        with contestant.start(net.path, work) as server:
            for way in ways:
                _put_loads(server.url, way, net, seconds=seconds, warm_up=warm_up)
    except Refusal as refusal:
        for way in ways:
            net.results[way.title].failed = str(refusal)


def _put_loads(url: str, way: Way, net: ServedNet, *, seconds: int, warm_up: bool) -> None:
    result, bodies = net.results[way.title], [way.encode(png) for png in net.pngs]
    check_answers(url, way, bodies, net.expected)
    files = [write_whole(net.path.parent / "bodies" / str(index), body) for index, body in enumerate(bodies)]
    load = partial(put_load, url, way.path, way.media_type, files)
    if warm_up:
        load(num_connections=CONNECTIONS[-1], seconds=1)
    for num_connections in CONNECTIONS:
        found = load(num_connections=num_connections, seconds=seconds)
        result.loads[str(num_connections)].append(asdict(found))
        if found.failures:
            result.failed = f"{found.failures} failures at {num_connections} connections"


def check_answers(url: str, way: Way, bodies: list[bytes], expected: list[int]) -> None:
    """Post every body once; refuses a class that is not the model's own. The first one may have to wait."""
    found = [reduce(getitem, way.index, _post(url + way.path, way.media_type, body)) for body in bodies]
    if found != expected:
        raise Refusal(f"{way.title} answers {found} where the model itself gives {expected}")


def _post(url: str, media_type: str, body: bytes) -> Any:
    """The JSON of the answer. A server that listens before its model is loaded is asked again."""
    until = time.monotonic() + _ANSWER_S
    while True:
        try:
            request = urllib.request.Request(url, body, {"Content-Type": media_type})
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                return json.load(answer)
        except OSError as error:  # or a status above 399
            if time.monotonic() > until:
                raise Refusal(f"{url} gives no answer after {_ANSWER_S:g} s: {error}") from error
            time.sleep(0.1)
