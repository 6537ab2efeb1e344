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
from bench.lab.server import IMAGE, MODEL, ROOT, Server, free_port
from common.cli import run_command
from common.progress import make_console, progress

EXAMPLES = (
    "python bench/shortcuts.py                      # three minutes, on two quiet cores with wrk and taskset",
    "python bench/shortcuts.py --quick --out runs   # one round",
)
CONNECTIONS = (1, 64)
ALL = "all"
# What each shortcut does, and the line that switches it off before the server starts.
SHORTCUTS = {"gc.freeze": ("garbage collections skip what was loaded at the start", "gc.freeze = lambda: None")}
Rounds = dict[str, dict[str, list[dict[str, float]]]]  # by shortcut that is missing, and by number of connections


@dataclass(frozen=True)
class ShortcutsConfig(Measurement):
    rounds: Annotated[int, "alternating rounds over all servers"] = 7
    seconds: Annotated[int, "of load for each number of connections"] = 2
    quick: Annotated[bool, "one round of one second"] = False
    out: Annotated[Path, "folder for shortcuts.md and shortcuts.json"] = Path("docs/benchmarks")


def command(config: ShortcutsConfig) -> None:
    """Race the server with all shortcuts against the server without each one of them."""
    refuse_without_tools()
    rounds, seconds = (1, 1) if config.quick else (config.rounds, config.seconds)
    results: Rounds = {name: {str(num): [] for num in CONNECTIONS} for name in (ALL, *SHORTCUTS)}
    with progress(make_console(), "servers", rounds * len(results)) as advance:
        for _, names in turns(list(results), rounds):
            for name in names:
                _measure(name, seconds, results)
                advance(note=name)
    machine = describe_machine("uvicorn", "uvloop", "httptools", "onnxruntime-gpu", "onnxruntime")
    publish(config, "shortcuts", page, machine=machine, results=results)


def start_without(name: str, *options: str) -> Server:
    """The server of the bundled model on core 0, without the shortcut `name` or, with `ALL`, as it is."""
    switch_off = "" if name == ALL else SHORTCUTS[name][1]
    program = f"import gc, runpy\n{switch_off}\nrunpy.run_path('serve/run.py', run_name='__main__')"
    port = free_port()
    argv = [sys.executable, "-c", program, str(MODEL), "--runtime", "onnxruntime", "--port", str(port), *options]
    return Server(argv, port, core=0, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _measure(name: str, seconds: int, results: Rounds) -> None:
    """Put one server under load with each number of connections."""
    with start_without(name, "--log-level", "error") as server:
        for num in CONNECTIONS:
            load = partial(put_load, server.url, "/predict", "image/png", [IMAGE], num_connections=num)
            load(seconds=1)  # warm up
            results[name][str(num)].append(load(seconds=seconds))


def page(record: Record) -> str:
    """The page of one record: requests/s and p99 without a shortcut, as shares of those with all in the same round."""
    rows = [
        {
            "name": name,
            "does": does,
            "ratios": [
                [row[what] / whole[what] for row, whole in zip(record["results"][name][num], all_rows, strict=True)]
                for num, all_rows in record["results"][ALL].items()
                for what in ("requests_per_s", "p99_ms")
            ],
        }
        for name, (does, _) in SHORTCUTS.items()
    ]
    return render("shortcuts", record, rows=rows)


if __name__ == "__main__":
    sys.exit(run_command(command, ShortcutsConfig, examples=EXAMPLES))
