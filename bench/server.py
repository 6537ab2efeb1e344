"""python bench/server.py: our server beside a naive FastAPI handler and five others."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from bench.served_nets import ServedNet
    from bench.server_rounds import Field, Row

EXAMPLES = (
    "python bench/server.py                            # ten minutes; writes docs/benchmarks/server.md and .json",
    "python bench/server.py --quick --out runs/bench   # one round of one second each: under two minutes",
    "python bench/server.py --servers ours litserve --models small --rounds 5 --out runs/bench",
)


@dataclass(frozen=True)
class ServerConfig:
    servers: Annotated[
        tuple[Literal["ours", "fastapi", "litserve", "bentoml", "ray", "mlserver", "mosec"], ...],
        "which are compared (default: all)",
    ] = ()
    models: Annotated[tuple[Literal["small", "large"], ...], "4.7 and 38 million multiplications per image"] = (
        "small",
        "large",
    )
    rounds: Annotated[int, "rounds that alternate over the servers, each started anew"] = 3
    seconds: Annotated[int, "of one measurement"] = 2
    quick: Annotated[bool, "one round of one second each, without warm-up"] = False
    work: Annotated[Path, "folder for environments, models and logs"] = Path("runs/bench")
    out: Annotated[Path, "folder for server.md and server.json"] = Path("docs/benchmarks")

    def __post_init__(self) -> None:
        if min(self.rounds, self.seconds, len(self.models)) < 1:
            raise Refusal("--rounds and --seconds must be at least 1, and --models must name one")

    @property
    def schedule(self) -> tuple[int, int]:
        """Rounds, and seconds of a measurement."""
        return (1, 1) if self.quick else (self.rounds, self.seconds)


def command(config: ServerConfig) -> int:
    """Requests per second and latency of servers of one ONNX file, each on one core with its client on another.

    Answers are compared with the model's own first. A server that cannot be installed or started, answers wrongly
    or fails a request is a row with its reason. Exit status 1 where that is ours.
    """
    from dataclasses import asdict

    from bench.latency import curves_of, draw_latencies
    from bench.load import refuse_without_tools
    from bench.page import describe_machine, write_page
    from bench.request_steps import time_steps
    from bench.served_nets import write_net
    from bench.server_page import markdown
    from bench.server_rounds import CONNECTIONS, open_field
    from bench.servers import SERVERS
    from common.cores import num_cores
    from common.figure import png
    from common.files import write_whole
    from common.progress import make_console

    refuse_without_tools()
    console = make_console()
    servers = [server for server in SERVERS if not config.servers or server.name in config.servers]
    field = open_field(servers, config.work.absolute(), console.print)
    num_rounds, seconds = config.schedule
    record: dict[str, Any] = {
        "command": f"python bench/server.py {given_arguments(config)}".rstrip(),
        "rounds": num_rounds,
        "seconds": seconds,
        "connections": CONNECTIONS,
        "machine": describe_machine() | {"cores": f"{num_cores()}: the server on core 0, wrk on core 1"},
        "servers": [{"name": server.name, "note": server.note} for server in field.servers],
        "models": [],
    }
    nets = [write_net(size, field.folder, field.pngs) for size in config.models]
    for net in nets:
        console.print(f"{net.title}: {net.num_macs:,} multiplications per image, {net.path}")
    for size, (net, rows, alone) in zip(config.models, _measure(field, nets, config, console), strict=True):
        steps = time_steps(net.path, field.pngs[0])
        model = {
            "title": net.title,
            "macs": net.num_macs,
            "alone": alone,
            "steps": steps,
            "rows": [asdict(row) for row in rows],
        }
        record["models"].append({"picture": f"server-{size}.png", **model})
    most = CONNECTIONS[-1]
    for model in record["models"]:
        figure = draw_latencies(curves_of(model["rows"], most), f"{model['title']}: {most} connections")
        console.print(f"wrote {write_whole(config.out / model['picture'], png(figure))}")
    console.print(write_page(config.out, "server", markdown(record), record))
    rows = [row for model in record["models"] for row in model["rows"]]
    return int(any(row["failed"] for row in rows if row["server"] == "ours"))


def _measure(
    field: "Field", nets: "list[ServedNet]", config: ServerConfig, console: "Console"
) -> "list[tuple[ServedNet, list[Row], dict[str, list[float]]]]":
    """For each net its rows, and the times of the model alone; every second round runs in reverse order."""
    from bench.alone import time_alone
    from bench.server_rounds import Row
    from common.progress import progress

    num_rounds, seconds = config.schedule
    tables = [{way.title: Row(server.name, way.title) for server in field.servers for way in server.ways} for _ in nets]
    alone: list[dict[str, list[float]]] = [{} for _ in nets]
    with progress(console, "starts of a server", num_rounds * len(nets) * len(field.servers)) as advance:
        for index in range(num_rounds):
            for net, rows, times in zip(nets, tables, alone, strict=True):
                for name, milliseconds in time_alone(net.path, field.pngs[0], seconds / 2).items():
                    times.setdefault(name, []).append(milliseconds)
                for server in field.servers[:: -1 if index % 2 else 1]:
                    field.measure(server, net, rows, seconds=seconds, warm_up=not config.quick)
                    advance(note=f"{net.title}: {server.name}")
    return [(net, list(rows.values()), times) for net, rows, times in zip(nets, tables, alone, strict=True)]


if __name__ == "__main__":
    sys.exit(run_command(command, ServerConfig, examples=EXAMPLES))
