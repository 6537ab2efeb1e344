"""python bench/shortcuts.py: what each shortcut of the server brings; writes docs/benchmarks/shortcuts.md."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.load import put_load, refuse_without_tools
from bench.lab.page import Measurement, Record, describe_machine, publish, render
from bench.lab.rounds import turns
from bench.lab.server import IMAGE, MODEL, ROOT, Server, start
from common.cli import run_command
from common.progress import make_console, progress

EXAMPLES = (
    "python bench/shortcuts.py                      # three minutes, on two quiet cores with wrk and taskset",
    "python bench/shortcuts.py --quick --out runs   # one round",
)
CONNECTIONS = (1, 64)
# The shortcut that a server lacks, and the line that switches it off before the server starts.
WITHOUT = {"all": "", "gc.freeze": "gc.freeze = lambda: None"}
Rounds = dict[str, dict[str, list[dict[str, float]]]]  # by shortcut that is missing, and by number of connections


@dataclass(frozen=True)
class ShortcutsConfig(Measurement):
    rounds: Annotated[int, "alternating rounds over all servers"] = 7
    seconds: Annotated[int, "of load for each number of connections"] = 2
    quick: Annotated[bool, "one round of one second"] = False
    out: Annotated[Path, "folder for shortcuts.md and shortcuts.json"] = Path("docs/benchmarks")


def command(config: ShortcutsConfig) -> None:
    """Race the server with all shortcuts against the server without one."""
    refuse_without_tools()
    rounds, seconds = (1, 1) if config.quick else (config.rounds, config.seconds)
    results: Rounds = {name: {str(num): [] for num in CONNECTIONS} for name in WITHOUT}
    with progress(make_console(), "servers", rounds * len(results)) as advance:
        for _, names in turns(list(results), rounds):
            for name in names:
                _measure(name, seconds, results)
                advance(note=name)
    machine = describe_machine("uvicorn", "uvloop", "httptools", "onnxruntime-gpu", "onnxruntime")
    publish(config, "shortcuts", page, machine=machine, results=results)


def start_without(name: str, *options: str) -> Server:
    """The server of the bundled model on core 0, without the shortcut `name` or, with "all", as it is."""
    program = f"import gc, runpy\n{WITHOUT[name]}\nrunpy.run_path('serve/run.py', run_name='__main__')"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return start(MODEL, *options, program=("-c", program), core=0, cwd=ROOT, env=env)


def _measure(name: str, seconds: int, results: Rounds) -> None:
    """Put one server under load with each number of connections."""
    with start_without(name, "--log-level", "error") as server:
        for num in CONNECTIONS:
            load = partial(put_load, server.url, "/predict", "image/png", [IMAGE], num_connections=num)
            load(seconds=1)  # warm up
            results[name][str(num)].append(load(seconds=seconds))


def page(record: Record) -> str:
    """Requests/s and p99 without the shortcut, as shares of those with it in the same round."""
    whole, less = (record["results"][name] for name in WITHOUT)
    ratios = [
        [row[what] / with_it[what] for row, with_it in zip(less[num], whole[num], strict=True)]
        for num in whole
        for what in ("requests_per_s", "p99_ms")
    ]
    return render("shortcuts", record, ratios=ratios)


if __name__ == "__main__":
    sys.exit(run_command(command, ShortcutsConfig, examples=EXAMPLES))
