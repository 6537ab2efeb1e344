"""python bench/gpu_check.py: build, run, compare and time every form of a net on this machine's GPU."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import describe_machine, fill, machine_table, spread, table, typed_command
from common.cli import POSITIONAL, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "fashion-mnist.safetensors"
SAMPLE_TITLE = "SAMPLE: no GPU was measured"
SAMPLE_NOTE = (
    "**Every figure on this page is invented**; all times are 1 ms. It shows what `make gpu-check` writes, and comes "
    "from `tests/data/gpu-sample.json` by `python bench/gpu_check.py --render tests/data/gpu-sample.json`."
)
EXAMPLES = (
    "python bench/gpu_check.py                               # writes docs/gpu-NAME.md and .json",
    "python bench/gpu_check.py runs/NAME/plain.safetensors --batch-sizes 1 32",
    "python bench/gpu_check.py --device cpu --batch-sizes 1 8 --rounds 5 --out runs/cpu",
    "python bench/gpu_check.py --offline --budget-s 480 --out runs/gpu      # the whole road, installing nothing",
    "python bench/gpu_check.py --needs                       # packages to carry to a machine without a network",
)


@dataclass(frozen=True)
class GpuCheckConfig:
    plain: Annotated[
        tuple[Path, ...],
        "plain nets of fold/run.py (default: DiracNet-16-1 and 34-2 of random weights, and the net in models/)",
        POSITIONAL,
    ] = ()
    device: Annotated[Literal["cuda", "cpu"], "cpu: the same table for the runtimes of the CPU"] = "cuda"
    batch_sizes: Annotated[tuple[int, ...], "images per call"] = (1, 8, 64, 256)
    rounds: Annotated[int, "rounds in which the rows alternate"] = 7
    round_s: Annotated[float, "seconds of one row in one round"] = 0.2
    out: Annotated[Path, "folder for the page and its JSON"] = Path("docs")
    offline: Annotated[bool, "train, fold, export, compare, time and serve with what is installed, step by step"] = (
        False
    )
    budget_s: Annotated[float, "no net is begun, with --offline no step, after so many seconds"] = 480.0
    data_dir: Annotated[Path | None, "--offline: folder of Fashion-MNIST (default: digits)"] = None
    needs: Annotated[bool, "list the packages that --offline needs, with the sizes of their wheels"] = False
    render: Annotated[Path | None, "measure nothing: write the page of this JSON record"] = None

    def __post_init__(self) -> None:
        if min(self.batch_sizes, default=0) < 1 or min(self.rounds, self.round_s, self.budget_s) <= 0:
            raise Refusal("--batch-sizes, --rounds, --round-s and --budget-s must be positive")


def command(config: GpuCheckConfig) -> int:
    """Build engines, run tests/gpu, time every runtime against eager PyTorch, and compare all logits.

    A runtime that fails becomes a row with its reason. Exit status 1 where a test fails, nothing runs, or
    a form that runs is beyond its tolerance.
    """
    import json
    import os
    import time

    from common.files import read_whole, write_whole
    from common.progress import make_console

    console = make_console()
    if config.render:
        _write_page(config.out / f"{config.render.stem}.md", json.loads(read_whole(config.render)), console)
        return 0
    if config.needs:
        from bench.gpu_plan import needs

        print(needs())
        return 0
    if config.offline:
        return _offline(config, console)
    if config.device == "cuda":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # for every library of NVIDIA, before any is loaded
    machine = _machine(config.device)
    from bench.nets import SEEDED, net_of_file, seeded_net
    from bench.runtimes.contenders import measure

    if config.plain:
        nets = [net_of_file(path) for path in config.plain]
    else:
        nets = [seeded_net(*size) for size in SEEDED] + ([net_of_file(BUNDLED)] if BUNDLED.exists() else [])
    record = {
        "sample": False,
        "command": typed_command("bench/gpu_check.py", config, positional="plain"),
        "machine": machine,
        "rounds": config.rounds,
        "round_s": config.round_s,
        "tests": _run_tests(console) if config.device == "cuda" else None,
        "nets": [],
    }
    name = ("gpu-" if config.device == "cuda" else "cpu-") + _slug(machine["device"])
    end = time.monotonic() + config.budget_s
    for net in nets:
        if record["nets"] and time.monotonic() > end:
            console.print(f"{net.name} is not measured: the {config.budget_s:g} s of --budget-s have passed")
            continue
        record["nets"].append(measure(net, config, console))
        # After every net: what is measured survives a runtime that ends the process.
        write_whole(config.out / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
        _write_page(config.out / f"{name}.md", record, console)
    return 0 if _is_green(record) else 1


def _offline(config: GpuCheckConfig, console: "Console") -> int:
    """Every step of bench/gpu_plan.py; exit status 1 where one did not end well."""
    from bench.gpu_plan import outcomes, run_plan, steps

    config.out.mkdir(parents=True, exist_ok=True)
    out = config.out.resolve()
    plan = steps(config.device, out, config.data_dir and config.data_dir.resolve())
    rows = run_plan(plan, config.budget_s, out, console.print)
    console.print(outcomes(rows))
    console.print(f"wrote {out / 'gpu-offline.md'} and gpu-offline.json")
    return 0 if all(row["outcome"] == "done" for row in rows) else 1


def _is_green(record: dict[str, Any]) -> bool:
    """Whether the tests pass, something was compared, and nothing that was is beyond its tolerance."""
    compared = [row["parity"] for net in record["nets"] for row in net["rows"] if isinstance(row["parity"], dict)]
    fine = bool(compared) and all(parity["within_tolerance"] is not False for parity in compared)
    return fine and (record["tests"] is None or record["tests"]["passed"])


def _run_tests(console: "Console") -> dict[str, Any]:
    """tests/gpu in a process of its own."""
    import subprocess

    console.print("tests/gpu")
    argv = [sys.executable, "-m", "pytest", "tests/gpu", "-q"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        console.print(done.stdout + done.stderr)
    return {"passed": done.returncode == 0, "summary": (done.stdout.strip().splitlines() or ["no output"])[-1]}


def _machine(device: str) -> dict[str, str]:
    """GPU, driver, host and versions as text; refuses where there is no CUDA device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("no CUDA device: this needs an NVIDIA GPU and its driver; --device cpu measures the CPU")
    machine = describe_machine("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")
    if device == "cpu":
        return machine
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "driver": _driver_version(),
        "cuda": str(torch.version.cuda),
        "host": machine.pop("device"),
        **machine,
    }


def _driver_version() -> str:
    import subprocess

    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown ({error})"


def _write_page(path: Path, record: dict[str, Any], console: "Console") -> None:
    from common.files import write_whole

    console.print(f"wrote {write_whole(path, markdown(record).encode())}")


def _slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def markdown(record: dict[str, Any]) -> str:
    """The page of one record; one that is marked as a sample says so first."""
    is_sample, tests = record["sample"], record["tests"]
    fields = {
        "title": SAMPLE_TITLE if is_sample else f"Measured on {record['machine']['device']}",
        "note": SAMPLE_NOTE if is_sample else "",
        "machine": machine_table(record["machine"]),
        "tests": f"`tests/gpu`: {tests['summary']}" if tests else "",
        "nets": "\n\n".join(part for net in record["nets"] for part in _net(net)),
    }
    return fill("gpu-check", **{**record, **fields})


def _net(net: dict[str, Any]) -> list[str]:
    rows = net["rows"]
    sizes = [str(size) for size in net["batch_sizes"]]
    first = rows[0]["title"]
    times = [[row["title"], *(_time(row, size) for size in sizes)] for row in rows]
    speeds = [[row["title"], *(_speed(row, size) for size in sizes)] for row in rows]
    parity = [[row["title"], *_parity(row["parity"])] for row in rows]
    batches = [f"batch {size}" for size in sizes]
    return [
        f"## {net['name']}, weights: {net['weights']}",
        "Milliseconds:",
        table(["", *batches], times),
        f"Images per second, and speedup over {first}:",
        table(["", *batches], speeds),
        "Parity with the plain net in float32 on the CPU; the worst kind of images that is judged:",
        table(["", "images", "largest", "rms", "top-1", "tolerance", "verdict"], parity),
    ]


def _time(row: dict[str, Any], size: str) -> str:
    timing = row["timings"].get(size)
    if isinstance(timing, dict):
        return spread(timing["round_ms"])
    return f"failed: {timing}" if timing else "failed"  # to open; the reason stands under parity


def _speed(row: dict[str, Any], size: str) -> str:
    timing = row["timings"].get(size)
    if not isinstance(timing, dict):
        return "failed"
    speedup = timing["speedup"]
    return f"{timing['images_per_s']:,.0f}" + ("" if speedup is None else f" ({speedup:.2f}×)")


def _parity(parity: dict[str, Any] | str) -> list[str]:
    if isinstance(parity, str):
        return [parity, *[""] * 5]
    return [
        f"{parity['num_images']} {parity['images']}",
        f"{parity['relative']:.1e}",
        f"{parity['rms']:.1e}",
        f"{100 * parity['top1_agreement']:.2f} %",
        parity["stated_tolerance"],
        {True: "same", False: "DIFFERENT", None: "not judged"}[parity["within_tolerance"]],
    ]


if __name__ == "__main__":
    sys.exit(run_command(command, GpuCheckConfig, examples=EXAMPLES))
