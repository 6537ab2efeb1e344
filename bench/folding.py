"""python bench/folding.py: seconds and memory of folding and exporting, by the size of the net."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
    from bench.training_steps import make_checkpoint
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
                row = {"command": script, "net": name, "parameters": parameters, "runs": []}
                jobs.append((row, MODULES[script], *work))
            advance(note="checkpoints")
        for _, in_turn in turns(jobs, rounds):
            for row, *job in in_turn:
                row["runs"].append(cost_of(*job))
                advance(note=f"{row['command']} {row['net']}")
    rows = sorted((row for row, *_ in jobs), key=lambda row: [*MODULES].index(row["command"]))
    machine = describe_machine("torch", "onnx", "onnxruntime-gpu", "onnxruntime")
    publish(config, "folding", page, machine=machine, rounds=rounds, rows=rows)


def page(record: Record) -> str:
    return render("folding", record, rows=list(map(_with_shares, record["rows"])))


def _with_shares(row: Record) -> Record:
    """A row with the seconds for a million parameters, and its own memory in multiples of the float32 weights."""
    num = row["parameters"]
    seconds = [1e6 * run["seconds"] / num for run in row["runs"]]
    return {**row, "per_million": seconds, "own_in_weights": [run["own_bytes"] / (4 * num) for run in row["runs"]]}


if __name__ == "__main__":
    sys.exit(run_command(command, FoldingConfig, examples=EXAMPLES))
