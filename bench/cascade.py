"""python bench/cascade.py: images/s of int8, fp32 and their cascade; writes docs/benchmarks/cascade.md and .json."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import Measurement, Record, describe_machine, publish, render
from bench.lab.rounds import alternate, median_ms, speedup
from common.cli import given_arguments, run_command
from common.refusal import Refusal

EXAMPLES = (
    "python bench/cascade.py                      # a minute on two cores",
    "python bench/cascade.py --avx2               # two minutes, and needs gdb",
    "python bench/cascade.py --quick --out runs/bench",
)
MODELS = Path(__file__).resolve().parents[1] / "models"
BATCHES = (1, 32)
AVX2_ONLY = Path(__file__).parent / "lab" / "avx2_only.py"


@dataclass(frozen=True)
class CascadeBenchConfig(Measurement):
    exact: Annotated[Path, "fp32 form"] = MODELS / "fashion-mnist.onnx"
    quick_form: Annotated[Path, "int8 form, with evidence"] = MODELS / "fashion-mnist-int8.onnx"
    data_dir: Annotated[Path | None, "folder of the data set that the net was trained on"] = None
    threads: Annotated[int, "of each form"] = 2
    rounds: Annotated[int, "in which the three take turns"] = 9
    images: Annotated[int, "test images of a pass"] = 1024
    quick: Annotated[bool, "two rounds of 256 images"] = False
    avx2: Annotated[bool, "measure the kernels for AVX2 alone as well, on a processor with VNNI; needs gdb"] = False
    out: Annotated[Path, "folder for cascade.md and cascade.json"] = Path("docs/benchmarks")


def command(config: CascadeBenchConfig) -> None:
    """Time passes over real test images, because the share that goes on to fp32 decides the cost of a cascade."""
    from export.artefacts import open_artefact
    from export.evaluation.answering import find_judged
    from export.runtimes.cascade import Cascade, read_forms
    from export.runtimes.onnx_session import OnnxSession
    from export.runtimes.saturation import saturates

    load = f"{os.getloadavg()[0]:.1f}"  # of the last minute: 0 on an idle machine
    forms = read_forms((config.exact, config.quick_form))
    num_rounds, num = (2, 256) if config.quick else (config.rounds, config.images)
    images = find_judged(open_artefact(forms.quick), data_dir=config.data_dir).part.first(num)
    if len(images) < max(BATCHES):
        raise Refusal(f"there are {len(images)} test images; {max(BATCHES)} are a batch")
    session = partial(OnnxSession, num_threads=config.threads)
    shared = (session(path, shares_cores=True) for path in (forms.quick, forms.exact))
    cascade = Cascade(*shared, evidence=forms.evidence)
    cascade(images)
    measured = {
        "machine": {**describe_machine("onnxruntime-gpu", "onnxruntime"), "load before": load},
        "saturates": saturates(),
        "forms": str(forms),
        "threads": config.threads,
        "num_images": len(images),
        "num_rounds": num_rounds,
        "share_escalated": cascade.num_escalated / cascade.num_images,
        "evidence": forms.evidence.to_dict(),
        "batches": {},
    }
    racers = {"int8": session(forms.quick), "fp32": session(forms.exact), "cascade": cascade}
    for size in BATCHES:
        batches = [images[first : first + size] for first in range(0, len(images), size)]
        passes = {name: partial(_pass_ms, answer, batches) for name, answer in racers.items()}
        times = alternate(passes, batch_size=len(images), num_rounds=num_rounds)
        measured["batches"][str(size)] = times
    if config.avx2:
        measured["avx2"] = _with_avx2_alone(config)
    publish(config, "cascade", page, **measured)


def _pass_ms(answer: Callable[[Any], object], batches: list[Any]) -> float:
    return median_ms(lambda: [answer(batch) for batch in batches], 0, min_calls=1)


def _with_avx2_alone(config: CascadeBenchConfig) -> Record:
    """What this command measures when ONNX Runtime has its kernels for AVX2 alone."""
    with tempfile.TemporaryDirectory() as folder:
        again = shlex.split(given_arguments(replace(config, avx2=False, out=Path(folder))))
        argv = ["gdb", "-batch", "-x", str(AVX2_ONLY), "--args", sys.executable, __file__, *again]
        done = subprocess.run(argv, capture_output=True, text=True)
        if not (written := Path(folder) / "cascade.json").exists():
            raise Refusal(f"gdb could not run the command again: {done.stderr.strip()[-200:]}; leave out --avx2")
        record = json.loads(written.read_text())
    return {name: record[name] for name in ("saturates", "share_escalated", "batches")}


def page(record: Record) -> str:
    others = [{"rows": _rows(record["avx2"]), **record["avx2"]}] if "avx2" in record else []
    return render("cascade", record, rows=_rows(record), others=others)


def _rows(record: Record) -> list[Record]:
    """A cascade is expected to take the time of int8 plus, for the share that goes on, that of one image in fp32."""
    alone_ms, rows = record["batches"]["1"]["fp32"]["median_ms"], []
    for size, times in record["batches"].items():
        int8, fp32, cascade = timings = [times[name] for name in ("int8", "fp32", "cascade")]
        expected_ms = int8["median_ms"] + record["share_escalated"] * alone_ms
        speeds = [[1000 * timing["batch_size"] / ms for ms in timing["round_ms"]] for timing in timings]
        share = cascade["median_ms"] / expected_ms
        ratios = speedup(cascade, over=fp32), speedup(int8, over=cascade), share
        rows.append({"size": size, "speeds": speeds, "ratios": ratios})
    return rows


if __name__ == "__main__":
    sys.exit(run_command(command, CascadeBenchConfig, examples=EXAMPLES))
