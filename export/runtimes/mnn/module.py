"""MNN: an .onnx file of ours in float32 made callable on the CPU, with convolutions by Winograd's method."""

import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.cores import num_cores
from common.files import read_whole, sha256
from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from export.model_file.onnx_reader import Header, read_header
from export.runtimes.mnn.pool import MnnPool, WorkerFailed
from export.runtimes.runtime import Model

_CONVERT_S = 60.0  # far beyond any conversion
# The converter is run in a process of its own: some damaged graphs end it with a segmentation fault. It is
# the bare extension module, because the package around it, MNN.tools, installs another one from the network.
_CONVERT = """
import sys, _tools
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", sys.argv[1], "--MNNModel", sys.argv[2],
                   "--bizCode", "diracnet"])
"""


class MnnModule:
    """MNN in one process per thread; the rest as in `Runtime`."""

    platform = "mnn"

    def __init__(self, path: Path, *, num_threads: int = 0) -> None:
        if not is_installed():
            raise Refusal("MNN is not installed here: pip install '.[mnn]', or use --runtime onnxruntime")
        content = read_whole(path)
        header = read_header(path, content)
        if reason := why_not(header):
            raise Refusal(f"{path} {reason}; use --runtime onnxruntime")
        spec = Spec.from_json(header.metadata["spec"])
        num_workers = num_threads or num_cores()
        self._pool = _start(path, content, spec.image, num_workers)
        self.model = Model(spec.name, sha256(content), spec, header.provenance, num_bytes=len(content))
        self.description = f"MNN, {num_workers} process{'es' if num_workers > 1 else ''}"
        self.library = f"MNN {version()}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._pool(images)


def is_installed() -> bool:
    return find_spec("MNN") is not None


def version() -> str:
    return importlib.metadata.version("MNN")


def why_not(header: Header) -> str | None:
    """Why MNN cannot run a file correctly, or None: it runs no foreign nets, float16 or eight bits here."""
    if "spec" not in header.metadata:
        return "is not a model of this project"
    precision = header.provenance.get("export", {}).get("precision", "fp32")
    if precision != "fp32" or set(header.domains) != {""}:
        return f"is {precision} with operators that MNN does not run"
    return None


def _start(path: Path, content: bytes, image: ImageSpec, num_workers: int) -> MnnPool:
    sizes = (image.height, image.width, image.channels)
    try:
        folder = TemporaryDirectory(prefix="mnn-")
    except OSError as error:  # as in a container with read-only files
        reason = error.strerror or error
        raise Refusal(f"{path}: MNN converts it in a temporary folder, and cannot create one: {reason}") from error
    with folder as name:
        try:
            return MnnPool(_convert(path, content, Path(name)), sizes, num_workers=num_workers)
        except (WorkerFailed, OSError) as error:
            raise Refusal(f"{path} cannot be loaded by MNN: {error}; use --runtime onnxruntime") from error


def _convert(path: Path, content: bytes, folder: Path) -> Path:
    """The model in MNN's own format, in `folder`, where the converter also leaves other files."""
    source, converted = folder / "plain.onnx", folder / "plain.mnn"
    source.write_bytes(content)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT, source, converted], cwd=folder, capture_output=True, timeout=_CONVERT_S
        )
    except subprocess.TimeoutExpired as error:
        raise Refusal(f"{path}: MNN's converter does not finish; use --runtime onnxruntime") from error
    if done.returncode != 0 or not converted.exists():
        raise Refusal(f"{path} cannot be loaded: MNN's converter refuses it; export it again")
    return converted
