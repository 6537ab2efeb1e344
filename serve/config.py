"""The settings of a server: the command line of serve/run.py."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.cli import POSITIONAL
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags

if TYPE_CHECKING:
    from export.runtimes.load import RuntimeName

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist.onnx"
BUNDLED_FORMS = (BUNDLED, BUNDLED.with_stem("fashion-mnist-int8"))


@dataclass(frozen=True)
class ServeConfig(ReadingFlags):
    """Which model is served, where, to whom, and within which limits."""

    models: Annotated[
        tuple[Path, ...],
        "plain.onnx or plain.engine; of several .onnx of one net the fastest serves (default: the two in models/)",
        POSITIONAL,
    ] = ()
    runtime: Annotated[
        Literal["auto", "onnxruntime", "mnn", "tensorrt", "torch"],
        "what runs the model; auto: the fastest here except torch, measured in about a second, kept beside the model",
    ] = "auto"
    cascade: Annotated[
        bool, "serve an fp32 and an int8 .onnx together: int8 answers, and fp32 the images that int8 leaves in doubt"
    ] = False
    host: Annotated[str, "address to listen on; 0.0.0.0 is all of this machine's"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 lets the system choose"] = 8000
    grpc_port: Annotated[int | None, "port for gRPC; 0 lets the system choose (default: HTTP only)"] = None
    api_key_file: Annotated[Path | None, "file with the key that clients must send; or set DIRACNET_API_KEY"] = None
    cors_origin: Annotated[tuple[str, ...], "origins whose web pages may send requests, like https://example.org"] = ()
    max_batch: Annotated[int, "images that the model computes at once"] = 32
    max_images: Annotated[int, "images in one request"] = 64
    max_body_mb: Annotated[float, "megabytes in one request"] = 20.0
    max_held_mb: Annotated[float, "megabytes of all requests that are not answered yet"] = 128.0
    max_decoded_mb: Annotated[float, "megabytes that all decoders may take at once, by the headers of images"] = 384.0
    max_queue: Annotated[int, "images accepted and not answered yet; more are refused, with Retry-After"] = 1024
    max_connections: Annotated[int, "connections that may be open at once, for each process that accepts them"] = 2048
    deadline_ms: Annotated[int, "milliseconds from a request's start to its answer"] = 30_000
    drain_seconds: Annotated[int, "how long SIGTERM waits for requests under way"] = 20
    reload_seconds: Annotated[int, "how long a reloaded model may take until it answers"] = 60
    probe_every: Annotated[
        float, "seconds between two checks that the model still answers its probe images as its file says; 0 for never"
    ] = 60.0
    workers: Annotated[int, "processes that share the port; one that ends is replaced"] = 1
    front_ends: Annotated[
        int, "processes that read, decode and answer for one that runs the model, with batches of all that they have"
    ] = 1
    devices: Annotated[tuple[int, ...], "CUDA devices, one copy of the model on each (default: the first)"] = ()
    model_threads: Annotated[int | None, "threads of one model on the CPU (default: a core each)"] = None
    decode_threads: Annotated[
        int | None, "threads that decode images; 0: the model's thread does (default: spare cores, at most 4)"
    ] = None
    shadow: Annotated[Path | None, "a second model, which answers a share of the images too, but no clients"] = None
    shadow_share: Annotated[float, "share of the images that the shadow answers"] = 0.1
    shadow_images: Annotated[int, "images to compare before POST /admin/promote lets the shadow serve"] = 1000
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], "lowest level on stderr; info has a line for each request"
    ] = "info"

    def __post_init__(self) -> None:
        for name in ("workers", "front_ends", "model_threads", "drain_seconds", "reload_seconds", "shadow_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.cascade and self.runtime not in ("auto", "onnxruntime"):
            raise Refusal(f"--cascade relies on measurements in ONNX Runtime; leave out --runtime {self.runtime}")
        if self.cascade and self.shadow:
            raise Refusal("--shadow compares two files and --cascade serves two as one; leave out one of them")
        if not math.isfinite(self.max_body_mb + self.max_held_mb + self.max_decoded_mb):
            raise Refusal("--max-body-mb, --max-held-mb and --max-decoded-mb must be finite numbers")
        if not 0 < self.shadow_share <= 1:
            raise Refusal(f"--shadow-share must be above 0 and at most 1, got {self.shadow_share:g}")
        if self.front_ends > 1:
            self._refuse_unfit_front_ends()

    def _refuse_unfit_front_ends(self) -> None:
        if sys.platform != "linux":
            raise Refusal("--front-ends needs the shared memory of Linux; use --workers")
        if self.workers > 1:
            raise Refusal("--workers each have a model and --front-ends share one; choose one of the two")
        if self.shadow:
            raise Refusal("--shadow needs a process that has the model; use it with --workers")
        if self.front_ends < len(self.devices):
            raise Refusal(f"{len(self.devices)} devices need at least as many --front-ends, got {self.front_ends}")

    @property
    def model_paths(self) -> tuple[Path, ...]:
        return self.models or BUNDLED_FORMS

    @property
    def grpc_address(self) -> str | None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return None if self.grpc_port is None else f"{host}:{self.grpc_port}"

    @property
    def runtime_name(self) -> "RuntimeName | None":
        return None if self.runtime == "auto" else self.runtime
