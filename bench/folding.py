"""python bench/folding.py: seconds and memory of folding and exporting, by the size of the net."""

import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, Record, describe_machine, publish, render
from bench.lab.process import cost_of, in_fresh_process
from bench.lab.rounds import turns
from common.cli import run_command
from common.progress import make_console, progress

NETS = ((34, 1.0), (34, 2.0), (34, 4.0), (34, 8.0), (400, 1.0))  # depth and width, on 32x32 images
QUICK_NETS = ((34, 0.5), (34, 1.0), (34, 2.0), (100, 1.0))
# What each command has imported before its work begins.
MODULES = {
    "fold/run.py": ("fold.plain", "fold.proof", "train.checkpoint", "torchvision.datasets", "rich.table"),
    "export/to_onnx.py": (
        *("export.graphs.graph", "export.eight_bits.quantize", "export.runtimes.onnx_session", "fold.lower"),
    ),
}
EXAMPLES = (
    "python bench/folding.py                                # four minutes on two cores",
    "python bench/folding.py --quick --out /tmp/figures",
)


@dataclass(frozen=True)
class FoldingConfig(Measurement):
    rounds: Annotated[int, "how often each net is folded and exported"] = 2
    quick: Annotated[bool, "small nets, once: under a minute"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")


def command(config: FoldingConfig) -> None:
    """Fold and export nets of 1 to 59 million parameters and one of 400 layers, each in its own process."""
    from bench.nets import make_checkpoint
    from export import to_onnx
    from fold import run as fold

    nets, rounds = (QUICK_NETS, 1) if config.quick else (NETS, config.rounds)
    jobs, total = [], len(nets) * (1 + 2 * rounds)
    with tempfile.TemporaryDirectory() as folder, progress(make_console(), "nets", total) as advance:
        for depth, width in nets:
            name = f"{depth}-{width:g}"
            checkpoint = Path(folder) / name / "checkpoint.pt"
            parameters = in_fresh_process(make_checkpoint, depth, width, checkpoint)
            export_config = to_onnx.ToOnnxConfig(checkpoint.with_name("plain.safetensors"))
            for script, *work in (
                ("fold/run.py", fold.command, fold.FoldConfig(str(checkpoint))),
                ("export/to_onnx.py", to_onnx.command, export_config),
            ):
                row = {"command": script, "net": name, "depth": depth, "parameters": parameters, "runs": []}
                jobs.append((row, MODULES[script], *work))
            advance(note="checkpoints")
        for _, in_turn in turns(jobs, rounds):
            for row, *job in in_turn:
                row["runs"].append(cost_of(*job))
                advance(note=f"{row['command']} {row['net']}")
    machine = describe_machine("torch", "onnx", "onnxruntime-gpu", "onnxruntime")
    publish(config, "folding", page, machine=machine, rounds=rounds, rows=[row for row, *_ in jobs])


def page(record: Record) -> str:
    tables = defaultdict(list)
    for row in record["rows"]:
        tables[row["command"]].append(_with_figures(row))
    tables = [{"script": script, "rows": rows, **_growth(rows)} for script, rows in tables.items()]
    return render("folding", record, tables=tables)


def _with_figures(row: Record) -> dict[str, Any]:
    """A row with its seconds and its peak memory over all runs: in total, after the imports, and the difference."""
    seconds, parameters = [run["seconds"] for run in row["runs"]], row["parameters"]
    peak, imported = (max(run[key] for run in row["runs"]) for key in ("peak_bytes", "imported_bytes"))
    figures = {"seconds": seconds, "peak": peak, "imported": imported, "own": peak - imported}
    per_million = 1e6 * median(seconds) / parameters
    return {**row, **figures, "per_million": per_million, "own_in_weights": (peak - imported) / (4 * parameters)}


def _growth(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth of time and memory among nets of equal depth: per parameter, and as a power of it between the last two."""
    equals = [row for row in rows if row["depth"] == rows[0]["depth"]]
    first, before, last = equals[0], *equals[-2:]
    growth = {"depth": first["depth"], "before": before["net"], "last": last["net"]}
    for name, cost in (("time", lambda row: 1e6 * median(row["seconds"])), ("memory", lambda row: row["own"])):
        slope = (cost(last) - cost(first)) / (last["parameters"] - first["parameters"])
        power = log(cost(last) / cost(before)) / log(last["parameters"] / before["parameters"])
        growth |= {f"{name}_slope": slope, f"{name}_power": power}
    return growth


if __name__ == "__main__":
    sys.exit(run_command(command, FoldingConfig, examples=EXAMPLES))
