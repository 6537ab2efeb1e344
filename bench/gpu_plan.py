"""The steps of bench/gpu_check.py --offline: the road on a machine with a GPU and no network, inside a budget.

Each step is a process of its own with a limit. A step that fails, crashes or takes too long is a row with its reason,
and the rest goes on; results are written after every step.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.page import table
from common.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--depth", "10", "--width", "0.25", "--epochs", "1")
GRACE_S = 15.0  # between Ctrl-C and the end of a step that is over its limit
# Packages beyond PyTorch, and the size of their wheels for Linux in MB.
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
    """`argv` is run by this Python. A step whose `needs`, an earlier step's file, is not there is left out."""

    name: str
    limit_s: float
    argv: tuple[str, ...]
    needs: str | None = None


def steps(device: str, out: Path, data_dir: Path | None) -> tuple[Step, ...]:
    """In order of worth: the end of the budget may cut the last ones. On a CPU everything is small: a rehearsal."""
    run, is_gpu = out / "run", device == "cuda"
    checkpoint, plain, onnx, half, engine = (
        str(run / name)
        for name in ("checkpoint.pt", "plain.safetensors", "plain.onnx", "plain-fp16.onnx", "plain.engine")
    )
    where = ("--data-dir", str(data_dir)) if data_dir else ()
    size = ("--depth", "34", "--width", "2", "--epochs", "15") if is_gpu else SMALL
    data = ("--dataset", "fashion-mnist", *where) if data_dir else ("--dataset", "digits")
    train = ("train/run.py", "--device", device, "--json", "--out")
    providers = ("--providers", "cpu", *(("cuda",) if is_gpu else ()), "torch")
    rounds = "1 64 256 --rounds 3 --round-s 0.1" if is_gpu else "1 --rounds 1 --round-s 0.01"
    table = ("bench/gpu_check.py", plain, "--device", device, "--out", str(out), "--batch-sizes", *rounds.split())

    def own(name: str, *files: str) -> tuple[str, ...]:
        return ("bench/gpu_steps.py", name, device, *files)

    return (
        Step("machine", 30, own("machine")),
        Step("tests/gpu", 120, ("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")),
        Step("train digits", 60, (*train, str(out / "digits"), *(() if is_gpu else SMALL))),
        Step("train", 120, (*train, str(run), *data, *size)),
        Step("fold", 60, ("fold/run.py", checkpoint, "--json", *where), checkpoint),
        Step("fold on the device", 60, own("fold_on_device", checkpoint), checkpoint),
        Step("ONNX", 60, ("export/to_onnx.py", plain), plain),
        Step("ONNX, fp16", 60, ("export/to_onnx.py", plain, "--precision", "fp16", "--out", half), plain),
        Step("parity", 60, ("export/parity.py", onnx, "--against", plain, checkpoint, *providers, *where), onnx),
        Step("parity, fp16", 60, ("export/parity.py", half, "--against", plain, *providers, *where), half),
        Step("driver's calls", 60, own("driver_calls")),
        Step("sessions", 90, own("sessions", onnx, half), half),
        Step("torch's graphs, loaded again", 90, own("torch_loads", half, *(() if is_gpu else ("2",))), half),
        Step("server", 150, own("server", half), half),
        Step("engine", 120, ("export/to_trt.py", onnx, "--batch", "1", "8", "64"), onnx),
        Step("engine's parity", 60, ("export/parity.py", onnx, "--against", engine, *where), engine),
        Step("training speed", 90, own("training_speed")),
        Step("all forms", 180, table, plain),
    )


def run_plan(plan: tuple[Step, ...], budget_s: float, out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """All steps in turn; a step for which less than a third of its limit is left is not begun."""
    end, rows = time.monotonic() + budget_s, []
    for step in plan:
        left = end - time.monotonic()
        if step.needs and not Path(step.needs).exists():
            row = _row(step, f"not run: {Path(step.needs).name} was not made", 0, "")
        elif left < step.limit_s / 3:
            row = _row(step, f"not run: {max(0, left):.0f} s of the budget left", 0, "")
        else:
            say(f"{step.name}: up to {min(step.limit_s, left):.0f} s")
            row = run_step(step, min(step.limit_s, left))
        rows.append(row)
        say(f"{step.name}: {row['outcome']}, {row['seconds']:.0f} s")
        write_whole(out / "gpu-offline.json", (json.dumps(rows, indent=1) + "\n").encode())
        write_whole(out / "gpu-offline.md", markdown(rows).encode())
    return rows


def run_step(step: Step, limit_s: float) -> dict[str, Any]:
    """One step in a session of its own, which ends with it whatever it has started."""
    start = time.monotonic()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *step.argv], cwd=ROOT, **options)
    try:
        try:
            output, _ = process.communicate(timeout=limit_s)
            outcome = "done" if process.returncode == 0 else f"failed: {_last_line(output)} (exit {process.returncode})"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a training saves its checkpoint then
            output, _ = process.communicate(timeout=GRACE_S)
            outcome = f"stopped by its limit of {limit_s:.0f} s"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = f"killed: over its limit of {limit_s:.0f} s and does not stop"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return _row(step, outcome, time.monotonic() - start, output)


def needs() -> str:
    """A table of the packages that the steps need beside PyTorch, with the size of their wheels.

    It says which a bare machine (bench/gpu-image.txt) lacks, so that they must be carried, and which are missing here.
    """
    there, _, _ = (ROOT / "bench" / "gpu-image.txt").read_text().partition("\n# Not there")
    on_image = {line.partition("==")[0] for line in there.splitlines()}
    rows = [
        [of, name, f"{size:g} MB", "there" if name in on_image else "carry", _version(name) or "missing"]
        for of, packages in NEEDED.items()
        for name, size in packages.items()
    ]
    return table(["for", "package", "wheel", "bare machine", "here"], rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page: which steps ran, then a table for all results of a step that have the same keys."""
    parts = ["# The road on this machine", outcomes(rows)]
    for row in rows:
        for head in dict.fromkeys(tuple(result) for result in row["results"]):
            lines = [[_cell(value) for value in found.values()] for found in row["results"] if tuple(found) == head]
            parts += [f"## {row['step']}", table(head, lines)]
    return "\n\n".join(parts) + "\n"


def outcomes(rows: list[dict[str, Any]]) -> str:
    lines = [[row["step"], row["outcome"], f"{row['seconds']:.0f}"] for row in rows]
    return table(["step", "outcome", "s"], lines)


def _row(step: Step, outcome: str, seconds: float, output: str) -> dict[str, Any]:
    lines, argv = output.splitlines(), " ".join(["python", *step.argv])
    results = {"results": list(_results(lines)), "said": lines[-20:]}
    return {"step": step.name, "command": argv, "outcome": outcome, "seconds": seconds, **results}


def _results(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a step that are flat JSON objects."""
    for line in lines:
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            yield {name: value for name, value in found.items() if not isinstance(value, dict | list)}


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _last_line(output: str) -> str:
    return next((line.strip()[:200] for line in reversed(output.splitlines()) if line.strip()), "it says nothing")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
