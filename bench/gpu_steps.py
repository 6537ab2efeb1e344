"""bench/gpu_check.py --offline: every stage on a machine with a GPU and no network, within a time budget.

Each step runs in its own process with a time limit. If it fails, crashes or takes too long, its row gives the reason
and the next step runs. Those that no other command covers are here, and print their results as lines of JSON:
python -m bench.gpu_steps STEP cuda|cpu [FILE ...]
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.lab.page import render, table, write_page
from bench.lab.rounds import median_ms
from common.environment import versions

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
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
RUNTIMES: tuple[Literal["onnxruntime", "torch"], ...] = ("onnxruntime", "torch")  # available on a GPU without TensorRT


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
    all_forms = ("bench/gpu_check.py", plain, "--device", device, "--out", str(out), "--batch-sizes", *rounds)
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
        Step("all forms", 180, all_forms, plain),
    )


def run_plan(plan: tuple[Step, ...], budget_s: float, out: Path, say: Callable[[str], None]) -> list[Result]:
    """Runs all steps and returns a row for each; the page and its JSON are written after every step."""
    end, rows = time.monotonic() + budget_s, []
    for step in plan:
        left_s = max(0.0, end - time.monotonic())
        say(f"{step.name}: up to {min(step.limit_s, left_s):.0f} s")
        rows.append(run_step(step, left_s))
        say(f"{step.name}: {rows[-1]['outcome']}, {rows[-1]['seconds']:.0f} s")
        write_page(out, "gpu-offline", page(rows), rows)
    return rows


def run_step(step: Step, left_s: float) -> Result:
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


def _results(lines: list[str]) -> Iterator[Result]:
    """The lines that are JSON objects, without their nested values."""
    for line in lines:
        with suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                yield {name: value for name, value in found.items() if not isinstance(value, dict | list)}


def page(rows: list[Result]) -> str:
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


# Steps that no other command covers


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


def machine(device: str) -> Iterator[Result]:
    """Devices, versions, and the providers that actually load."""
    import torch

    from bench.gpu_check import machine_of
    from export.runtimes import gpu
    from export.runtimes.onnx_session import loadable_providers

    yield {"CUDA devices": gpu.num_devices(), "providers that load": " ".join(loadable_providers())}
    yield machine_of(device)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield {"memory_gb": total / 1e9, "free_gb": free / 1e9, "cudnn": torch.backends.cudnn.version()}


def driver_calls(device: str, num_loads: str = "1000") -> Iterator[Result]:
    """The calls of export/runtimes/gpu.py: buffers, a stream, a captured graph and its replay, a capture that fails.

    They are then repeated `num_loads` times, as for models that are reloaded: no memory may stay allocated.
    """
    from export.runtimes import gpu

    if not gpu.num_devices():
        yield {"gpu.py": "not run: no CUDA device, or no cuda-bindings"}
        return
    import cuda.bindings.runtime as cudart

    gpu.use(0)
    yield {"compute capability": gpu.compute_capability(), "device": gpu.device_name(), **_round_trip()}
    free = gpu.call(cudart.cudaMemGetInfo())  # the first of its two numbers
    for _ in range(int(num_loads)):
        _round_trip(num_replays=1)
    kept = free - gpu.call(cudart.cudaMemGetInfo())
    yield {"loads": int(num_loads), "bytes kept on the device": kept}


def _round_trip(*, num_bytes: int = 1 << 20, num_replays: int = 200) -> Result:
    """Upload, copy on the device by a graph, download; then everything is released."""
    import cuda.bindings.runtime as cudart

    from export.runtimes import gpu

    stream, one, other = gpu.call(cudart.cudaStreamCreate()), gpu.Buffer(num_bytes), gpu.Buffer(num_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def copy() -> None:
        gpu.call(cudart.cudaMemcpyAsync(other.device, one.device, num_bytes, kind, stream))

    def broken() -> None:
        raise RuntimeError("an allocation in the middle")

    def there_and_back() -> np.ndarray:
        one.upload(pixels, stream)
        gpu.launch(graph, stream)
        return other.download(pixels.shape, pixels.dtype, stream)

    graph, broken_graph = gpu.capture(stream, copy), gpu.capture(stream, broken)
    is_right = bool(np.array_equal(there_and_back(), pixels)) and broken_graph is None
    microseconds = 1e3 * median_ms(there_and_back, 0, min_calls=num_replays)
    gpu.release(stream, {1: graph})
    return {"right": is_right, "MB there and back, us": microseconds}


def fold_on_device(device: str, checkpoint: str) -> Iterator[Result]:
    """The Dirac net and its fold in each precision, TF32 off and on, compared with the Dirac net in float64."""
    import torch

    from bench.nets import on_device
    from fold.graph import fold
    from train.checkpoint import load_checkpoint, load_net

    found = load_checkpoint(Path(checkpoint))
    dirac = load_net(found).double().eval()
    nets = {"Dirac": dirac, "plain": fold(dirac).double().eval()}
    image, num = found.spec.image, 1024 if device == "cuda" else 16
    x = torch.randint(0, 256, (num, *image.shape), dtype=torch.uint8, device=device)
    kinds = {"fp64": torch.float64, "fp32": torch.float32, "TF32": torch.float32}
    kinds |= {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.inference_mode():
        truth = deepcopy(dirac).to(device)(x)
        for (precision, kind), (form, net) in product(kinds.items(), nets.items()):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
            answer = partial(on_device(net, device, dtype=kind), x)
            logits, seconds = answer().double(), _seconds(answer, device)
            yield {
                "form": form,
                "precision": precision,
                "largest error": float((logits - truth).abs().max() / truth.abs().max()),
                "same class": float((logits.argmax(1) == truth.argmax(1)).double().mean()),
                "images_per_s": num / seconds,
            }


def training_speed(device: str) -> Iterator[Result]:
    """A training step on CIFAR-sized noise that is already on the device."""
    import torch

    from bench.nets import dirac_spec
    from bench.training_steps import make_net, make_step

    nets, num = (((34, 2.0), (16, 1.0)), 128) if device == "cuda" else (((10, 0.25),), 4)
    ways = [("fp32", "Dirac", True, False), ("bf16", "Dirac", True, False), ("bf16", "Dirac", False, False)]
    ways += [("bf16", "ordinary", True, False), ("bf16", "Dirac", True, True)]
    for size, (precision, form, channels_last, compiled) in product(nets, ways):
        spec = dirac_spec(*size)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        net = make_net(form, spec).to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch has it
        wrap: Any = torch.compile if compiled else lambda net: net
        step = make_step(net, spec.image, num, precision=precision, device=device, wrap=wrap)
        seconds = _seconds(step, device)
        row = {"net": spec.name, "precision": precision, "filters": form, "channels last": channels_last}
        yield {**row, "compiled": compiled, "ms_per_step": 1e3 * seconds, "images_per_s": num / seconds}


def _seconds(work: Callable[[], object], device: str) -> float:
    """The mean time of a call, after as many calls of warm-up."""
    import torch

    wait, num = (torch.cuda.synchronize, 20) if device == "cuda" else (lambda: None, 1)

    def work_on() -> None:
        for _ in range(num):
            work()
        wait()

    work_on()
    return median_ms(work_on, 0, min_calls=1) / num / 1000


def sessions(device: str, *paths: str) -> Iterator[Result]:
    """ONNX Runtime and PyTorch: the first call and later calls of each batch size, and two sizes in turn."""
    from export.runtimes.load import load_runtime
    from fold.image_sets import random_images

    is_gpu = device == "cuda"
    sizes, num_calls = ((1, 8, 64, 256, 1024), 30) if is_gpu else ((1, 2), 4)
    for path, name in product(paths, RUNTIMES):
        start, model = time.perf_counter(), Path(path).name
        runtime = load_runtime(Path(path), name=name, device=0 if is_gpu else None)
        opened_ms, image = 1e3 * (time.perf_counter() - start), runtime.model.spec.image
        yield {"model": model, "runs on": runtime.description, "opened_ms": opened_ms}
        for turn in [*((size,) for size in sizes), (8, 32)]:
            batches = [random_images(image, num) for num in turn]
            call = partial(next, map(runtime, cycle(batches)))
            first_ms, *_ = [median_ms(call, 0, min_calls=1) for _ in batches]
            batch = ", ".join(map(str, turn)) + " in turn" * (len(turn) > 1)
            row = {"model": model, "runtime": name, "batch": batch, "first_ms": first_ms}
            yield {**row, "median_ms": median_ms(call, 0, min_calls=num_calls)}


def torch_loads(device: str, path: str, num_loads: str = "1000", limit_s: str = "60") -> Iterator[Result]:
    """--runtime torch loaded repeatedly, with graphs of two batch sizes: no memory may stay allocated."""
    import torch

    from export.runtimes.load import load_runtime

    def load() -> None:
        runtime = load_runtime(Path(path), name="torch", device=0 if device == "cuda" else None)
        image = runtime.model.spec.image
        for num in (1, 8):
            runtime(np.zeros((num, *image.shape), np.uint8))

    def held() -> np.ndarray:
        """Bytes allocated by tensors, and bytes reserved by PyTorch's allocator; 0 without a device."""
        return np.array([torch.cuda.memory_allocated(), torch.cuda.memory_reserved()])

    load()
    before, end, loads = held(), time.monotonic() + float(limit_s), 0
    while loads < int(num_loads) and time.monotonic() < end:
        load()
        loads += 1
    kept, reserved = (held() - before).tolist()
    yield {"loads": loads, "bytes kept on the device": kept, "bytes kept by PyTorch for the next": reserved}


def server(device: str, path: str) -> Iterator[Result]:
    """serve/run.py on both runtimes with several numbers of workers; the client is one Python process, a bottleneck."""
    from bench.lab.server import start
    from common.environment import num_cores

    (*_, image) = sorted((ROOT / "models" / "held-out").glob("*.png"))
    devices = ("--devices", 0) if device == "cuda" else ()
    for workers, name in product((1, 4, 12) if num_cores() > 4 else (1,), RUNTIMES):
        with start(Path(path), "--runtime", name, "--workers", workers, "--log-level", "warning", *devices) as running:
            for connections in (1, 16, 128):
                row = {"runtime": name, "workers": workers, "connections": connections}
                yield row | asyncio.run(_load(running.port, image.read_bytes(), connections))


async def _load(port: int, image: bytes, num_connections: int, seconds: float = 3.0) -> Result:
    from bench.lab.load import Load, predict_request

    load = Load(port, predict_request(image), num_connections=num_connections)
    await load.run(seconds)
    num = load.statuses().get("200", 0)
    percentiles = {f"p{percent}_ms": load.percentile_ms(200, percent) for percent in (50, 99) if num}
    return {"requests_per_s": num / seconds, **percentiles, "failures": len(load.replies) - num}


STEPS: dict[str, Callable[..., Iterator[Result]]] = {
    step.__name__: step
    for step in (machine, driver_calls, fold_on_device, training_speed, sessions, torch_loads, server)
}

if __name__ == "__main__":
    for result in STEPS[sys.argv[1]](*sys.argv[2:]):
        print(json.dumps(result), flush=True)
