"""The table of what is raced: every way to run a net, each made callable as images → logits."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.nets import Net
from common.files import write_whole
from export.artefacts import Provider, open_artefact
from export.compare import Answer
from export.eight_bits.quantize import TRIED, Target, quantize
from export.engines.engine import choose_builder
from export.graphs.graph import to_onnx
from export.runtimes.load import load_runtime
from export.to_trt import ToTrtConfig
from export.to_trt import command as build_engine_file
from fold.lower import lower

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
    if device == "cpu":
        return (
            *_torch_rows("cpu", "fp32"),
            Contender("--runtime torch", "fp32", partial(open_graphs, None, "fp32")),
            Contender("ONNX Runtime CPU", "fp32", partial(open_onnx, "cpu", "fp32")),
            Contender("ONNX Runtime CPU", "int8", partial(open_onnx, "cpu", "int8")),
        )
    return (
        *_torch_rows("cuda", "fp16"),
        Contender("--runtime torch", "fp32", partial(open_graphs, 0, "fp32")),
        Contender("--runtime torch", "fp16", partial(open_graphs, 0, "fp16")),
        Contender("ONNX Runtime CUDA", "fp32", partial(open_onnx, "cuda", "fp32")),
        Contender("ONNX Runtime CUDA", "fp16", partial(open_onnx, "cuda", "fp16")),
        Contender("ONNX Runtime TensorRT", "fp16", partial(open_onnx, "tensorrt", "fp16")),
        Contender("TensorRT", "fp32", partial(open_engine, "fp32")),
        Contender("TensorRT", "fp16", partial(open_engine, "fp16")),
        Contender("TensorRT", "int8", partial(open_engine, "int8")),
    )


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
    # NCReLU's own gradient would cut the compiled graph in pieces; LOWERING has none.
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
        model = quantize(
            net.plain,
            net.spec,
            precision="int8",
            target=target,
            lowerings=TRIED,
            observed=observed,
            chosen_by=chosen_by,
        ).model
    else:
        model = to_onnx(lower(net.plain, LOWERING), net.spec, {}, precision=precision)
    write_whole(path, model.SerializeToString())
    return path


def _torch_rows(device: str, precision: str) -> tuple[Contender, ...]:
    forms = (("PyTorch, Dirac net", True, False), ("PyTorch", False, False), ("torch.compile", False, True))
    return tuple(
        Contender(
            name,
            precision,
            partial(open_torch, device, precision, is_dirac=is_dirac, is_compiled=is_compiled),
            is_dirac,
        )
        for name, is_dirac, is_compiled in forms
    )
