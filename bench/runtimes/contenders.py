"""The table of bench/gpu_check.py: every way to run a net, made callable as images → logits, compared and timed."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.gpu_check import GpuCheckConfig
from bench.lab.rounds import Failure, alternate, attempt, median_ms, speedup
from bench.nets import Net, torch_answer
from common.files import write_whole
from common.progress import progress
from export.artefacts import Provider, open_artefact
from export.compare import TOLERANCES, Answer, answer_all, compare
from export.eight_bits.quantize import TRIED, Target, quantize
from export.engines.engine import choose_builder
from export.graphs.graph import to_onnx
from export.pairs import ParityRow
from export.runtimes.load import load_runtime
from export.runtimes.runtime import answer_in_pieces
from export.to_trt import ToTrtConfig
from export.to_trt import command as build_engine_file
from fold.image_sets import random_images
from fold.lower import lower

LOWERING = "shared"  # of every plain net in the table
Profile = tuple[int, int, int]  # smallest, best and largest batch of engines
DIRAC_NET = "PyTorch, Dirac net"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def contenders(device: str, net: Net, folder: Path, profile: Profile) -> dict[str, Callable[[], Answer]]:
    """The functions that open the rows of a device, by "name, precision"; the first row is the baseline.

    They write their files into `folder`.
    """
    plain, half = lower(net.plain, LOWERING), "fp16" if device == "cuda" else "fp32"
    in_torch = partial(torch_answer, device=device, dtype=DTYPES[half])
    file = partial(graph_file, net, folder)

    def in_onnxruntime(provider: Provider, precision: str) -> Callable[[], Answer]:
        return lambda: open_artefact(file(precision, "onnxruntime"), provider=provider).answer

    def in_graphs(number: int | None, precision: str) -> Callable[[], Answer]:
        """As the server runs it with --runtime torch; refuses where the device is not there."""
        return lambda: load_runtime(file(precision, "onnxruntime"), name="torch", device=number)

    rows: dict[str, Callable[[], Answer]] = {
        f"{DIRAC_NET}, {half}": partial(in_torch, net.dirac),
        f"PyTorch, {half}": partial(in_torch, plain),
        f"torch.compile, {half}": partial(in_torch, plain, is_compiled=True),
    }
    if device == "cpu":
        rows["--runtime torch, fp32"] = in_graphs(None, "fp32")
        return rows | {f"ONNX Runtime CPU, {kind}": in_onnxruntime("cpu", kind) for kind in ("fp32", "int8")}
    rows |= {f"--runtime torch, {kind}": in_graphs(0, kind) for kind in ("fp32", "fp16")}
    rows |= {f"ONNX Runtime CUDA, {kind}": in_onnxruntime("cuda", kind) for kind in ("fp32", "fp16")}
    rows["ONNX Runtime TensorRT, fp16"] = in_onnxruntime("tensorrt", "fp16")
    return rows | {f"TensorRT, {kind}": partial(open_engine, file, profile, kind) for kind in ("fp32", "fp16", "int8")}


def open_engine(file: Callable[[str, Target], Path], profile: Profile, precision: str) -> Answer:
    """Built and loaded as export/to_trt.py does it."""
    choose_builder()  # refuses before eight bits are chosen, which takes longer than all else
    onnx = file(precision, "tensorrt")
    build_engine_file(ToTrtConfig(onnx, batch=profile))
    return open_artefact(onnx.with_suffix(".engine")).answer


def graph_file(net: Net, folder: Path, precision: str, target: Target) -> Path:
    """The ONNX file of a net, written once; in eight bits the best candidate of export/eight_bits/quantize.py."""
    path = folder / f"{net.name}-{precision}-{target}.onnx"
    if path.exists():
        return path
    if precision == "int8":
        observed, chosen_by = np.array_split(net.calibration, 2)
        images = {"observed": observed, "chosen_by": chosen_by}
        model, _ = quantize(net.plain, net.spec, precision="int8", target=target, lowerings=TRIED, **images)
    else:
        model = to_onnx(lower(net.plain, LOWERING), net.spec, {}, precision=precision)
    return write_whole(path, model.SerializeToString())


def measure(net: Net, config: GpuCheckConfig, console: Console) -> dict[str, Any]:
    """One net: open every contender, compare its logits, then time those that answer."""
    sizes = sorted(config.batch_sizes)
    profile = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    rows, answers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for title, open_answer in contenders(config.device, net, Path(folder), profile).items():
            console.print(f"{net.name}: {title}")
            rows[title] = row = {"title": title, "failed": None, "timings": {}, "parity": ""}
            answer = attempt(open_answer)
            if isinstance(answer, Failure):
                row["failed"] = row["parity"] = answer
                continue
            answers[title] = answer
            row["parity"] = attempt(partial(_compare, net, title, answer, profile[1]))
        with progress(console, f"{net.name}: timing", len(sizes) * config.rounds) as advance:
            for size in sizes:
                images = random_images(net.spec.image, size)
                racers = {
                    title: partial(attempt, partial(median_ms, partial(answer, images), config.round_s))
                    for title, answer in answers.items()
                }
                timings = alternate(racers, batch_size=size, num_rounds=config.rounds, advance=advance)
                first = timings.get(next(iter(rows)))
                for title, timing in timings.items():
                    if not isinstance(timing, Failure):
                        over_first = speedup(timing, over=first) if isinstance(first, dict) else None
                        timing = {**timing, "speedup": over_first}
                    rows[title]["timings"][str(size)] = timing
    return {"name": net.name, "weights": net.weights, "batch_sizes": sizes, "rows": list(rows.values())}


def _compare(net: Net, title: str, answer: Answer, batch_size: int) -> dict[str, Any] | str:
    """The worst comparison with the plain net; batches of one size, since every other one is compiled anew."""
    if title.startswith(DIRAC_NET) and not net.is_same:
        return "not compared: its weights are others"
    rows, tolerance = [], TOLERANCES[title.rpartition(", ")[2]]
    for kind, images in net.image_sets.items():
        with torch.inference_mode():
            expected = answer_all(lambda some: net.plain(torch.from_numpy(some)).numpy(), images)
        logits = answer_in_pieces(answer, images, batch_size, lambda num_images: batch_size)
        rows.append(ParityRow(kind, compare(("plain", expected), (title, logits), tolerance=tolerance)))
    # False before True before None, then the largest error: what most needs to be seen.
    worst = min(rows, key=lambda row: ((False, True, None).index(row.verdict), -row.comparison.difference.relative))
    return {**worst.to_dict(), "stated_tolerance": str(worst.comparison.tolerance)}
