"""python bench/reliability.py: overload, signals, kill -9 and attacks, on this machine alone."""

import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, bars_table, describe_machine, render, report_missed, typed_command, write_page
from bench.lab.server import IMAGE, MODEL, ROOT
from common.cli import POSITIONAL, run_command
from common.documents import read_object
from common.files import read_whole
from common.progress import make_console, progress

EXAMPLES = (
    "python bench/reliability.py                      # five minutes; writes docs/reliability.md and its record",
    "python bench/reliability.py --quick --out /tmp/reliability",
    "python bench/reliability.py --only attacks siege # the record keeps its other parts",
)
TITLES = {
    "overload": "Ten times more than it can answer",
    "drain": "SIGTERM under load",
    "reload": "SIGHUP under load",
    "kill": "kill -9 of one worker of two",
    "front-ends": "kill -9 of front ends and of their device process",
    "attacks": "Endless and slow requests",
    "siege": "Under siege",
}
Part = Literal["overload", "drain", "reload", "kill", "front-ends", "attacks", "siege"]


@dataclass(frozen=True)
class ReliabilityConfig(Measurement):
    model: Annotated[Path, "plain.onnx to serve", POSITIONAL] = MODEL
    image: Annotated[Path, "the image to send"] = IMAGE
    seconds: Annotated[float, "how long ten times the maximum is offered"] = 30.0
    rounds: Annotated[int, "how often SIGTERM and kill -9 of a worker are tried"] = 5
    reloads: Annotated[int, "how often the model is exchanged"] = 30
    kill_seconds: Annotated[int, "of the load under which front ends and device processes are killed"] = 100
    kill_every: Annotated[int, "seconds from one of these kills to the next"] = 20
    quick: Annotated[bool, "3 s of overload, one round, 4 reloads, 2 kills in 10 s"] = False
    out: Annotated[Path, "folder for reliability.md and reliability.json"] = ROOT / "docs"
    only: Annotated[tuple[Part, ...], "parts to measure (default: all)"] = ()
    render: Annotated[bool, "measure nothing: write the page of the record in the folder again"] = False


def command(config: ReliabilityConfig) -> int:
    """Put a server under load on 127.0.0.1 and expose it to the faults of operators and strangers.

    Writes a record and its page. Exit status 1 if a measured bar is missed.
    """
    path, record = config.out / "reliability.json", {"alone": {}}
    if config.render or config.only:
        record = read_object(read_whole(path), str(path), todo="choose another --out")
    if not config.render:
        record = _measure(config, record)
    print(write_page(config.out, "reliability", page(record), record))
    return report_missed(record, config.only or TITLES)


def _measure(config: ReliabilityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the chosen parts measured anew; it says which of them were measured alone."""
    about = {
        "command": typed_command("bench/reliability.py", config),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    if config.quick:
        config = replace(config, seconds=3.0, rounds=1, reloads=4, kill_seconds=10, kill_every=4)
    measured = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "served.onnx")
        turns = [turn for turn in _turns(config, copy) if turn[0] in (config.only or TITLES)]
        with progress(make_console(), "reliability", len(turns)) as advance:
            for name, fault in turns:
                shutil.copy(config.model, copy)
                measured[name].append(fault())
                advance(1, name)
    if not config.only:
        return {**about, "model": config.model.name, **record, **measured}
    return {**record, **measured, "alone": {**record["alone"], **dict.fromkeys(measured, about)}}


def _turns(config: ReliabilityConfig, copy: Path) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The faults in the order in which they are tried; those that change the model's file serve its `copy`."""
    from uvloop import run

    from bench.servers import attacks, faults

    model, image, strangers = config.model, read_whole(config.image), attacks.siege_attacks(quick=config.quick)
    kills = {"seconds": config.kill_seconds, "every_s": config.kill_every}
    return [
        ("overload", lambda: run(faults.overload(model, image, seconds=config.seconds))),
        ("reload", lambda: run(faults.reload(copy, image, times=config.reloads))),
        *config.rounds * [("drain", lambda: run(faults.drain(model, image)))],
        *config.rounds * [("kill", lambda: run(faults.kill(model, image)))],
        ("front-ends", lambda: run(faults.kill_front_ends(model, image, **kills))),
        ("attacks", lambda: run(attacks.attack(model))),
        ("siege", lambda: run(attacks.siege(model, image, strangers))),
    ]


def page(record: Mapping[str, Any]) -> str:
    return render("reliability", record, bars=bars_table(TITLES, record))


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
