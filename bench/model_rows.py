"""The rows of bench/model.py: every way to run a net on a CPU, opened in a process of its own.

Nothing here imports a library at the top, so that a process holds only what its row needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.worker import Open

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from bench.nets import Net
    from export.compare import Answer


ALL_LOWERINGS = ("concat", "shared", "shared-split", "split", "mirror", "skip")


@dataclass(frozen=True)
class Race:
    """A net and what it is raced beside; fewer lowerings and rounds where a call takes seconds."""

    family: str
    depth: int
    width: float
    published: str
    peers: tuple[str, ...]  # keys of PEERS in bench/nets.py
    lowerings: tuple[str, ...] = ALL_LOWERINGS
    rounds: int = 5


RACES = {
    "34-2": Race("cifar", 34, 2.0, "5.6 % error on CIFAR-10 (table 2)", ("WRN-40-2", "RepVGG-A0 at 32x32")),
    "16-1": Race("cifar", 16, 1.0, "none published", ("WRN-16-1", "RepVGG-A0/3 at 32x32")),
    "18-0.75": Race(
        *("imagenet", 18, 0.75, "32.30 % top-1 error on ImageNet (table 3)", ("ResNet-18", "RepVGG-A0")),
        lowerings=("concat", "shared", "shared-split"),
        rounds=3,
    ),
}
RACED_ELSEWHERE = ("concat", "shared", "shared-split")  # on OpenVINO and MNN
INT8_LOWERINGS = ("concat", "shared", "skip")
# What every bar is stated against: a Dirac net that rebuilds its weights at each call.
REFERENCE, OURS = "PyTorch eager, Dirac net, reference form", "PyTorch eager, Dirac net, ours"
BASELINES = (REFERENCE, OURS)
NUM_GEMM = {"fp32": 1024, "int8": 2048}  # rows and columns; the size at which each is fastest here


@dataclass(frozen=True)
class RaceRow:
    """One row. `open` takes the folder of the net's files and the number of threads."""

    title: str
    net: str  # whose it is: that of the race, a peer's, or "GEMM"
    precision: str
    open: Open
    file: str = ""  # the graph that it reads


def rows_of(key: str, *, name: str) -> list[RaceRow]:
    """All rows of a race; `name` is that of its net."""
    race = RACES[key]
    rows = [
        RaceRow(REFERENCE, name, "fp32", partial(open_eager, key, "reference")),
        RaceRow(OURS, name, "fp32", partial(open_eager, key, "dirac")),
        RaceRow("PyTorch eager, concat", name, "fp32", partial(open_eager, key, "concat")),
        RaceRow("PyTorch eager, shared", name, "fp32", partial(open_eager, key, "shared")),
        RaceRow("torch.compile, shared", name, "fp32", partial(open_compiled, key, "shared")),
    ]
    rows += [_row("ONNX Runtime", low, name, "fp32") for low in race.lowerings]
    rows += [_row(library, low, name, "fp32") for library in ("OpenVINO", "MNN") for low in RACED_ELSEWHERE]
    rows += [_row("ONNX Runtime", low, name, "int8") for low in INT8_LOWERINGS]
    rows.append(_row("OpenVINO", "concat", name, "int8"))
    for peer in race.peers:
        rows += [_row(library, "concat", peer, "fp32") for library in OPENERS]
        rows.append(_row("ONNX Runtime", "concat", peer, "int8"))
    return rows


def gemm_rows() -> list[RaceRow]:
    """Matrix products, for the limit of the machine."""
    fp32, int8 = NUM_GEMM["fp32"], NUM_GEMM["int8"]
    return [
        RaceRow(f"oneDNN, packed weights, {fp32}", "GEMM", "fp32", partial(open_gemm, "onednn", fp32)),
        RaceRow(f"torch.mm, {fp32}", "GEMM", "fp32", partial(open_gemm, "torch", fp32)),
        RaceRow(f"numpy.matmul, {fp32}", "GEMM", "fp32", partial(open_gemm, "numpy", fp32)),
        RaceRow(f"torch._int_mm, {int8}", "GEMM", "int8", partial(open_gemm, "int8", int8)),
    ]


def graph_name(net: str, lowering: str, kind: str = "fp32") -> str:
    """The file of a graph; `kind` is fp32, int8 for ONNX Runtime's integer nodes, or qdq."""
    return f"{net.replace('/', '-over-').replace(' ', '-')}-{kind}-{lowering}.onnx"


def open_eager(key: str, form: str, folder: Path, num_threads: int) -> "Answer":
    """PyTorch without a compiler: `form` is reference, dirac or a lowering of the plain net."""
    import torch

    from bench.contenders import open_torch
    from bench.nets import reference_form

    net = _seeded(key, num_threads)
    if form != "reference":
        options = {"is_dirac": form == "dirac", "is_compiled": False, "lowering": form}
        return open_torch("cpu", "fp32", net, folder, (1, 1, 1), **options)
    module: nn.Module = reference_form(net.dirac)

    @torch.inference_mode()
    def answer(images: "np.ndarray") -> "np.ndarray":
        return module(torch.from_numpy(images)).numpy()

    return answer


def open_compiled(key: str, lowering: str, folder: Path, num_threads: int) -> "Answer":
    import logging

    from bench.contenders import open_torch

    # The compiler's search for CUDA warns of what no row here asks for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    net = _seeded(key, num_threads)
    return open_torch("cpu", "fp32", net, folder, (1, 1, 1), is_dirac=False, is_compiled=True, lowering=lowering)


def open_onnx(file: str, folder: Path, num_threads: int) -> "Answer":
    from export.runtimes.onnx_session import OnnxSession

    return OnnxSession(folder / file, providers=("CPUExecutionProvider",), num_threads=num_threads)


def open_openvino(file: str, folder: Path, num_threads: int) -> "Answer":
    import sys

    # OpenVINO imports a package that can send reports; where it is missing, a stub of OpenVINO's own does nothing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": num_threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(folder / file, "CPU", options).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0].copy()


def open_mnn(file: str, folder: Path, num_threads: int) -> "Answer":
    from export.runtimes.mnn_module import MnnModule

    return MnnModule(folder / file, num_threads=num_threads)


OPENERS = {"ONNX Runtime": open_onnx, "OpenVINO": open_openvino, "MNN": open_mnn}


def open_gemm(library: str, size: int, folder: Path, num_threads: int) -> "Answer":
    """A product of two matrices [size, size], whatever images come; gives zero logits."""
    import numpy as np

    logits, multiply = np.zeros((1, 1), np.float32), _multiplier(library, size, num_threads)

    def answer(images: "np.ndarray") -> "np.ndarray":
        multiply()
        return logits

    return answer


def _row(library: str, lowering: str, net: str, precision: str) -> RaceRow:
    """A row that reads a graph: eight bits are integer nodes for ONNX Runtime, Q/DQ pairs for others."""
    kind = "qdq" if precision == "int8" and library != "ONNX Runtime" else precision
    file = graph_name(net, lowering, kind)
    return RaceRow(f"{library}, {lowering}", net, precision, partial(OPENERS[library], file), file)


def _multiplier(library: str, size: int, num_threads: int) -> Callable[[], object]:
    import numpy as np

    left, right = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    if library == "numpy":
        product = np.empty_like(left)
        return lambda: np.matmul(left, right, out=product)
    import torch

    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    match library:
        case "torch":
            c = torch.empty(size, size)
            return lambda: torch.mm(a, b, out=c)
        case "onednn":
            packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
            return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
        case "int8":
            whole = [(20 * part).clamp(-127, 127).to(torch.int8) for part in (a, b)]
            return lambda: torch._int_mm(*whole)
    raise ValueError(library)


def _seeded(key: str, num_threads: int) -> "Net":
    import torch

    from bench.nets import seeded_net

    torch.set_num_threads(num_threads)
    race = RACES[key]
    return seeded_net(race.depth, race.width, family=race.family)
