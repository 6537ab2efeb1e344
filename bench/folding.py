"""python bench/folding.py: seconds and memory of folding and exporting, by the size of the net."""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, fill, machine_table, spread, table, typed_command, write_page
from common.cli import run_command
from common.progress import make_console, progress
from common.refusal import Refusal

NETS = ((34, 1.0), (34, 2.0), (34, 4.0), (34, 8.0), (400, 1.0))  # depth and width, on 32x32 images
QUICK_NETS = ((34, 0.5), (34, 1.0), (34, 2.0), (100, 1.0))
# The modules that each command has imported before its work begins.
MODULES = {
    "fold/run.py": ("fold.plain", "fold.proof", "train.checkpoint", "torchvision.datasets", "rich.table"),
    "export/to_onnx.py": (
        "export.graphs.graph",
        "export.eight_bits.quantize",
        "export.runtimes.onnx_session",
        "fold.lower",
    ),
}
EXAMPLES = (
    "python bench/folding.py                                # four minutes on two cores",
    "python bench/folding.py --quick --out /tmp/figures",
)


@dataclass(frozen=True)
class FoldingConfig:
    rounds: Annotated[int, "how often every net is folded and exported"] = 2
    quick: Annotated[bool, "small nets, once: under a minute"] = False
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs/benchmarks")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise Refusal(f"--rounds must be at least 1, got {self.rounds}")


def command(config: FoldingConfig) -> int:
    """Fold and export nets of 1 to 59 million parameters and one of 400 layers, each in a process of its own."""
    import tempfile
    from collections import defaultdict

    from bench.lab.process import cost_of, in_fresh_process
    from bench.nets import make_checkpoint
    from export.to_onnx import ToOnnxConfig
    from export.to_onnx import command as export_file
    from fold.run import FoldConfig
    from fold.run import command as fold_file

    nets, rounds = (QUICK_NETS, 1) if config.quick else (NETS, config.rounds)
    console, costs = make_console(), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, progress(console, "nets", len(nets) * (1 + 2 * rounds)) as advance:
        paths, parameters = {}, {}
        for net in nets:
            paths[net] = Path(folder) / f"{net[0]}-{net[1]:g}" / "checkpoint.pt"
            parameters[net] = in_fresh_process(make_checkpoint, *net, paths[net])
            advance(note="checkpoints")
        for index in range(rounds):
            for net in nets[:: 1 if index % 2 == 0 else -1]:
                plain = paths[net].with_name("plain.safetensors")
                for name, work, argument in (
                    ("fold/run.py", fold_file, FoldConfig(paths[net])),
                    ("export/to_onnx.py", export_file, ToOnnxConfig(plain)),
                ):
                    costs[name, net].append(asdict(cost_of(MODULES[name], work, argument)))
                    advance(note=f"{name} {net[0]}-{net[1]:g}")
    rows = [
        {"command": name, "net": f"{net[0]}-{net[1]:g}", "depth": net[0], "parameters": parameters[net], "runs": runs}
        for (name, net), runs in costs.items()
    ]
    record = {
        "command": typed_command("bench/folding.py", config),
        "machine": describe_machine("torch", "onnx", "onnxruntime-gpu", "onnxruntime"),
        "rounds": rounds,
        "rows": rows,
    }
    console.print(write_page(config.out, "folding", page(record), record))
    return 0


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    names = dict.fromkeys(row["command"] for row in record["rows"])
    sections = [_section(name, [row for row in record["rows"] if row["command"] == name]) for name in names]
    return fill("folding", **{**record, "machine": machine_table(record["machine"]), "sections": "".join(sections)})


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    """A table, and how seconds and memory grow among the nets of equal depth: a straight line, and how well it fits."""
    import numpy as np

    equals = [row for row in rows if row["depth"] == rows[0]["depth"]]
    millions = np.array([row["parameters"] / 1e6 for row in equals])
    seconds = np.array([_median_s(row) for row in equals])
    megabytes = (
        np.array([max(run["peak_bytes"] - run["imported_bytes"] for run in row["runs"]) for row in equals]) / 1e6
    )
    slopes = [(values[-1] - values[0]) / (millions[-1] - millions[0]) for values in (seconds, megabytes)]
    exponents = [np.polyfit(np.log(millions[-2:]), np.log(values[-2:]), 1)[0] for values in (seconds, megabytes)]
    head = ["net", "parameters, M", "seconds", "s per M", "peak, MB", "imports, MB", "own, MB", "own in weights"]
    return f"""
## {name}

{table(head, [_line(row) for row in rows])}

Among the nets of {rows[0]["depth"]} layers, per million parameters from the smallest to the largest: \
{slopes[0]:.3f} s and {slopes[1]:.1f} MB (4 MB are its weights). From {equals[-2]["net"]} to {equals[-1]["net"]} time \
grows as parameters to the power of {exponents[0]:.2f}, memory to that of {exponents[1]:.2f}; 1 is linear.
"""


def _line(row: dict[str, Any]) -> list[str]:
    peak, imported = (max(run[key] for run in row["runs"]) / 1e6 for key in ("peak_bytes", "imported_bytes"))
    millions, own = row["parameters"] / 1e6, peak - imported
    return [
        row["net"],
        f"{millions:.2f}",
        spread([run["seconds"] for run in row["runs"]], ".2f"),
        f"{_median_s(row) / millions:.2f}",
        *(f"{value:,.0f}" for value in (peak, imported, own)),
        f"{own / (4 * millions):.1f}",
    ]


def _median_s(row: dict[str, Any]) -> float:
    return statistics.median(run["seconds"] for run in row["runs"])


if __name__ == "__main__":
    sys.exit(run_command(command, FoldingConfig, examples=EXAMPLES))
