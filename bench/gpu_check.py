"""python bench/gpu_check.py: build, run, compare and time every form of a net on this machine's GPU."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from bench.lab.page import Measurement, describe_machine, render, spread, table, typed_command, write_page
from common.cli import POSITIONAL, run_command
from common.files import read_whole, write_whole
from common.progress import make_console
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "fashion-mnist.safetensors"
QUERY = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
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
        from bench.gpu_steps import needs

        print(needs())
        return 0
    if config.offline:
        from bench.gpu_steps import run_plan, steps

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


if __name__ == "__main__":
    sys.exit(run_command(command, GpuCheckConfig, examples=EXAMPLES))
