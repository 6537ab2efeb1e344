"""python bench/folding.py: seconds and memory of folding and exporting, by the size of the net."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import given_arguments, run_command
from common.refusal import Refusal

NETS = ((34, 1.0), (34, 2.0), (34, 4.0), (34, 8.0), (400, 1.0))  # depth and width, on 32x32 images
QUICK_NETS = ((34, 0.5), (34, 1.0), (34, 2.0), (100, 1.0))
# What each command has imported before its work begins.
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
    from dataclasses import asdict

    from bench.checkpoints import make_checkpoint
    from bench.lab.process import cost_of, in_fresh_process
    from bench.page import describe_machine, write_page
    from common.progress import make_console, progress
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
                    costs[name, net].append(cost_of(MODULES[name], work, argument))
                    advance(note=f"{name} {net[0]}-{net[1]:g}")
    record = {
        "command": f"python bench/folding.py {given_arguments(replace(config, out=FoldingConfig.out))}".rstrip(),
        "machine": describe_machine("torch", "onnx", "onnxruntime-gpu", "onnxruntime"),
        "rounds": rounds,
        "rows": [
            {
                "command": name,
                "net": f"{net[0]}-{net[1]:g}",
                "depth": net[0],
                "parameters": parameters[net],
                "runs": [asdict(cost) for cost in runs],
            }
            for (name, net), runs in costs.items()
        ],
    }
    console.print(write_page(config.out, "folding", page(record), record))
    return 0


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    from bench.page import machine_table

    parts = [
        "# Folding and exporting",
        f"Written by `{record['command']}`. Checkpoints of random weights, with an optimizer's momentum, for 32x32 "
        "images; there are no test images, so the fold is proven on 64 random ones. Each command runs "
        f"{record['rounds']} times, in a fresh process each. Seconds are without imports: the median, and in "
        "brackets the smallest and the largest. Memory is resident at its peak; the weights are those of the net in "
        "float32.",
        machine_table(record["machine"]),
    ]
    for name in dict.fromkeys(row["command"] for row in record["rows"]):
        parts += _section(name, [row for row in record["rows"] if row["command"] == name])
    return "\n\n".join(parts) + "\n"


def _section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    from bench.page import spread, table

    lines = []
    for row in rows:
        peak, imported = (max(run[key] for run in row["runs"]) / 1e6 for key in ("peak_bytes", "imported_bytes"))
        weights, seconds = 4 * row["parameters"] / 1e6, [run["seconds"] for run in row["runs"]]
        per_million = _median(seconds) / row["parameters"] * 1e6
        lines.append(
            [
                row["net"],
                f"{row['parameters'] / 1e6:.2f}",
                spread(seconds, ".2f"),
                f"{per_million:.2f}",
                f"{peak:,.0f}",
                f"{imported:,.0f}",
                f"{peak - imported:,.0f}",
                f"{(peak - imported) / weights:.1f}",
            ]
        )
    head = ["net", "parameters, M", "seconds", "s per M", "peak, MB", "imports, MB", "own, MB", "own in weights"]
    return [f"## {name}", table(head, lines), _growth(rows)]


def _growth(rows: list[dict[str, Any]]) -> str:
    """How seconds and memory grow among the nets of equal depth: a straight line, and how well it fits."""
    import numpy as np

    rows = [row for row in rows if row["depth"] == rows[0]["depth"]]
    millions = np.array([row["parameters"] / 1e6 for row in rows])
    seconds = np.array([_median([run["seconds"] for run in row["runs"]]) for row in rows])
    megabytes = np.array([max(run["peak_bytes"] - run["imported_bytes"] for run in row["runs"]) / 1e6 for row in rows])
    exponents = [np.polyfit(np.log(millions[-2:]), np.log(values[-2:]), 1)[0] for values in (seconds, megabytes)]
    return (
        f"Among the nets of {rows[0]['depth']} layers, per million parameters from the smallest to the largest: "
        f"{_slope(millions, seconds):.3f} s and {_slope(millions, megabytes):.1f} MB (4 MB are its weights). From "
        f"{rows[-2]['net']} to {rows[-1]['net']} time grows as parameters to the power of {exponents[0]:.2f}, memory "
        f"to that of {exponents[1]:.2f}; 1 is linear."
    )


def _slope(x: Any, y: Any) -> float:
    return float((y[-1] - y[0]) / (x[-1] - x[0]))


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


if __name__ == "__main__":
    sys.exit(run_command(command, FoldingConfig, examples=EXAMPLES))
