"""A race of servers: one net served by each in turn, its answers checked, then requests without a pause."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console

from bench.lab.process import in_fresh_process
from bench.lab.rounds import turns
from bench.lab.server import ROOT, START_S, Server
from bench.lab.wrk import put_load
from bench.nets import count_macs, random_net
from bench.servers.contestants import Contestant, Way
from bench.servers.page import CONNECTIONS
from bench.servers.request_steps import time_alone
from common.files import write_whole
from common.image import decode
from common.progress import progress
from common.refusal import Refusal
from common.spec import Spec
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from export.to_onnx import DEFAULT_LOWERING
from fold.lower import lower
from fold.plain import fold_net
from train.data.datasets import info_of

SERVERS_CORE = 0
# Family, depth, width and nonlinearity of the seeded random nets for 28x28 grey images that all servers serve.
SIZES = {"small": ("pooled", 16, 1.0, "relu"), "large": ("cifar", 16, 1.0, "ncrelu")}


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
    contestants: Sequence[Contestant],
    nets: Sequence[ServedNet],
    work: Path,
    num_rounds: int,
    seconds: int,
    console: Console,
    *,
    warm_up: bool,
) -> None:
    """Fill the records of `nets`; every second round runs in reverse order."""
    with progress(console, "starts of a server", num_rounds * len(nets) * len(contestants)) as advance:
        for _, turn in turns(contestants, num_rounds):
            for net in nets:
                alone = in_fresh_process(time_alone, net.path, net.pngs[0], seconds / 2, core=SERVERS_CORE)
                for name, milliseconds in alone.items():
                    net.record["alone"].setdefault(name, []).append(milliseconds)
                for contestant in turn:
                    measure(contestant, net, work, seconds=seconds, warm_up=warm_up)
                    advance(note=f"{net.record['title']}: {contestant.name}")


def measure(contestant: Contestant, net: ServedNet, work: Path, *, seconds: int, warm_up: bool) -> None:
    """Start a server once and add a measurement to each of its rows that has not failed."""
    rows = {row["title"]: row for row in net.record["rows"] if not row["failed"]}
    ways = [way for way in contestant.ways if way.title in rows]
    if not ways:
        return
    try:
        with contestant.start(net.path, work) as server:
            for way in ways:
                _put_loads(server, way, net, rows[way.title], seconds=seconds, warm_up=warm_up)
    except Refusal as refusal:
        for way in ways:
            rows[way.title]["failed"] = str(refusal)


def _put_loads(server: Server, way: Way, net: ServedNet, row: dict[str, Any], *, seconds: int, warm_up: bool) -> None:
    bodies = [way.encode(png) for png in net.pngs]
    check_answers(server.client, way, bodies, net.expected)
    files = [write_whole(net.path.parent / "bodies" / str(index), body) for index, body in enumerate(bodies)]
    load = partial(put_load, server.url, way.path, way.media_type, files)
    if warm_up:
        load(num_connections=CONNECTIONS[-1], seconds=1)
    for num_connections in CONNECTIONS:
        found = load(num_connections=num_connections, seconds=seconds)
        row["loads"][str(num_connections)].append(found)
        if found["failures"]:
            row["failed"] = f"{found['failures']} failures at {num_connections} connections"


def check_answers(client: httpx.Client, way: Way, bodies: list[bytes], expected: list[int]) -> None:
    """Post every body once; refuses a class that is not the model's own. The first one may have to wait."""
    found = [reduce(getitem, way.index, _post(client, way, body)) for body in bodies]
    if found != expected:
        raise Refusal(f"{way.title} answers {found} where the model itself gives {expected}")


def _post(client: httpx.Client, way: Way, body: bytes) -> Any:
    """The JSON of the answer. A server that listens before its model is loaded is asked again."""
    until = time.monotonic() + START_S
    while True:
        try:
            answer = client.post(way.path, content=body, headers={"Content-Type": way.media_type})
            return answer.raise_for_status().json()
        except httpx.HTTPError as error:
            if time.monotonic() > until:
                raise Refusal(f"{way.title} gives no answer after {START_S:g} s: {error}") from error
            time.sleep(0.1)
