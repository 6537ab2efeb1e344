"""Steps of bench/gpu_plan.py that no command of the project takes: each prints lines of JSON, one a result.

python bench/gpu_steps.py STEP cuda|cpu [FILE ...]
"""

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

if TYPE_CHECKING:
    from export.runtimes.load import RuntimeName

Result = dict[str, Any]
RUNTIMES: tuple["RuntimeName", ...] = ("onnxruntime", "torch")  # what a GPU has without TensorRT
ROOT = Path(__file__).resolve().parents[1]


def machine(device: str) -> Iterator[Result]:
    """Versions, devices, and the libraries that really load."""
    import torch

    from bench.page import describe_machine
    from export.runtimes import gpu
    from export.runtimes.onnx_session import loadable_providers

    yield describe_machine("torch", "triton", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")
    yield {"CUDA devices": gpu.num_devices(), "providers that load": " ".join(loadable_providers())}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        cudnn = torch.backends.cudnn.version()
        yield {"device": torch.cuda.get_device_name(), "memory_gb": total / 1e9, "free_gb": free / 1e9, "cudnn": cudnn}


def driver_calls(device: str, num_loads: str = "1000") -> Iterator[Result]:
    """The calls of export/runtimes/gpu.py: buffers, a stream, a captured graph and its replay, a capture that breaks.

    Then all of it again and again, as models are loaded and reloaded: nothing may be kept on the device.
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
        _round_trip(num_bytes=1 << 20, num_replays=1)
    kept = free - gpu.call(cudart.cudaMemGetInfo())
    yield {"loads": int(num_loads), "bytes kept on the device": kept}


def fold_on_device(device: str, checkpoint: str) -> Iterator[Result]:
    """The Dirac net and its fold in each precision, TF32 off and on, against the Dirac net in float64 there."""
    import torch

    from fold.plain import fold_net
    from train.checkpoint import load_checkpoint, load_net

    found = load_checkpoint(Path(checkpoint))
    nets = {"Dirac": load_net(found).double().eval()}
    nets["plain"] = fold_net(nets["Dirac"]).double().eval()
    image, num = found.spec.image, 1024 if device == "cuda" else 16
    x = torch.randint(0, 256, (num, image.height, image.width, image.channels), dtype=torch.uint8, device=device)
    kinds = {"fp64": torch.float64, "fp32": torch.float32, "TF32": torch.float32}
    kinds |= {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.inference_mode():
        truth = deepcopy(nets["Dirac"]).to(device)(x)
        for precision, kind in kinds.items():
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
            for form, net in nets.items():
                answer = _in_precision(net, kind, device)
                y, seconds = answer(x).double(), _seconds(lambda answer=answer: answer(x), device)
                same, error = (y.argmax(1) == truth.argmax(1)).double().mean(), (y - truth).abs().max()
                yield {
                    "form": form,
                    "precision": precision,
                    "largest error": float(error / truth.abs().max()),
                    "same class": float(same),
                    "images_per_s": num / seconds,
                }


def training_speed(device: str) -> Iterator[Result]:
    """A step of training as train/ takes it, on noise of CIFAR's size that lies on the device."""
    import torch

    from common.spec import Spec
    from train.data.batches import Batch
    from train.data.datasets import cifar_image
    from train.families import build
    from train.trainer import make_optimizer, train_step

    nets, num = (((34, 2.0), (16, 1.0)), 128) if device == "cuda" else (((10, 0.25),), 4)
    ways = [("fp32", "dirac", True, False), ("bf16", "dirac", True, False), ("bf16", "dirac", False, False)]
    ways += [("bf16", "plain", True, False), ("bf16", "dirac", True, True)]
    image = cifar_image()
    pixels = torch.randint(0, 256, (num, image.height, image.width, 3), dtype=torch.uint8, device=device)
    batch = Batch(0, 0, pixels, torch.randint(0, 10, (num,), device=device))
    for depth, width in nets:
        for precision, form, channels_last, compiled in ways:
            spec = Spec("cifar", depth, width, "ncrelu", image, tuple("0123456789"), form)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            net: Any = build(spec).to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]  # torch has it
            how = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay_ab": True}
            optimizer, scaler = make_optimizer(net, **how), torch.amp.GradScaler(device, enabled=False)
            net = torch.compile(net) if compiled else net

            def step(*parts: Any, precision: str = precision) -> Any:
                return train_step(*parts, batch, 0.01, precision=precision)

            seconds = _seconds(lambda step=step, parts=(net, optimizer, scaler): step(*parts), device)
            row = {"net": spec.name, "precision": precision, "filters": form, "channels last": channels_last}
            yield {**row, "compiled": compiled, "ms_per_step": 1e3 * seconds, "images_per_s": num / seconds}


def sessions(device: str, *paths: str) -> Iterator[Result]:
    """ONNX Runtime and PyTorch: the first call of each batch size, those after it, and two sizes in turn."""
    from export.runtimes.load import load_runtime

    is_gpu = device == "cuda"
    sizes = [(size,) for size in ((1, 8, 64, 256, 1024) if is_gpu else (1, 2))]
    for path, name in product(paths, RUNTIMES):
        start = time.perf_counter()
        runtime = load_runtime(Path(path), name=name, device=0 if is_gpu else None)
        opened_ms, model = 1e3 * (time.perf_counter() - start), Path(path).name
        yield {"model": model, "runs on": runtime.description, "opened_ms": opened_ms}
        image, rng = runtime.model.spec.image, np.random.default_rng(0)
        for turn in [*sizes, (8, 32)]:
            shapes = [(num, image.height, image.width, image.channels) for num in turn]
            batches = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
            times = [_call_ms(runtime, batches[index % len(batches)]) for index in range(30 if is_gpu else 4)]
            label = ", ".join(map(str, turn)) + " in turn" * (len(turn) > 1)
            which = {"model": model, "runtime": name, "batch": label}
            yield {**which, "first_ms": times[0], "median_ms": statistics.median(times[len(batches) :])}


def torch_loads(device: str, path: str, num_loads: str = "1000", limit_s: str = "60") -> Iterator[Result]:
    """--runtime torch, loaded again and again, with a graph of two sizes each: nothing may be kept on the device."""
    import torch

    from export.runtimes.load import load_runtime

    def load() -> None:
        runtime = load_runtime(Path(path), name="torch", device=0 if device == "cuda" else None)
        image = runtime.model.spec.image
        for num in (1, 8):
            runtime(np.zeros((num, image.height, image.width, image.channels), np.uint8))

    def held() -> list[int]:
        if device == "cpu":
            return [0, 0]
        return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]

    load()
    before, end, loads = held(), time.monotonic() + float(limit_s), 0
    while loads < int(num_loads) and time.monotonic() < end:
        load()
        loads += 1
    kept, reserved = (after - earlier for after, earlier in zip(held(), before, strict=True))
    yield {"loads": loads, "bytes kept on the device": kept, "bytes kept by PyTorch for the next": reserved}


def server(device: str, path: str) -> Iterator[Result]:
    """serve/run.py on both runtimes with more and more workers, asked by one process of Python, which has a limit."""
    from common.cores import num_cores

    (*_, image) = sorted((ROOT / "models" / "held-out").glob("*.png"))
    for workers, name in product((1, 4, 12) if num_cores() > 4 else (1,), RUNTIMES):
        argv = [sys.executable, str(ROOT / "serve" / "run.py"), path, "--port", "0", "--workers", str(workers)]
        argv += ["--runtime", name, "--log-level", "warning"]
        argv += ["--devices", "0"] if device == "cuda" else []
        with _served(argv) as port:
            for connections in (1, 16, 128):
                which = {"runtime": name, "workers": workers, "connections": connections}
                yield {**which, **_load(port, image.read_bytes(), connections)}


def _round_trip(*, num_bytes: int = 1 << 20, num_replays: int = 200) -> Result:
    """Up, copied on the device by a graph, and down again; then everything is given back."""
    import cuda.bindings.runtime as cudart

    from export.runtimes import gpu

    stream, one, other = gpu.call(cudart.cudaStreamCreate()), gpu.Buffer(num_bytes), gpu.Buffer(num_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def copy() -> None:
        gpu.call(cudart.cudaMemcpyAsync(other.device, one.device, num_bytes, kind, stream))

    def broken() -> None:
        raise RuntimeError("an allocation in the middle")

    graph, broken_graph = gpu.capture(stream, copy), gpu.capture(stream, broken)
    times = []
    for _ in range(num_replays):
        start = time.perf_counter()
        one.upload(pixels, stream)
        gpu.launch(graph, stream)
        answer = other.download(pixels.shape, pixels.dtype, stream)
        times.append(time.perf_counter() - start)
    gpu.release(stream, {1: graph})
    is_right = bool(np.array_equal(answer, pixels)) and broken_graph is None
    return {"right": is_right, "MB there and back, us": 1e6 * statistics.median(times)}


def _in_precision(net: Any, kind: Any, device: str) -> Callable[[Any], Any]:
    """The net in `kind`, channels last; pixels are normalised in no less than float32."""
    import torch

    whole = deepcopy(net)
    normalize = whole[0].to(device) if kind == torch.float64 else whole[0].float().to(device)
    rest = whole[1:].to(device, kind).to(memory_format=torch.channels_last)
    return lambda x: rest(normalize(x).to(kind))


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, on average over some after the first ones."""
    import torch

    num_first, num = (5, 20) if device == "cuda" else (1, 1)
    for _ in range(num_first):
        work()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(num):
        work()
    wait()
    return (time.perf_counter() - start) / num


def _call_ms(runtime: Any, images: np.ndarray) -> float:
    start = time.perf_counter()
    runtime(images)
    return 1e3 * (time.perf_counter() - start)


@contextmanager
def _served(argv: list[str]) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    try:
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                yield int(found[1])
                return
        raise RuntimeError("".join(said)[-500:])
    finally:
        process.terminate()
        process.wait(30)


def _load(port: int, image: bytes, num_connections: int, seconds: float = 3.0) -> Result:
    from bench.lab.load import Load, Reply, predict_request

    answers: list[Reply] = []

    async def ask() -> None:
        load = Load(port, predict_request(image), answers.append, num_connections=num_connections)
        await load.saturate(seconds)

    asyncio.run(ask())
    times = sorted(1e3 * answer.seconds for answer in answers if answer.status == 200)
    failures = len(answers) - len(times)
    if not times:
        return {"requests_per_s": 0.0, "failures": failures}
    p50, p99 = statistics.median(times), times[min(len(times) - 1, int(0.99 * len(times)))]
    return {"requests_per_s": len(times) / seconds, "p50_ms": p50, "p99_ms": p99, "failures": failures}


STEPS: dict[str, Callable[..., Iterator[Result]]] = {
    step.__name__: step
    for step in (machine, driver_calls, fold_on_device, training_speed, sessions, torch_loads, server)
}

if __name__ == "__main__":
    for result in STEPS[sys.argv[1]](*sys.argv[2:]):
        print(json.dumps(result), flush=True)
