"""MNN: an .onnx file of this project in float32 made callable on the CPU, with convolutions by Winograd's method.

A batch is divided among processes that run MNN, one thread each. MNN holds Python's global lock while it computes, and
its own threads share every layer's activations. Processes share nothing and leave the caller's other threads running,
and a crash ends one call instead of the server.
"""

import importlib.metadata
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from importlib.util import find_spec
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.child import Child, ProcessFailed
from common.environment import num_cores
from common.files import read_whole, sha256
from common.refusal import Refusal
from common.spec import Spec
from export.model_file.onnx_reader import Header, read_header
from export.runtimes.runtime import Model

_CONVERT_S = _START_S = 60.0  # far beyond any conversion or start
# The converter is run in a process of its own: some damaged graphs end it with a segmentation fault. It is
# the bare extension module, because the package around it, MNN.tools, installs another one from the network.
_CONVERT = """
import sys, _tools
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", sys.argv[1], "--MNNModel", sys.argv[2],
                   "--bizCode", "diracnet"])
"""


class MnnModule:
    """MNN in one process per thread; the rest as in `Runtime`.

    Several threads may call it, one after another. A call in which a process fails raises `ProcessFailed`, and the
    next one starts all of them anew. They end with the last reference to the module, or with this process, even if it
    is killed.
    """

    platform = "mnn"

    def __init__(self, path: Path, *, num_threads: int = 0) -> None:
        if not is_installed():
            raise Refusal("MNN is not installed here: pip install '.[mnn]', or use --runtime onnxruntime")
        content = read_whole(path)
        header = read_header(path, content)
        if reason := why_not(header):
            raise Refusal(f"{path} {reason}; use --runtime onnxruntime")
        spec = Spec.from_json(header.metadata["spec"])
        self.model = Model(spec.name, sha256(content), spec, header.provenance, num_bytes=len(content))
        self._num_workers = num_threads or num_cores()
        self.description = f"MNN, {self._num_workers} process{'es' if self._num_workers > 1 else ''}"
        self.library = f"MNN {importlib.metadata.version('MNN')}"
        self._workers: list[Child] = []
        self._turn = threading.Lock()
        self._file = _convert(path, content)
        weakref.finalize(self, _end_all, self._workers, self._file)
        try:
            self._start()
        except (ProcessFailed, OSError) as error:
            raise Refusal(f"{path} cannot be loaded by MNN: {error}; use --runtime onnxruntime") from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != (shape := self.model.spec.image.shape):
            raise ValueError(f"images must be [N, {', '.join(map(str, shape))}], got {list(images.shape)}")
        with self._turn:
            if not self._workers:
                self._start()
            parts = np.array_split(images, min(len(images), self._num_workers))
            working = self._workers[: len(parts)]
            try:
                for worker, part in zip(working, parts, strict=True):
                    worker.send(part.tobytes())
                answers = [np.frombuffer(worker.receive(), np.float32) for worker in working]
            except BaseException:  # the next call must not read this one's answer
                _end_all(self._workers)
                raise
        return np.concatenate(answers).reshape(len(images), -1)

    def _start(self) -> None:
        """All at the same time."""
        file = self._file.fileno()
        arguments = "export.runtimes.mnn_module", f"/dev/fd/{file}", *self.model.spec.image.shape
        try:
            for _ in range(self._num_workers):
                self._workers.append(Child(*arguments, name="a process of MNN", pass_fds=(file,)))
            for worker in self._workers:
                worker.receive(_START_S)  # an empty message: the model is loaded
        except BaseException:
            _end_all(self._workers)
            raise


def is_installed() -> bool:
    return find_spec("MNN") is not None


def why_not(header: Header) -> str | None:
    """Why MNN cannot run a file correctly, or None: it runs no foreign nets, float16 or eight bits here."""
    if "spec" not in header.metadata:
        return "is not a model of this project"
    precision = header.provenance.get("export", {}).get("precision", "fp32")
    if precision != "fp32" or set(header.domains) != {""}:
        return f"is {precision} with operators that MNN does not run"
    return None


def _convert(path: Path, content: bytes) -> FileIO:
    """The model in MNN's own format, as an open file whose folder is deleted."""
    try:
        with TemporaryDirectory(prefix="mnn-") as name:
            source, converted = Path(name, "plain.onnx"), Path(name, "plain.mnn")
            source.write_bytes(content)
            argv = [sys.executable, "-c", _CONVERT, source, converted]
            done = subprocess.run(argv, cwd=name, capture_output=True, timeout=_CONVERT_S)
            if done.returncode != 0 or not converted.exists():
                raise Refusal(f"{path} cannot be loaded: MNN's converter refuses it; export it again")
            return FileIO(converted)
    except subprocess.TimeoutExpired as error:
        raise Refusal(f"{path}: MNN's converter does not finish; use --runtime onnxruntime") from error
    except OSError as error:  # as in a container with read-only files
        why = f"converting it in a temporary folder fails: {error}"
        raise Refusal(f"{path} cannot be loaded by MNN: {why}; use --runtime onnxruntime") from error


def _end_all(workers: list[Child], *files: FileIO) -> None:
    while workers:
        workers.pop().close()
    for file in files:
        file.close()


def run(converted: str, *sizes: str) -> None:
    """A process of the module: MNN with one thread, which answers until the parent is gone.

    `converted` is a file in MNN's own format; exit status 1 if it is invalid. `sizes` are height, width and channels of
    an image. Descriptor 0 is a socket to the parent, which sends images uint8 [N, H, W, C] and gets logits float32
    [N, K], both as bytes in C order; an empty message at the start says that the model is loaded.
    """
    nn, expr = (importlib.import_module(f"MNN.{name}") for name in ("nn", "expr"))
    manager = nn.create_runtime_manager(({"backend": 0, "numThread": 1, "precision": "high"},))
    try:
        module = nn.load_module_from_file(converted, ["images"], ["logits"], runtime_manager=manager)
    except SystemError:  # for every invalid file
        sys.exit(1)
    connection, shape = Connection(0), (-1, *map(int, sizes))
    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            images = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(shape)
            # Called NCHW although channels are last: MNN would transpose NHWC, which the graph does itself.
            (logits,) = module.forward([expr.const(images, list(images.shape), expr.NCHW, expr.dtype.uint8)])
            connection.send_bytes(logits.read())
