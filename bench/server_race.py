"""A race of servers: one net served by each in turn, its answers checked, then requests without a pause."""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.lab.server import Server, free_port
from bench.lab.wrk import put_load
from bench.nets import count_macs, random_net
from bench.servers import PEERS, ROOT, Contestant, Way, make_environment
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
_WARM_UP_S = 1
_ANSWER_S = 90.0  # for the first answer of a server that listens before its model is loaded
# None of them may use the network; every library that opens threads of its own gets the one core.
_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class RaceRow:
    """The results of one way to ask a server, round by round, for each number of connections; or why it failed."""

    server: str
    title: str
    failed: str | None = None
    loads: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {str(num): [] for num in CONNECTIONS})


@dataclass(frozen=True)
class ServedNet:
    """One ONNX file, and the class that it gives to each of the images."""

    path: Path
    title: str
    num_macs: int
    expected: list[int]


@dataclass(frozen=True)
class Race:
    """The servers of one machine and the images sent to them. `pythons` has a reason where there is no environment."""

    contestants: Sequence[Contestant]
    pythons: dict[str, Path | str]
    pngs: list[bytes]
    folder: Path

    def measure(
        self, contestant: Contestant, net: ServedNet, rows: dict[str, RaceRow], *, seconds: int, warm_up: bool
    ) -> None:
        """Start a server once and add a measurement to each of its rows that has not failed."""
        ways = [way for way in contestant.ways if not rows[way.title].failed]
        if not ways:
            return
        try:
            python = self.pythons[contestant.name]
            if isinstance(python, str):
                raise Refusal(python)
            with start_contestant(contestant, python, net.path, self.folder / f"{contestant.name}.log") as server:
                for way in ways:
                    self._put_loads(server.url, way, net, rows[way.title], seconds=seconds, warm_up=warm_up)
        except Refusal as refusal:
            for way in ways:
                rows[way.title].failed = str(refusal)

    def _put_loads(self, url: str, way: Way, net: ServedNet, row: RaceRow, *, seconds: int, warm_up: bool) -> None:
        bodies = [way.encode(png) for png in self.pngs]
        check_answers(url, way, bodies, net.expected)
        files = [write_whole(self.folder / "bodies" / f"{index}", body) for index, body in enumerate(bodies)]
        if warm_up:
            put_load(url, way.path, way.media_type, files, num_connections=CONNECTIONS[-1], seconds=_WARM_UP_S)
        for num_connections in CONNECTIONS:
            load = put_load(url, way.path, way.media_type, files, num_connections=num_connections, seconds=seconds)
            row.loads[str(num_connections)].append(asdict(load))
            if load.failures:
                row.failed = f"{load.failures} failures at {num_connections} connections"


def open_race(contestants: Sequence[Contestant], work: Path, say: Callable[[str], None]) -> Race:
    """Make the environments of `contestants` below `work`, and read the images to send."""
    pythons: dict[str, Path | str] = {}
    for one in contestants:
        if one.is_ours:
            pythons[one.name] = Path(sys.executable)
            continue
        say(f"environment of {one.name}")
        try:
            pythons[one.name] = make_environment(one.name, work / "peers")
        except Refusal as refusal:
            pythons[one.name] = str(refusal)
    pngs = [path.read_bytes() for path in sorted((ROOT / "models" / "held-out").glob("*.png"))]
    return Race(contestants, pythons, pngs, work / "server")


def start_contestant(contestant: Contestant, python: Path, model: Path, log: Path) -> Server:
    """A server of `model` on core 0, ready when it accepts connections."""
    port, env = free_port(), {**os.environ, **_ENVIRONMENT, "MODEL": str(model)}
    if not contestant.is_ours:
        env["PYTHONPATH"] = str(PEERS)
    command = [str(python), *contestant.arguments(model, port)]
    return Server(command, port, ready_path=None, core=0, log=log, env=env, cwd=log.parent)


def check_answers(url: str, way: Way, bodies: list[bytes], expected: list[int]) -> None:
    """Post every body once; refuses a class that is not the model's own. The first one may have to wait."""
    found = [way.find_index(_post(url + way.path, way.media_type, body)) for body in bodies]
    if found != expected:
        raise Refusal(f"{way.title} answers {found} where the model itself gives {expected}")


def _post(url: str, media_type: str, body: bytes) -> object:
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


def write_net(size: str, folder: Path, pngs: list[bytes]) -> ServedNet:
    """Build, fold and export a net of `SIZES` into `folder`."""
    info = info_of("fashion-mnist")
    family, depth, width, nonlinearity = SIZES[size]
    spec = Spec(family, depth, width, nonlinearity, info.image, info.labels)
    plain = fold_net(random_net(spec, seed=0)).float()
    images = np.stack([decode(png, info.image) for png in pngs])
    _tell_apart(plain, images)
    model = to_onnx(lower(plain, DEFAULT_LOWERING), spec, {})
    path = write_whole(folder / f"{size}.onnx", model.SerializeToString())
    expected = OnnxSession(path, num_threads=1)(images).argmax(axis=1).tolist()
    return ServedNet(path, f"{spec.name}, {family}, {nonlinearity}", count_macs(plain, info.image), expected)


@torch.no_grad()
def _tell_apart(plain: nn.Sequential, images: np.ndarray) -> None:
    """Standardise the logits over `images`: random weights give one class to every image, which would check nothing."""
    std, mean = torch.std_mean(plain(torch.from_numpy(images)), dim=0)
    plain.fc.weight /= std[:, None]
    plain.fc.bias.copy_((plain.fc.bias - mean) / std)
