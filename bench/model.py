"""python bench/model.py: the plain net against its Dirac net, in every runtime and beside other nets, on this CPU."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, typed_command, write_page
from bench.runtimes.page import page
from bench.runtimes.racers import RACES
from common.cli import run_command
from common.documents import read_object
from common.files import read_whole
from common.progress import make_console
from common.refusal import Refusal

EXAMPLES = (
    "python bench/model.py                                   # all nets: writes docs/benchmarks/model.md and .json",
    "python bench/model.py --nets 34-2                       # this net again, the others stay in the record",
    "python bench/model.py --quick                           # one net, few rounds; writes runs/bench",
    "python bench/model.py --nets 16-1 --rows MNN OpenVINO --batches 1 --out runs/bench",
)


@dataclass(frozen=True)
class ModelConfig(Measurement):
    nets: Annotated[tuple[str, ...], f"which of {', '.join(RACES)} (default: all; quick: 34-2)"] = ()
    threads: Annotated[tuple[int, ...], "numbers of threads (default: 1 2; quick: 2)"] = ()
    batches: Annotated[tuple[int, ...], "images per call (default: 1 8 32; quick: 1 32)"] = ()
    rows: Annotated[tuple[str, ...], "only rows whose title, net or precision contains one of these"] = ()
    rounds: Annotated[int | None, "rounds in which the rows take turns (default: 5, ImageNet 3; quick: 2)"] = None
    round_s: Annotated[float | None, "seconds of one row in one round (default: 0.1; quick: 0.05)"] = None
    quick: Annotated[bool, "the short form, under two minutes on two cores"] = False
    out: Annotated[Path | None, "folder for the page and its JSON (default: docs/benchmarks; quick: runs/bench)"] = None
    render: Annotated[bool, "measure nothing: write the page of the record in the folder again"] = False

    def __post_init__(self) -> None:
        if unknown := sorted({*self.nets} - {*RACES}):
            raise Refusal(f"--nets must be among {', '.join(RACES)}, got {', '.join(unknown)}")
        super().__post_init__()

    def resolved(self) -> "ModelConfig":
        """With every default that depends on --quick filled in; --rounds stays open where it depends on the net."""
        quick = self.quick
        return replace(
            self,
            nets=self.nets or (("34-2",) if quick else tuple(RACES)),
            threads=self.threads or ((2,) if quick else (1, 2)),
            batches=self.batches or ((1, 32) if quick else (1, 8, 32)),
            rounds=self.rounds or (2 if quick else None),
            round_s=self.round_s or (0.05 if quick else 0.1),
            out=self.out or Path("runs/bench" if quick else "docs/benchmarks"),
        )


def command(config: ModelConfig) -> int:
    """Race every way to run a net on the CPU; judge the bars.

    Each row runs in a process of its own. A row that fails says why. After every net the record is
    written; continue an interrupted run with --nets. Exit status 1 where the logits of a row in float32
    are not those of the plain net.
    """
    from bench.runtimes.race import measure

    console, typed, config = make_console(), typed_command("bench/model.py", config), config.resolved()
    path, record = config.out / "model.json", {"nets": {}}
    if config.render or path.exists():
        record = read_object(read_whole(path), str(path), todo="move it away, or choose another --out")
    for key in ("",) if config.render else config.nets:
        if key:
            nets = record["nets"] | {key: {"command": typed, **measure(key, config, console)}}
            record["nets"] = {name: nets[name] for name in RACES if name in nets}
        console.print(write_page(config.out, "model", page(record), record))
    return int(any(row["strays"] for net in record["nets"].values() for row in net["rows"]))


if __name__ == "__main__":
    sys.exit(run_command(command, ModelConfig, examples=EXAMPLES))
