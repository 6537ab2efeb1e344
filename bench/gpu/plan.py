"""The steps of bench/gpu_check.py --offline: every stage on a machine with a GPU and no network, within a time budget.

Each step runs in its own process with a time limit. If it fails, crashes or takes too long, its row gives the reason
and the next step runs. Results are written after every step.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.lab.page import render, table
from common.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--depth", "10", "--width", "0.25", "--epochs", "1")
GRACE_S = 15.0  # between Ctrl-C and SIGKILL
# Packages besides PyTorch, and the sizes of their Linux wheels in MB.
NEEDED = {
    "train, fold": {"numpy": 17, "safetensors": 0.5, "rich": 0.3, "scikit-learn": 9, "matplotlib": 9},
    "export": {"onnx": 18, "onnxruntime-gpu": 256},
    "server": {
        **{"fastapi": 0.2, "starlette": 0.1, "pydantic": 0.5, "pydantic-core": 2, "annotated-types": 0.02},
        **{"typing-inspection": 0.02, "uvicorn": 0.1, "httptools": 0.5, "uvloop": 4, "python-multipart": 0.03},
        **{"orjson": 0.1, "prometheus-client": 0.1, "pillow": 7},
    },
    "tests": {"pytest": 0.4, "pytest-timeout": 0.02, "hypothesis": 0.6},
    "engines": {"tensorrt": 1500, "cuda-bindings": 6},
}


@dataclass(frozen=True)
class Step:
    """Arguments for this Python. The step is skipped if the file `needs`, written by an earlier step, is missing."""

    name: str
    limit_s: float
    argv: tuple[str, ...]
    needs: str | None = None


def steps(device: str, out: Path, data_dir: Path | None) -> tuple[Step, ...]:
    """The most useful first, since the budget may end before the last. On a CPU everything is small: a rehearsal."""
    files = ("checkpoint.pt", "plain.safetensors", "plain.onnx", "plain-fp16.onnx", "plain.engine")
    checkpoint, plain, onnx, half, engine = (str(out / "run" / name) for name in files)
    where = ("--data-dir", str(data_dir)) if data_dir else ()
    data = ("--dataset", "fashion-mnist" if data_dir else "digits", *where)
    if device == "cuda":
        size, small, providers, loads = ("--depth", "34", "--width", "2", "--epochs", "15"), (), ("cpu", "cuda"), ()
        rounds = ("1", "64", "256", "--rounds", "3", "--round-s", "0.1")
    else:
        size, small, providers, loads = SMALL, SMALL, ("cpu",), ("2",)
        rounds = ("1", "--rounds", "1", "--round-s", "0.01")
    train = ("train/run.py", "--device", device, "--json", "--out")
    own = ("-m", "bench.gpu.steps")
    against = ("--providers", *providers, "torch", *where)
    table = ("bench/gpu_check.py", plain, "--device", device, "--out", str(out), "--batch-sizes", *rounds)
    return (
        Step("machine", 30, (*own, "machine", device)),
        Step("tests/gpu", 120, ("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")),
        Step("train digits", 60, (*train, str(out / "digits"), *small)),
        Step("train", 120, (*train, str(out / "run"), *data, *size)),
        Step("fold", 60, ("fold/run.py", checkpoint, "--json", *where), checkpoint),
        Step("fold on the device", 60, (*own, "fold_on_device", device, checkpoint), checkpoint),
        Step("ONNX", 60, ("export/to_onnx.py", plain), plain),
        Step("ONNX, fp16", 60, ("export/to_onnx.py", plain, "--precision", "fp16", "--out", half), plain),
        Step("parity", 60, ("export/parity.py", onnx, "--against", plain, checkpoint, *against), onnx),
        Step("parity, fp16", 60, ("export/parity.py", half, "--against", plain, *against), half),
        Step("driver's calls", 60, (*own, "driver_calls", device)),
        Step("sessions", 90, (*own, "sessions", device, onnx, half), half),
        Step("torch's graphs, loaded again", 90, (*own, "torch_loads", device, half, *loads), half),
        Step("server", 150, (*own, "server", device, half), half),
        Step("engine", 120, ("export/to_trt.py", onnx, "--batch", "1", "8", "64"), onnx),
        Step("engine's parity", 60, ("export/parity.py", onnx, "--against", engine, *where), engine),
        Step("training speed", 90, (*own, "training_speed", device)),
        Step("all forms", 180, table, plain),
    )


def run_plan(plan: tuple[Step, ...], budget_s: float, out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs all steps and returns a row for each; the page and its JSON are written after every step."""
    end, rows = time.monotonic() + budget_s, []
    for step in plan:
        left_s = max(0.0, end - time.monotonic())
        say(f"{step.name}: up to {min(step.limit_s, left_s):.0f} s")
        rows.append(run_step(step, left_s))
        say(f"{step.name}: {rows[-1]['outcome']}, {rows[-1]['seconds']:.0f} s")
        write_whole(out / "gpu-offline.json", f"{json.dumps(rows, indent=1)}\n".encode())
        write_whole(out / "gpu-offline.md", page(rows).encode())
    return rows


def run_step(step: Step, left_s: float) -> dict[str, Any]:
    """Runs a step in its own session, unless less than a third of its limit is left. Its children end with it."""
    row = {"step": step.name, "command": " ".join(["python", *step.argv])}
    lacks = step.needs and not Path(step.needs).exists()
    if lacks or left_s < step.limit_s / 3:
        why = f"{Path(str(step.needs)).name} was not made" if lacks else f"{left_s:.0f} s of the budget left"
        return {**row, "outcome": f"not run: {why}", "seconds": 0.0, "results": [], "said": []}
    start = time.monotonic()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *step.argv], cwd=ROOT, **options) as process:
        try:
            outcome, output = _wait(process, min(step.limit_s, left_s))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    seconds, lines = time.monotonic() - start, output.splitlines()
    return {**row, "outcome": outcome, "seconds": seconds, "results": list(_results(lines)), "said": lines[-20:]}


def _wait(process: subprocess.Popen[str], limit_s: float) -> tuple[str, str]:
    """The outcome of a process and its output. At its limit it receives SIGINT, and `GRACE_S` later SIGKILL."""
    with suppress(subprocess.TimeoutExpired):
        output, _ = process.communicate(timeout=limit_s)
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
        status = process.returncode
        return f"failed: {last[:200]} (exit {status})" if status else "done", output
    process.send_signal(signal.SIGINT)  # a training saves its checkpoint then
    with suppress(subprocess.TimeoutExpired):
        return f"stopped by its limit of {limit_s:.0f} s", process.communicate(timeout=GRACE_S)[0]
    os.killpg(process.pid, signal.SIGKILL)
    return f"killed: over its limit of {limit_s:.0f} s and does not stop", process.communicate()[0]


def _results(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects, without their nested values."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                yield {name: value for name, value in found.items() if not isinstance(value, dict | list)}


def page(rows: list[dict[str, Any]]) -> str:
    """The outcomes, then for each step one table per set of keys among its results."""
    parts = []
    for row in rows:
        for head in dict.fromkeys(tuple(result) for result in row["results"]):
            lines = [[_cell(value) for value in found.values()] for found in row["results"] if tuple(found) == head]
            parts.append(f"## {row['step']}\n\n{table(head, lines)}")
    return render("gpu-offline", {"rows": rows, "results": "\n\n".join(parts)})


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def needs() -> str:
    """A table of the packages that the steps need besides PyTorch, with the sizes of their wheels.

    It shows which are missing on a bare machine (bench/gpu-image.txt), so that you must bring them, and which here.
    """
    there, _, _ = (ROOT / "bench" / "gpu-image.txt").read_text().partition("\n# Not there")
    on_image = {line.partition("==")[0] for line in there.splitlines()}
    here = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in metadata.distributions()}
    rows = [
        [of, name, f"{size:g} MB", "there" if name in on_image else "carry", here.get(name, "missing")]
        for of, packages in NEEDED.items()
        for name, size in packages.items()
    ]
    return table(["for", "package", "wheel", "bare machine", "here"], rows)
