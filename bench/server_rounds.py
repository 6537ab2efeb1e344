"""Rounds over servers: each is started anew, checked, warmed up and put under load."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.environments import make_environment
from bench.load import put_load
from bench.running import check_answers, running
from bench.served_nets import ServedNet
from bench.servers import ROOT, Server, Way
from common.files import write_whole
from common.refusal import Refusal

CONNECTIONS = (1, 16, 64)
_WARM_UP_S = 1


@dataclass
class Row:
    """What one way to ask a server gave, round by round, for each number of connections; or why it failed."""

    server: str
    title: str
    failed: str | None = None
    loads: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {str(num): [] for num in CONNECTIONS})


@dataclass(frozen=True)
class Field:
    """The servers of one machine and what they are asked. `pythons` holds a reason where there is no environment."""

    servers: Sequence[Server]
    pythons: dict[str, Path | str]
    pngs: list[bytes]
    folder: Path

    def measure(self, server: Server, net: ServedNet, rows: dict[str, Row], *, seconds: int, warm_up: bool) -> None:
        """Start a server once and add a measurement to each of its rows that has not failed."""
        ways = [way for way in server.ways if not rows[way.title].failed]
        if not ways:
            return
        try:
            python = self.pythons[server.name]
            if isinstance(python, str):
                raise Refusal(python)
            with running(server, python, net.path, self.folder / f"{server.name}.log") as url:
                for way in ways:
                    self._put_loads(url, way, net, rows[way.title], seconds=seconds, warm_up=warm_up)
        except Refusal as refusal:
            for way in ways:
                rows[way.title].failed = str(refusal)

    def _put_loads(self, url: str, way: Way, net: ServedNet, row: Row, *, seconds: int, warm_up: bool) -> None:
        bodies = [way.encode(png) for png in self.pngs]
        check_answers(url, way, bodies, net.expected)
        folder = self.folder / "bodies"
        files = [write_whole(folder / f"{index}", body) for index, body in enumerate(bodies)]
        if warm_up:
            put_load(url, way.path, way.media_type, files, num_connections=CONNECTIONS[-1], seconds=_WARM_UP_S)
        for num_connections in CONNECTIONS:
            load = put_load(url, way.path, way.media_type, files, num_connections=num_connections, seconds=seconds)
            row.loads[str(num_connections)].append(asdict(load))
            if load.failures:
                row.failed = f"{load.failures} failures at {num_connections} connections"


def open_field(servers: Sequence[Server], work: Path, say: Callable[[str], None]) -> Field:
    """Make the environments of `servers` below `work`, and read the images that they are asked."""
    pythons: dict[str, Path | str] = {}
    for server in servers:
        if server.environment is None:
            pythons[server.name] = Path(sys.executable)
            continue
        say(f"environment of {server.name}")
        try:
            pythons[server.name] = make_environment(server.environment, work / "peers")
        except Refusal as refusal:
            pythons[server.name] = str(refusal)
    pngs = [path.read_bytes() for path in sorted((ROOT / "models" / "held-out").glob("*.png"))]
    return Field(servers, pythons, pngs, work / "server")
