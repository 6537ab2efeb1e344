"""The table of bench/gpu_check.py: every way to run a net, made callable as images → logits, compared and timed."""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.nets import Net
from bench.rounds import Failure, Timing, alternate, attempt, median_ms
from common.files import write_whole
from common.progress import progress
from export.artefacts import Provider, open_artefact
from export.compare import TOLERANCES, Answer, answer_all, compare
from export.eight_bits.quantize import TRIED, Target, quantize
from export.engines.engine import choose_builder
from export.graphs.graph import to_onnx
from export.pairs import ParityRow
from export.runtimes.load import load_runtime
from export.runtimes.runtime import pad
from export.to_trt import ToTrtConfig
from export.to_trt import command as build_engine_file
from fold.image_sets import random_images
from fold.lower import lower

if TYPE_CHECKING:
    from rich.console import Console

    from bench.gpu_check import GpuCheckConfig

LOWERING = "shared"  # of every plain net in the table
Profile = tuple[int, int, int]  # smallest, best and largest batch of engines
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Contender:
    """One row. `open` takes (net, folder for files, profile)."""

    name: str
    precision: str
    open: Callable[[Net, Path, Profile], Answer]
    is_dirac: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, {self.precision}"


def contenders(device: str) -> tuple[Contender, ...]:
    """The rows of a device, the one that others are measured against first."""
    is_gpu = device == "cuda"
    precision = "fp16" if is_gpu else "fp32"
    torch_form = partial(open_torch, device, precision)
    rows: list[tuple[str, str, Callable[[Net, Path, Profile], Answer]]] = [
        ("PyTorch, Dirac net", precision, partial(torch_form, is_dirac=True, is_compiled=False)),
        ("PyTorch", precision, partial(torch_form, is_dirac=False, is_compiled=False)),
        ("torch.compile", precision, partial(torch_form, is_dirac=False, is_compiled=True)),
    ]
    if is_gpu:
        rows += [("--runtime torch", kind, partial(open_graphs, 0, kind)) for kind in ("fp32", "fp16")]
        rows += [("ONNX Runtime CUDA", kind, partial(open_onnx, "cuda", kind)) for kind in ("fp32", "fp16")]
        rows.append(("ONNX Runtime TensorRT", "fp16", partial(open_onnx, "tensorrt", "fp16")))
        rows += [("TensorRT", kind, partial(open_engine, kind)) for kind in ("fp32", "fp16", "int8")]
    else:
        rows.append(("--runtime torch", "fp32", partial(open_graphs, None, "fp32")))
        rows += [("ONNX Runtime CPU", kind, partial(open_onnx, "cpu", kind)) for kind in ("fp32", "int8")]
    return tuple(Contender(*row, is_dirac=row[0].endswith("Dirac net")) for row in rows)


def measure(net: Net, config: "GpuCheckConfig", console: "Console") -> dict[str, Any]:
    """One net: open every contender, compare its logits, then time those that answer."""
    sizes = sorted(config.batch_sizes)
    profile = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    rows, answers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for contender in contenders(config.device):
            console.print(f"{net.name}: {contender.title}")
            answer = attempt(partial(contender.open, net, Path(folder), profile))
            rows[contender.title] = row = {"title": contender.title, "failed": None, "timings": {}, "parity": ""}
            if isinstance(answer, Failure):
                row["failed"] = row["parity"] = answer.reason
                continue
            answers[contender.title] = answer
            parity = attempt(partial(_compare, net, contender, answer, profile[1]))
            row["parity"] = parity.reason if isinstance(parity, Failure) else parity
        with progress(console, f"{net.name}: timing", len(sizes) * config.rounds) as advance:
            for size in sizes:
                images = random_images(net.spec.image, size)
                racers = {
                    title: partial(median_ms, partial(answer, images), config.round_s)
                    for title, answer in answers.items()
                }
                timings = alternate(racers, batch_size=size, num_rounds=config.rounds, advance=advance)
                baseline = timings.get(next(iter(rows)))
                for title, timing in timings.items():
                    rows[title]["timings"][str(size)] = _timing_record(timing, baseline)
    return {"name": net.name, "weights": net.weights, "batch_sizes": sizes, "rows": list(rows.values())}


def _timing_record(timing: Timing | Failure, baseline: Timing | Failure | None) -> dict[str, Any] | str:
    """A timing with its speedup over the first row, or why there is none."""
    if isinstance(timing, Failure):
        return timing.reason
    return {**timing.to_dict(), "speedup": timing.speedup_over(baseline) if isinstance(baseline, Timing) else None}


def _compare(net: Net, contender: Contender, answer: Answer, batch_size: int) -> dict[str, Any] | str:
    """The worst comparison with the plain net; batches of one size, since every other one is compiled anew."""
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
    worst = min(rows, key=lambda row: ((False, True, None).index(row.verdict), -row.comparison.difference.relative))
    return {**worst.to_dict(), "stated_tolerance": str(worst.comparison.tolerance)}


def open_torch(
    device: str,
    precision: str,
    net: Net,
    folder: Path,
    profile: Profile,
    *,
    is_dirac: bool,
    is_compiled: bool,
    lowering: str = LOWERING,
) -> Answer:
    """A net of PyTorch, the Dirac one or the plain one in `lowering`, channels last.

    Pixels are normalised in float32, as in the ONNX graph.
    """
    torch.backends.cudnn.benchmark = True
    whole = (deepcopy(net.dirac) if is_dirac else lower(net.plain, lowering)).float().eval()
    normalize, dtype = whole[0].to(device), DTYPES[precision]
    rest: Callable = whole[1:].to(device, dtype).to(memory_format=torch.channels_last)
    if is_compiled:
        # Recompilations are limited, those of earlier nets count, and what is over the limit would run eagerly.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Replaying CUDA graphs is what makes small batches fast; the CPU has none.
        rest = torch.compile(rest, dynamic=False, mode="reduce-overhead" if device == "cuda" else "default")

    @torch.inference_mode()
    def answer(images: np.ndarray) -> np.ndarray:
        x = normalize(torch.from_numpy(images).to(device))
        return rest(x.to(dtype)).float().cpu().numpy()

    return answer


def open_onnx(provider: Provider, precision: str, net: Net, folder: Path, profile: Profile) -> Answer:
    return open_artefact(graph_file(net, precision, folder, target="onnxruntime"), provider=provider).answer


def open_graphs(device: int | None, precision: str, net: Net, folder: Path, profile: Profile) -> Answer:
    """As the server runs it with --runtime torch; refuses where the device is not there."""
    return load_runtime(graph_file(net, precision, folder, target="onnxruntime"), name="torch", device=device)


def open_engine(precision: str, net: Net, folder: Path, profile: Profile) -> Answer:
    """Built and loaded as export/to_trt.py does it."""
    choose_builder()  # refuses before eight bits are chosen, which takes longer than all else
    onnx = graph_file(net, precision, folder, target="tensorrt")
    build_engine_file(ToTrtConfig(onnx, batch=profile))
    return open_artefact(onnx.with_suffix(".engine")).answer


def graph_file(net: Net, precision: str, folder: Path, *, target: Target) -> Path:
    """The ONNX file of a net, written once; in eight bits the best candidate of export/eight_bits/quantize.py."""
    path = folder / f"{net.name}-{precision}-{target}.onnx"
    if path.exists():
        return path
    if precision == "int8":
        observed, chosen_by = np.array_split(net.calibration, 2)
        ranges_from = {"observed": observed, "chosen_by": chosen_by}
        found = quantize(net.plain, net.spec, precision="int8", target=target, lowerings=TRIED, **ranges_from)
        model = found.model
    else:
        model = to_onnx(lower(net.plain, LOWERING), net.spec, {}, precision=precision)
    write_whole(path, model.SerializeToString())
    return path
