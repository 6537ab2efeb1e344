"""python bench/shortcuts.py: what each shortcut of the server brings; writes docs/benchmarks/shortcuts.md."""

import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.without import SHORTCUTS, WITHOUT
from common.cli import run_command

EXAMPLES = (
    "python bench/shortcuts.py                      # three minutes, on two quiet cores with wrk and taskset",
    "python bench/shortcuts.py --quick --out runs   # one round",
)
CONNECTIONS = (1, 64)
ALL = "all"
Rounds = dict[str, dict[str, list[dict[str, float]]]]  # by shortcut that is missing, and by number of connections


@dataclass(frozen=True)
class ShortcutsConfig:
    rounds: Annotated[int, "alternating rounds over all servers"] = 7
    seconds: Annotated[int, "of load for each number of connections"] = 2
    quick: Annotated[bool, "one round of one second"] = False
    out: Annotated[Path, "folder for shortcuts.md and shortcuts.json"] = Path("docs/benchmarks")


def command(config: ShortcutsConfig) -> int:
    """Race the server with all shortcuts against the server without each one of them."""
    from bench.lab.wrk import refuse_without_tools
    from bench.page import describe_machine, fill, machine_table, table, typed_command, write_page
    from common.progress import make_console, progress

    refuse_without_tools()
    names, console = [ALL, *SHORTCUTS], make_console()
    rounds, seconds = (1, 1) if config.quick else (config.rounds, config.seconds)
    results: Rounds = {name: {str(num): [] for num in CONNECTIONS} for name in names}
    with progress(console, "servers", rounds * len(names)) as advance:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                _measure(name, seconds, results)
                advance(note=name)
    of = [f"{num} connection{'s' * (num > 1)}: {what}" for num in CONNECTIONS for what in ("requests/s", "p99")]
    machine = describe_machine("uvicorn", "uvloop", "httptools", "onnxruntime-gpu", "onnxruntime")
    rows = [[name, does, *_ratios(results, name)] for name, (does, _) in SHORTCUTS.items()]
    ratios = table(["without", "what it does", *of], rows)
    typed = typed_command("bench/shortcuts.py", config)
    page = fill("shortcuts", command=typed, table=ratios, machine=machine_table(machine))
    console.print(write_page(config.out, "shortcuts", page, {"machine": machine, "results": results}))
    return 0


def _measure(name: str, seconds: int, results: Rounds) -> None:
    """Start one server on core 0 and put it under load with each number of connections."""
    from bench.lab.server import ROOT, Server, free_port
    from bench.lab.wrk import put_load

    model, image = ROOT / "models" / "fashion-mnist.onnx", min((ROOT / "models" / "held-out").glob("*.png"))
    port, env = free_port(), {**os.environ, WITHOUT: "" if name == ALL else name, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, ROOT / "bench" / "without.py", model, "--runtime", "onnxruntime", "--port", port]
    with Server([*map(str, argv), "--log-level", "error"], port, core=0, env=env) as server:
        for num in CONNECTIONS:
            load = partial(put_load, server.url, "/predict", "image/png", [image], num_connections=num)
            load(seconds=1)  # warm up
            results[name][str(num)].append(asdict(load(seconds=seconds)))


def _ratios(results: Rounds, name: str) -> list[str]:
    """Requests/s and p99 without a shortcut, as shares of those with all in the same round."""
    from bench.page import spread

    return [
        spread([row[what] / whole[what] for row, whole in zip(rows, results[ALL][num], strict=True)], ".2f")
        for num, rows in results[name].items()
        for what in ("requests_per_s", "p99_ms")
    ]


if __name__ == "__main__":
    sys.exit(run_command(command, ShortcutsConfig, examples=EXAMPLES))
