"""python bench/cascade.py: images/s of int8, fp32 and their cascade; writes docs/benchmarks/cascade.md and .json."""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, fill, machine_table, spread, table, write_page
from bench.rounds import Timing, alternate_all
from common.cli import run_command
from common.files import read_whole
from common.progress import make_console
from common.refusal import Refusal

if TYPE_CHECKING:
    import numpy as np

    from export.compare import Answer

EXAMPLES = (
    "python bench/cascade.py                      # a minute on two cores",
    "python bench/cascade.py --quick --out runs/bench",
)
MODELS = Path(__file__).resolve().parents[1] / "models"
BATCHES = (1, 32)


@dataclass(frozen=True)
class CascadeBenchConfig:
    exact: Annotated[Path, "fp32 form"] = MODELS / "fashion-mnist.onnx"
    quick_form: Annotated[Path, "int8 form, with evidence"] = MODELS / "fashion-mnist-int8.onnx"
    data_dir: Annotated[Path | None, "folder of the data set that the net was trained on"] = None
    threads: Annotated[int, "of each form"] = 2
    rounds: Annotated[int, "in which the three take turns"] = 9
    images: Annotated[int, "test images of a pass"] = 1024
    quick: Annotated[bool, "two rounds of 256 images"] = False
    out: Annotated[Path, "folder for cascade.md and cascade.json"] = Path("docs/benchmarks")


def command(config: CascadeBenchConfig) -> int:
    """Time passes over real test images: how many of them go on to fp32 decides what a cascade costs."""
    from export.artefacts import open_artefact
    from export.evaluation.answering import find_judged
    from export.runtimes.cascade import Cascade, read_forms
    from export.runtimes.onnx_session import OnnxSession
    from export.runtimes.saturation import saturates

    console, load = make_console(), f"{os.getloadavg()[0]:.1f}"  # of the last minute: 0 on a machine that is idle
    forms = read_forms((config.exact, config.quick_form))
    judged = find_judged(open_artefact(forms.quick), data_dir=config.data_dir)
    num_rounds, num = (2, 256) if config.quick else (config.rounds, config.images)
    images = judged.part.first(num)
    if len(images) < max(BATCHES):
        raise Refusal(f"there are {len(images)} test images; {max(BATCHES)} are a batch")
    paths, threads = (forms.quick, forms.exact), config.threads
    alone = [OnnxSession(path, num_threads=threads) for path in paths]
    cascade = Cascade(
        *(OnnxSession(path, num_threads=threads, shares_cores=True) for path in paths), evidence=forms.evidence
    )
    cascade(images)
    share = cascade.num_escalated / cascade.num_images
    racers = {"int8": alone[0], "fp32": alone[1], "cascade": cascade}
    record = {
        "machine": {**describe_machine("onnxruntime-gpu", "onnxruntime"), "vnni": _has_vnni(), "load before": load},
        "saturates": saturates(),
        "forms": str(forms),
        "threads": config.threads,
        "num_images": len(images),
        "num_rounds": num_rounds,
        "share_escalated": share,
        "evidence": forms.evidence.to_dict(),
        "batches": {str(size): _time(racers, images, size, num_rounds) for size in BATCHES},
    }
    console.print(write_page(config.out, "cascade", page(record), record))
    return 0


def _time(racers: "dict[str, Answer]", images: "np.ndarray", size: int, num_rounds: int) -> dict[str, Any]:
    """The timing of a pass over all images in batches of `size`, by the name of a racer."""
    passes = {name: partial(_pass_ms, answer, images, size) for name, answer in racers.items()}
    times = alternate_all(passes, batch_size=len(images), num_rounds=num_rounds)
    return {name: timing.to_dict() for name, timing in times.items()}


def _pass_ms(answer: "Answer", images: "np.ndarray", size: int) -> float:
    start = time.perf_counter()
    for first in range(0, len(images), size):
        answer(images[first : first + size])
    return 1000 * (time.perf_counter() - start)


def page(record: dict[str, Any]) -> str:
    """The page of one record."""
    rows = [_row(size, times, record) for size, times in record["batches"].items()]
    head = ["batch", "int8", "fp32", "cascade", "cascade over fp32", "int8 over cascade", "share of the expected time"]
    return fill(
        "cascade",
        **{**record, "machine": machine_table(record["machine"])},
        timed_percent=100 * record["share_escalated"],
        tested_percent=100 * record["evidence"]["share_escalated"],
        speeds=table(head, rows),
        processor=_processor(record["machine"]["vnni"]),
    )


def _row(size: str, times: dict[str, Any], record: dict[str, Any]) -> list[str]:
    timings = [Timing.from_dict(times[name]) for name in ("int8", "fp32", "cascade")]
    int8, fp32, cascade = timings
    alone = Timing.from_dict(record["batches"]["1"]["fp32"])
    expected = int8.median_ms + record["share_escalated"] * alone.median_ms
    speeds = [spread([1000 * timing.batch_size / ms for ms in timing.round_ms], ",.0f") for timing in timings]
    ratios = (cascade.speedup_over(fp32), int8.speedup_over(cascade), cascade.median_ms / expected)
    return [size, *speeds, *(f"{ratio:.2f}" for ratio in ratios)]


def _processor(vnni: str) -> str:
    measured, other = {
        "yes": ("with VNNI", "One without VNNI was not"),
        "no": ("without VNNI", "One with VNNI was not"),
        "unknown": ("that does not list its instructions", "Others were not"),
    }[vnni]
    return f"""Measured on a processor {measured}. {other} measured: ONNX Runtime chooses its
kernels by the processor's own description, and has no switch to leave VNNI out. The answers are the same there, as no
sum in these files can saturate. Without VNNI int8 gains less (1.9 times fp32 for the bundled net on AMD Zen 3), and so
does the cascade."""


def _has_vnni() -> str:
    """ "yes", "no", or "unknown" where the system does not list its processor's instructions."""
    path = Path("/proc/cpuinfo")
    words = read_whole(path).decode().split() if path.exists() else []
    return "unknown" if "flags" not in words else "yes" if {"avx512_vnni", "avx_vnni"} & {*words} else "no"


if __name__ == "__main__":
    sys.exit(run_command(command, CascadeBenchConfig, examples=EXAMPLES))
