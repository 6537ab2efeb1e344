"""PyTorch: an .onnx file of ours on a GPU as CUDA graphs, one for each batch size, where there is no TensorRT.

export/runtimes/load.py imports it where it is chosen by name: it needs torch, and the rest of serving does not.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import read_whole, sha256
from common.refusal import Refusal
from export.model_file.onnx_reader import read_header
from export.runtimes import gpu
from export.runtimes.runtime import Model, answer_in_pieces, next_power_of_two
from export.runtimes.torch_net import TorchNet, read_net
from train.machine import forbid_tf32

LARGEST = 256  # images in one graph; more are cut in pieces
NUM_WARM_UPS = 3  # before a capture, as PyTorch's own make_graphed_callables has it
_CAPTURING = threading.Lock()  # PyTorch can do one at a time in a process
# Streams of models that are gone, by device. PyTorch keeps scratch memory for every stream, which would grow with each
# reload.
_IDLE: dict[int, list[torch.cuda.Stream]] = defaultdict(list)


class TorchGraphs:
    """The net of a file in the precision that the file has; `model` and `description` as in `Runtime`.

    Without a GPU, if `device` is None, the same net runs on the CPU without graphs: for trying it, not for speed.
    """

    platform = "pytorch_onnx"

    def __init__(self, path: Path, *, device: int | None = None) -> None:
        content = read_whole(path)
        header = read_header(path, content)
        if header.spec is None:
            raise Refusal(f"{path} is not a model of this project; use --runtime onnxruntime")
        if device is not None and device >= torch.cuda.device_count():
            raise Refusal(f"PyTorch finds no CUDA device {device} here; leave the device out to use the CPU")
        net = read_net(path, content)
        self.model = Model(header.spec.name, sha256(content), header.spec, header.provenance, num_bytes=len(content))
        self.library = f"torch {torch.__version__}"
        if device is None and not torch.cuda.is_available():
            self._answer, self.description = partial(_answer_on_cpu, net), f"PyTorch on the CPU, {net.precision}"
        else:
            self._answer, self.description = Graphs(net, device or 0), f"PyTorch, CUDA graphs, {net.precision}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._answer(images)


@torch.no_grad()
def _answer_on_cpu(net: TorchNet, images: np.ndarray) -> np.ndarray:
    return net(torch.tensor(images)).numpy()


@dataclass(frozen=True)
class Batch:
    """All that batches of one size need: a graph reads and writes where it did when it was captured."""

    pixels: Tensor  # page-locked, on the host
    images: Tensor  # the same on the device
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # on the device
    answers: Tensor  # page-locked, on the host


class Graphs:
    """A net on one stream of a device. Batches are padded to the next power of two, which has a graph of its own.

    All graphs share one memory for what lies between images and logits: they run one after another. Its memory on
    the device returns to PyTorch with the last reference to it.
    """

    def __init__(self, net: TorchNet, device: int) -> None:
        forbid_tf32()
        torch.backends.cudnn.benchmark = True  # the fastest kernels for each size, found before it is captured
        self._place = _place(device)
        self._stream = _IDLE[device].pop() if _IDLE[device] else torch.cuda.Stream(device)
        gpu.when_gone(self, _IDLE[device].append, self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._batches: dict[int, Batch] = {}
        with torch.cuda.stream(self._stream):
            self._net = net.to(self._place)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return answer_in_pieces(self._run, images, LARGEST, next_power_of_two)

    def _run(self, images: np.ndarray) -> np.ndarray:
        if len(images) not in self._batches:
            self._batches[len(images)] = self._capture(images.shape)
        batch = self._batches[len(images)]
        np.copyto(batch.pixels.numpy(), images)
        with torch.cuda.stream(self._stream):
            batch.images.copy_(batch.pixels, non_blocking=True)
            batch.graph.replay()
            batch.answers.copy_(batch.logits, non_blocking=True)
        self._stream.synchronize()
        return batch.answers.numpy().copy()

    @torch.no_grad()
    def _capture(self, shape: tuple[int, ...]) -> Batch:
        """A graph of the net for images of `shape`.

        A capture may neither wait nor have cuDNN try its kernels: the first runs, which do both, are not captured.
        In other threads another model may go on meanwhile.
        """
        with _CAPTURING, torch.cuda.stream(self._stream):
            images = torch.zeros(shape, dtype=torch.uint8, device=self._place)
            for _ in range(NUM_WARM_UPS):
                self._net(images)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = self._net(images)
        return Batch(_pinned(shape, torch.uint8), images, graph, logits, _pinned(logits.shape, logits.dtype))


def _place(device: int) -> torch.device:
    return torch.device("cuda", device)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-locked memory, which the device reads and writes by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
