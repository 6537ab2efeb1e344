"""python bench/gpu_check.py: build, run, compare and time every form of a net on this machine's GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from bench.lab.page import Measurement, describe_machine, render, spread, table, typed_command, write_page
from common.cli import POSITIONAL, run_command
from common.environment import versions
from common.files import read_whole, write_whole
from common.progress import make_console
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "fashion-mnist.safetensors"
QUERY = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
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
EXAMPLES = (
    "python bench/gpu_check.py                               # writes docs/gpu-NAME.md and .json",
    "python bench/gpu_check.py runs/NAME/plain.safetensors --batch-sizes 1 32",
    "python bench/gpu_check.py --device cpu --batch-sizes 1 8 --rounds 5 --out runs/cpu",
    "python bench/gpu_check.py --offline --budget-s 480 --out runs/gpu      # the whole road, installing nothing",
    "python bench/gpu_check.py --needs                       # packages to carry to a machine without a network",
)


@dataclass(frozen=True)
class GpuCheckConfig(Measurement):
    plain: Annotated[
        tuple[Path, ...],
        "plain nets of fold/run.py (default: DiracNet-16-1 and 34-2 of random weights, and the net in models/)",
        POSITIONAL,
    ] = ()
    device: Annotated[Literal["cuda", "cpu"], "cpu: the same table for CPU runtimes"] = "cuda"
    batch_sizes: Annotated[tuple[int, ...], "images per call"] = (1, 8, 64, 256)
    rounds: Annotated[int, "rounds in which the rows alternate"] = 7
    round_s: Annotated[float, "seconds of one row in one round"] = 0.2
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs")
    offline: Annotated[
        bool, "train, fold, export, compare, time and serve step by step, with the installed packages"
    ] = False
    budget_s: Annotated[float, "start no net (with --offline: no step) after this many seconds"] = 480.0
    data_dir: Annotated[Path | None, "--offline: folder of Fashion-MNIST (default: digits)"] = None
    needs: Annotated[bool, "list the packages that --offline needs, with the sizes of their wheels"] = False
    render: Annotated[Path | None, "only write the page of this JSON record"] = None


def command(config: GpuCheckConfig) -> int:
    """Build engines, run tests/gpu, time every runtime against eager PyTorch, and compare all logits.

    A runtime that fails becomes a row with its reason. Exits with status 1 if a test fails, nothing runs, or
    a result is beyond its tolerance.
    """
    console = make_console()
    if config.render:
        text = page(json.loads(read_whole(config.render)))
        console.print(f"wrote {write_whole(config.out / f'{config.render.stem}.md', text.encode())}")
        return 0
    if config.needs:
        print(needs())
        return 0
    if config.offline:
        out, data_dir = config.out.resolve(), config.data_dir and config.data_dir.resolve()
        rows = run_plan(steps(config.device, out, data_dir), config.budget_s, out, console.print)
        console.print(f"wrote {out / 'gpu-offline.md'} and gpu-offline.json")
        return int(any(row["outcome"] != "done" for row in rows))
    record = _measure_all(config, console)
    tests, rows = record["tests"], [row["parity"] for net in record["nets"] for row in net["rows"]]
    verdicts = [parity["within_tolerance"] for parity in rows if isinstance(parity, dict)]
    return int(not verdicts or False in verdicts or (tests is not None and not tests["passed"]))


def _measure_all(config: GpuCheckConfig, console: Console) -> dict[str, Any]:
    """The record of the nets that fit into the budget; it and its page are written after each net."""
    if config.device == "cuda":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for every library of NVIDIA, before any is loaded
    machine = machine_of(config.device)
    from bench.nets import SEEDED, net_of_file, seeded_net
    from bench.runtimes.contenders import measure

    paths = config.plain or ((BUNDLED,) if BUNDLED.exists() else ())
    nets = [] if config.plain else [seeded_net(*size) for size in SEEDED]
    nets += [net_of_file(path) for path in paths]
    record = {
        "sample": False,
        "command": typed_command("bench/gpu_check.py", config),
        "machine": machine,
        "rounds": config.rounds,
        "round_s": config.round_s,
        "tests": _run_tests(console) if config.device == "cuda" else None,
        "nets": [],
    }
    kind, device = "gpu" if config.device == "cuda" else "cpu", machine["device"].lower()
    name = "-".join([kind, *re.findall(r"\w+", device)])  # "gpu-nvidia-h100-80gb-hbm3"
    end = time.monotonic() + config.budget_s
    for net in nets:
        if record["nets"] and time.monotonic() > end:
            console.print(f"{net.name} is not measured: the {config.budget_s:g} s of --budget-s have passed")
            continue
        record["nets"].append(measure(net, config, console))
        # After every net, because a runtime may crash the process.
        console.print(write_page(config.out, name, page(record), record))
    return record


def _run_tests(console: Console) -> dict[str, Any]:
    console.print("tests/gpu")
    argv = [sys.executable, "-m", "pytest", "tests/gpu", "-q"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        console.print(done.stdout + done.stderr)
    return {"passed": done.returncode == 0, "summary": (done.stdout.strip().splitlines() or ["no output"])[-1]}


def machine_of(device: str) -> dict[str, str]:
    """GPU, driver, host and versions as text; refuses if there is no CUDA device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("no CUDA device: this needs an NVIDIA GPU and its driver; --device cpu measures the CPU")
    machine = describe_machine("torch", "triton", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")
    if device == "cpu":
        return machine
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "driver": subprocess.getoutput(QUERY).partition("\n")[0],  # or the shell's message that it is missing
        "cuda": str(torch.version.cuda),
        "host": machine.pop("device"),
        **machine,
    }


def page(record: dict[str, Any]) -> str:
    """The page of one record; one that is marked as a sample says so first."""
    is_sample, tests = record["sample"], record["tests"]
    return render(
        "gpu-check",
        record,
        title="SAMPLE: no GPU was measured" if is_sample else f"Measured on {record['machine']['device']}",
        note=render("gpu-check-sample", {}) if is_sample else "",
        tests=f"`tests/gpu`: {tests['summary']}" if tests else "",
        nets=list(map(_with_tables, record["nets"])),
    )


def _with_tables(net: dict[str, Any]) -> dict[str, Any]:
    """A net with tables of its times and speeds, one column per batch size, and the cells of its parity."""
    sizes, rows = [str(size) for size in net["batch_sizes"]], net["rows"]
    head = ["", *(f"batch {size}" for size in sizes)]
    cells = {row["title"]: [_cells(row["timings"].get(size)) for size in sizes] for row in rows}
    times, speeds = (
        table(head, [[title, *(pair[at] for pair in pairs)] for title, pairs in cells.items()]) for at in (0, 1)
    )
    parity = [{"title": row["title"], **_parity(row["parity"])} for row in rows]
    return {**net, "times": times, "speeds": speeds, "parity": parity}


def _cells(timing: dict[str, Any] | str | None) -> tuple[str, str]:
    """The time and the speed of a row, or that it failed: in a call, or to open, of which the table of parity tells."""
    if not isinstance(timing, dict):
        return f"failed: {timing}" if timing else "failed", "failed"
    speedup = "" if timing["speedup"] is None else f" ({timing['speedup']:.2f}×)"
    return spread(timing["round_ms"]), f"{timing['images_per_s']:,.0f}{speedup}"


def _parity(parity: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(parity, str):
        names = ("relative", "rms", "top1_agreement", "stated_tolerance", "verdict")
        return {"images": parity, **dict.fromkeys(names, "")}
    verdict = {True: "same", False: "DIFFERENT", None: "not judged"}[parity["within_tolerance"]]
    return {**parity, "images": f"{parity['num_images']} {parity['images']}", "verdict": verdict}


# --offline: every stage on a machine with a GPU and no network, within a time budget. Each step runs in its own process
# with a time limit. If it fails, crashes or takes too long, its row gives the reason and the next step runs.


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
    own = ("-m", "bench.gpu_steps")
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
        write_page(out, "gpu-offline", offline_page(rows), rows)
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


def offline_page(rows: list[dict[str, Any]]) -> str:
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
    here = versions(*(name for packages in NEEDED.values() for name in packages))
    rows = [
        [of, name, f"{size:g} MB", "there" if name in on_image else "carry", here.get(name, "missing")]
        for of, packages in NEEDED.items()
        for name, size in packages.items()
    ]
    return table(["for", "package", "wheel", "bare machine", "here"], rows)


if __name__ == "__main__":
    sys.exit(run_command(command, GpuCheckConfig, examples=EXAMPLES))
