"""python bench/gpu_check.py: build, run, compare and time every form of a net on this machine's GPU."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from bench.contenders import Contender
    from bench.nets import Net
    from bench.rounds import Failure, Timing
    from export.compare import Answer

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "fashion-mnist.safetensors"
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

    if config.plain:
        nets = [net_of_file(path) for path in config.plain]
    else:
        nets = [seeded_net(*size) for size in SEEDED] + ([net_of_file(BUNDLED)] if BUNDLED.exists() else [])
    record = {
        "sample": False,
        "command": _typed(config),
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
        record["nets"].append(_measure(net, config, console))
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


def _measure(net: "Net", config: GpuCheckConfig, console: "Console") -> dict[str, Any]:
    """One net: open every contender, compare its logits, then time those that answer."""
    import tempfile

    from bench.contenders import contenders
    from bench.rounds import Failure, attempt, time_rounds
    from common.progress import progress
    from fold.image_sets import random_images

    sizes = sorted(config.batch_sizes)
    profile = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    rows, answers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for contender in contenders(config.device):
            console.print(f"{net.name}: {contender.title}")
            answer = attempt(lambda contender=contender: contender.open(net, Path(folder), profile))
            rows[contender.title] = row = {"title": contender.title, "failed": None, "timings": {}, "parity": ""}
            if isinstance(answer, Failure):
                row["failed"] = row["parity"] = answer.reason
                continue
            answers[contender.title] = answer
            parity = attempt(lambda contender=contender, answer=answer: _compare(net, contender, answer, profile[1]))
            row["parity"] = parity.reason if isinstance(parity, Failure) else parity
        with progress(console, f"{net.name}: timing", len(sizes) * config.rounds) as advance:
            for size in sizes:
                images = random_images(net.spec.image, size)
                timings = time_rounds(
                    answers, images, num_rounds=config.rounds, round_s=config.round_s, advance=advance
                )
                _record(rows, timings, str(size))
    return {"name": net.name, "weights": net.weights, "batch_sizes": sizes, "rows": list(rows.values())}


def _record(rows: dict[str, dict[str, Any]], timings: "dict[str, Timing | Failure]", size: str) -> None:
    """Timings of one batch size into the rows, with speedups over the first row."""
    from bench.rounds import Failure

    baseline = timings.get(next(iter(rows)))
    for title, timing in timings.items():
        if isinstance(timing, Failure):
            rows[title]["timings"][size] = timing.reason
            continue
        speedup = timing.speedup_over(baseline) if baseline and not isinstance(baseline, Failure) else None
        rows[title]["timings"][size] = {**timing.to_dict(), "speedup": speedup}


def _compare(net: "Net", contender: "Contender", answer: "Answer", batch_size: int) -> dict[str, Any] | str:
    """The worst comparison with the plain net; batches of one size, since every other one is compiled anew."""
    import numpy as np
    import torch

    from export.compare import TOLERANCES, answer_all, compare
    from export.parity import ParityRow
    from export.runtimes.runtime import pad

    if contender.is_dirac and not net.is_same:
        return "not compared: its weights are others"

    @torch.inference_mode()
    def reference(images: np.ndarray) -> np.ndarray:
        return net.plain(torch.from_numpy(images)).numpy()

    def padded(images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), batch_size)
        pieces = [images[start : start + batch_size] for start in starts]
        return np.concatenate([answer(pad(piece, batch_size))[: len(piece)] for piece in pieces])

    rows = []
    for kind, images in net.image_sets.items():
        named = [(name, answer_all(form, images)) for name, form in (("plain", reference), (contender.title, padded))]
        rows.append(ParityRow(kind, compare(*named, tolerance=TOLERANCES[contender.precision])))
    # False before True before None, then the largest error: what most needs to be seen.
    worst = min(rows, key=lambda row: ((False, True, None).index(row.verdict), -row.comparison.relative))
    return {**worst.to_dict(), "stated_tolerance": str(worst.comparison.tolerance)}


def _typed(config: GpuCheckConfig) -> str:
    """The command as one would type it, without where its results go."""
    options = given_arguments(replace(config, plain=(), out=GpuCheckConfig.out))
    return " ".join(["python bench/gpu_check.py", *map(str, config.plain), options]).rstrip()


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
    """What was measured on, all as text; refuses where there is no CUDA device."""
    import torch

    from bench.page import describe_machine

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
    from bench.gpu_report import markdown
    from common.files import write_whole

    console.print(f"wrote {write_whole(path, markdown(record).encode())}")


def _slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


if __name__ == "__main__":
    sys.exit(run_command(command, GpuCheckConfig, examples=EXAMPLES))
