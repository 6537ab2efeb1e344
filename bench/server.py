"""python bench/server.py: our server beside a naive FastAPI handler and five others."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from bench.server_race import Race, RaceRow, ServedNet

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
    or fails a request is a row with its reason. Exit status 1 if ours fails.
    """
    from bench.lab.wrk import refuse_without_tools
    from bench.page import describe_machine, write_page
    from bench.request_steps import time_steps
    from bench.server_page import draw_latencies, markdown
    from bench.server_race import CONNECTIONS, open_race, write_net
    from bench.servers import CONTESTANTS
    from common.cores import num_cores
    from common.figure import png
    from common.files import write_whole
    from common.progress import make_console

    refuse_without_tools()
    console = make_console()
    contestants = [one for one in CONTESTANTS if not config.servers or one.name in config.servers]
    race = open_race(contestants, config.work.absolute(), console.print)
    nets = [write_net(size, race.folder, race.pngs) for size in config.models]
    for net in nets:
        console.print(f"{net.title}: {net.num_macs:,} multiplications per image, {net.path}")
    record: dict[str, Any] = {
        "command": f"python bench/server.py {given_arguments(config)}".rstrip(),
        **dict(zip(("rounds", "seconds"), config.schedule, strict=True)),
        "connections": CONNECTIONS,
        "machine": describe_machine() | {"cores": f"{num_cores()}: the server on core 0, wrk on core 1"},
        "servers": [{"name": one.name, "note": one.note} for one in race.contestants],
        "models": [
            {
                "picture": f"server-{size}.png",
                "title": net.title,
                "macs": net.num_macs,
                "alone": alone,
                "steps": time_steps(net.path, race.pngs[0]),
                "rows": list(map(asdict, rows)),
            }
            for size, net, (rows, alone) in zip(config.models, nets, _measure(race, nets, config, console), strict=True)
        ],
    }
    for model in record["models"]:
        figure = draw_latencies(model, CONNECTIONS[-1])
        console.print(f"wrote {write_whole(config.out / model['picture'], png(figure))}")
    console.print(write_page(config.out, "server", markdown(record), record))
    rows = [row for model in record["models"] for row in model["rows"]]
    return int(any(row["failed"] for row in rows if row["server"] == "ours"))


def _measure(
    race: "Race", nets: "list[ServedNet]", config: ServerConfig, console: "Console"
) -> "list[tuple[list[RaceRow], dict[str, list[float]]]]":
    """For each net its rows, and the times of the model alone; every second round runs in reverse order."""
    from bench.request_steps import time_alone
    from bench.server_race import RaceRow
    from common.progress import progress

    num_rounds, seconds = config.schedule
    tables = [{way.title: RaceRow(one.name, way.title) for one in race.contestants for way in one.ways} for _ in nets]
    alone: list[dict[str, list[float]]] = [{} for _ in nets]
    with progress(console, "starts of a server", num_rounds * len(nets) * len(race.contestants)) as advance:
        for index in range(num_rounds):
            for net, rows, times in zip(nets, tables, alone, strict=True):
                for name, milliseconds in time_alone(net.path, race.pngs[0], seconds / 2).items():
                    times.setdefault(name, []).append(milliseconds)
                for contestant in race.contestants[:: -1 if index % 2 else 1]:
                    race.measure(contestant, net, rows, seconds=seconds, warm_up=not config.quick)
                    advance(note=f"{net.title}: {contestant.name}")
    return [(list(rows.values()), times) for rows, times in zip(tables, alone, strict=True)]


if __name__ == "__main__":
    sys.exit(run_command(command, ServerConfig, examples=EXAMPLES))
