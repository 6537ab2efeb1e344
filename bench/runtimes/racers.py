"""The racers of bench/model.py: every way to run a net on a CPU, each in a process of its own, told when to run.

Thread pools, allocators and settings of one runtime cannot disturb another's, and a crash ends one row. Nothing here
imports a library at the top, so that a process holds only what its racer needs.
"""

import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.lab.process import family_bytes
from bench.lab.rounds import Failure, attempt, median_ms
from common.child import Child, ProcessFailed
from fold.lowerings import LOWERINGS, Lowering

if TYPE_CHECKING:
    import numpy as np

    from export.compare import Answer

Open = Callable[[Path, int], "Answer"]  # (folder of the net's files, number of threads) → images to logits
RACED_ELSEWHERE: tuple[Lowering, ...] = ("concat", "shared", "shared-split")  # on OpenVINO and MNN
INT8_LOWERINGS: tuple[Lowering, ...] = ("concat", "shared", "skip")
# What every bar is stated against: a Dirac net that rebuilds its weights at each call.
REFERENCE, OURS = "PyTorch eager, Dirac net, reference form", "PyTorch eager, Dirac net, ours"
BASELINES = (REFERENCE, OURS)
NUM_GEMM = {"fp32": 1024, "int8": 2048}  # rows and columns; the size at which each is fastest here
# Read by OpenMP, MKL and OpenBLAS when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
PATIENCE_S = 180.0  # a compiler may need most of it
# Threads of the row before spin after its last call: 40 ms in ONNX Runtime 1.31, 100 ms in OpenBLAS.
SETTLE_S = 0.1


@dataclass(frozen=True)
class Race:
    """A net and what it is raced beside; fewer lowerings and rounds where a call takes seconds."""

    family: str
    depth: int
    width: float
    peers: tuple[str, ...]  # keys of PEERS in bench/nets.py
    lowerings: tuple[Lowering, ...] = LOWERINGS
    rounds: int = 5


RACES = {
    "34-2": Race("cifar", 34, 2.0, ("WRN-40-2", "RepVGG-A0 at 32x32")),
    "16-1": Race("cifar", 16, 1.0, ("WRN-16-1", "RepVGG-A0/3 at 32x32")),
    "18-0.75": Race("imagenet", 18, 0.75, ("ResNet-18", "RepVGG-A0"), lowerings=RACED_ELSEWHERE, rounds=3),
}


class Graph(NamedTuple):
    """A graph of a net; `kind` is fp32, int8 for ONNX Runtime's integer nodes, or qdq."""

    net: str
    lowering: str
    kind: str = "fp32"

    @property
    def file(self) -> str:
        return f"{self.net.replace('/', '-over-').replace(' ', '-')}-{self.kind}-{self.lowering}.onnx"


class Racer(NamedTuple):
    """One way to run one net."""

    title: str
    net: str  # whose it is: that of the race, a peer's, or "GEMM"
    precision: str
    open: Open
    graph: Graph | None = None  # that it reads


def racers_of(key: str, *, name: str) -> list[Racer]:
    """All racers of a race; `name` is that of its net."""
    race = RACES[key]
    forms = {
        REFERENCE: "reference",
        OURS: "dirac",
        "PyTorch eager, concat": "concat",
        "PyTorch eager, shared": "shared",
    }
    racers = [Racer(title, name, "fp32", partial(open_torch, race, form)) for title, form in forms.items()]
    compiled = partial(open_torch, race, "shared", is_compiled=True)
    racers.append(Racer("torch.compile, shared", name, "fp32", compiled))
    racers += [_reader("ONNX Runtime", low, name) for low in race.lowerings]
    racers += [_reader(library, low, name) for library in ("OpenVINO", "MNN") for low in RACED_ELSEWHERE]
    racers += [_reader("ONNX Runtime", low, name, "int8") for low in INT8_LOWERINGS]
    racers.append(_reader("OpenVINO", "concat", name, "int8"))
    for peer in race.peers:
        racers += [_reader(library, "concat", peer) for library in ("ONNX Runtime", "OpenVINO", "MNN")]
        racers.append(_reader("ONNX Runtime", "concat", peer, "int8"))
    return racers


def gemm_racers() -> list[Racer]:
    """Matrix products, for the limit of the machine."""
    products = [("oneDNN, packed weights", "fp32"), ("torch.mm", "fp32"), ("torch._int_mm", "int8")]
    return [
        Racer(f"{name}, {NUM_GEMM[kind]}", "GEMM", kind, partial(open_gemm, name, NUM_GEMM[kind]))
        for name, kind in products
    ]


def _reader(library: str, lowering: Lowering, net: str, precision: str = "fp32") -> Racer:
    """Reads a graph: eight bits are integer nodes for ONNX Runtime, Q/DQ pairs for others."""
    graph = Graph(net, lowering, "qdq" if precision == "int8" and library != "ONNX Runtime" else precision)
    return Racer(f"{library}, {lowering}", net, precision, partial(open_graph, library, graph.file), graph)


def open_torch(race: Race, form: str, folder: Path, num_threads: int, *, is_compiled: bool = False) -> "Answer":
    """PyTorch: `form` is reference, dirac or a lowering of the plain net. The reference form is contiguous NCHW."""
    import logging

    import torch

    from bench.nets import reference_form, seeded_net, torch_answer
    from fold.lower import lower

    # The compiler's search for CUDA warns of something that is not used here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)
    net = seeded_net(race.depth, race.width, family=race.family)
    if form == "reference":
        return torch_answer(reference_form(net.dirac), layout=torch.contiguous_format)
    return torch_answer(net.dirac if form == "dirac" else lower(net.plain, form), is_compiled=is_compiled)


def open_graph(library: str, file: str, folder: Path, num_threads: int) -> "Answer":
    """A graph in one of three libraries."""
    match library:
        case "ONNX Runtime":
            from export.runtimes.onnx_session import OnnxSession

            return OnnxSession(folder / file, providers=("CPUExecutionProvider",), num_threads=num_threads)
        case "MNN":
            from export.runtimes.mnn_module import MnnModule

            return MnnModule(folder / file, num_threads=num_threads)
    import sys

    # OpenVINO imports a package that can send reports; where it is missing, a stub of OpenVINO's own does nothing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    options = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(folder / file, "CPU", options).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0].copy()


def open_gemm(name: str, size: int, folder: Path, num_threads: int) -> "Answer":
    """A product of two matrices [size, size], whatever images come; gives zero logits."""
    import numpy as np
    import torch

    torch.set_num_threads(num_threads)
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    multiply: Callable[[], object]
    match name:
        case "torch.mm":
            multiply = partial(torch.mm, left, right, out=torch.empty(size, size))
        case "torch._int_mm":
            multiply = partial(torch._int_mm, *((20 * part).clamp(-127, 127).to(torch.int8) for part in (left, right)))
        case _:
            packed = torch.ops.mkldnn._reorder_linear_weight(right, size)
            multiply = partial(torch.ops.mkldnn._linear_pointwise, left, packed, None, "none", [], "")

    def answer(images: "np.ndarray") -> "np.ndarray":
        multiply()
        return np.zeros((1, 1), np.float32)

    return answer


# The process of a racer


class Worker:
    """The process of one runtime; it loads while the parent goes on."""

    def __init__(self, open_answer: Open, folder: Path, num_threads: int) -> None:
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads))
        self._child = Child("bench.runtimes.racers", env=environment)
        self._child.send(partial(open_answer, folder, num_threads))

    def ask(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `task` there for the runtime and `arguments`, or the `Failure` of either."""
        with suppress(ProcessFailed):  # which `wait` reports
            self._child.send((task, arguments))
        return self.wait()

    def wait(self) -> Any:
        """The next result; the first one is None if the runtime is open."""
        try:
            return pickle.loads(self._child.receive(PATIENCE_S))
        except ProcessFailed as failure:
            self._child.kill()
            return Failure(failure)

    def close(self) -> None:
        self._child.close()


def run() -> None:
    """The process: open the runtime, then do one task after another until the parent ends it."""
    connection = Connection(0)
    answer = attempt(connection.recv())
    connection.send(answer if isinstance(answer, Failure) else None)
    with suppress(EOFError):  # the parent is gone
        while not isinstance(answer, Failure):
            task, arguments = connection.recv()
            connection.send(attempt(partial(task, answer, *arguments)))


def median_call_ms(answer: "Answer", images: "np.ndarray", seconds: float) -> float:
    """A task: the median milliseconds of a call, over `seconds` and one call at least, after a pause."""
    time.sleep(SETTLE_S)
    return median_ms(partial(answer, images), seconds, min_calls=1)


def peak_bytes(answer: "Answer") -> int | None:
    """A task: the most memory of the process and of those it started; None where the system does not tell."""
    # getrusage would count what the parent held when it started the process.
    return family_bytes() if Path("/proc/self/status").exists() else None
