"""python bench/server.py: our server beside a naive FastAPI handler and five others."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.load import refuse_without_tools
from bench.lab.page import Measurement, describe_machine, publish
from bench.lab.process import in_fresh_process
from common.cli import run_command
from common.environment import num_cores
from common.files import write_whole
from common.progress import make_console

EXAMPLES = (
    "python bench/server.py                            # ten minutes; writes docs/benchmarks/server.md and .json",
    "python bench/server.py --quick --out runs/bench   # one round of one second each: under two minutes",
    "python bench/server.py --servers ours litserve --models small --rounds 5 --out runs/bench",
)


@dataclass(frozen=True)
class ServerConfig(Measurement):
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
    quick: Annotated[bool, "one round of one second each"] = False
    work: Annotated[Path, "folder for environments, models and logs"] = Path("runs/bench")
    out: Annotated[Path, "folder for server.md and server.json"] = Path("docs/benchmarks")


def command(config: ServerConfig) -> int:
    """Requests per second and latency of servers of one ONNX file, each on one core with its client on another.

    Answers are compared with the model's own first. A server that cannot be installed or started, answers wrongly
    or fails a request is a row with its reason. Exit status 1 if ours fails.
    """
    from bench.servers.page import CONNECTIONS, draw_latencies, page
    from bench.servers.race import CONTESTANTS, SERVERS_CORE, race, write_net
    from bench.servers.request_steps import time_steps
    from common.figure import png

    refuse_without_tools()
    console, work = make_console(), config.work.absolute()
    rounds, seconds = (1, 1) if config.quick else (config.rounds, config.seconds)
    contestants = [one for one in CONTESTANTS if not config.servers or one.name in config.servers]
    nets = [write_net(size, contestants, work / "server") for size in config.models]
    for net in nets:
        console.print(f"{net.record['title']}: {net.record['macs']:,} multiplications per image, {net.path}")
    race(contestants, nets, work, num_rounds=rounds, seconds=seconds)
    models = [
        net.record | {"steps": in_fresh_process(time_steps, net.path, net.pngs[0], core=SERVERS_CORE)} for net in nets
    ]
    for model in models:
        console.print(f"wrote {write_whole(config.out / model['picture'], png(draw_latencies(model)))}")
    publish(
        config,
        "server",
        page,
        rounds=rounds,
        seconds=seconds,
        connections=CONNECTIONS,
        machine=describe_machine() | {"cores": f"{num_cores()}: the server on core 0, wrk on core 1"},
        servers=[{"name": one.name, "note": one.note} for one in contestants],
        models=models,
    )
    return int(any(row["failed"] for model in models for row in model["rows"] if row["server"] == "ours"))


if __name__ == "__main__":
    sys.exit(run_command(command, ServerConfig, examples=EXAMPLES))
