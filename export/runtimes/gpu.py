"""The few calls of the CUDA runtime that engines need, through NVIDIA's own bindings."""

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from common.refusal import Refusal

cudart: Any = None  # NVIDIA's bindings, where they are installed
with suppress(ImportError):
    import cuda.bindings.runtime as cudart


def num_devices() -> int:
    """CUDA devices of this machine; 0 without a driver or the bindings."""
    if cudart is None:
        return 0
    error, count = cudart.cudaGetDeviceCount()
    return count if error == cudart.cudaError_t.cudaSuccess else 0


def use(device: int) -> None:
    """Make `device` the current one of this thread."""
    call(cudart.cudaSetDevice(device))


def compute_capability() -> str:
    """Of the current device: "8.9"."""
    device = call(cudart.cudaGetDevice())
    major = call(cudart.cudaDeviceGetAttribute(cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, device))
    minor = call(cudart.cudaDeviceGetAttribute(cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor, device))
    return f"{major}.{minor}"


def device_name() -> str:
    """The model of the current device: "NVIDIA A10"."""
    name = call(cudart.cudaGetDeviceProperties(call(cudart.cudaGetDevice()))).name
    return name.split(b"\0")[0].decode()


def call(result: tuple) -> Any:
    """The value of a CUDA call, given as (error, value...); refuses if it failed."""
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(error)
        raise Refusal(f"CUDA: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if values else None


class Buffer:
    """Memory on the device and, page-locked, its mirror on the host; freed with the last reference to it."""

    def __init__(self, num_bytes: int) -> None:
        self._host = host = call(cudart.cudaHostAlloc(num_bytes, cudart.cudaHostAllocDefault))
        when_gone(self, lambda: call(cudart.cudaFreeHost(host)))
        self.device = allocate(self, num_bytes)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(int(self._host)))

    def upload(self, array: np.ndarray, stream: Any) -> None:
        """Copy `array` to the device, after all work on the stream."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        call(cudart.cudaMemcpyAsync(self.device, self._host, array.nbytes, kind, stream))

    def download(self, shape: tuple[int, ...], dtype: np.dtype, stream: Any) -> np.ndarray:
        """Wait for the stream, and copy the device's memory."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(cudart.cudaMemcpyAsync(self._host, self.device, num_bytes, kind, stream))
        call(cudart.cudaStreamSynchronize(stream))
        return self._bytes[:num_bytes].copy().view(dtype).reshape(shape)


def allocate(owner: object, num_bytes: int) -> int:
    """The address of memory on the device, which is freed with the last reference to `owner`."""
    address = call(cudart.cudaMalloc(num_bytes))
    when_gone(owner, lambda: call(cudart.cudaFree(address)))
    return int(address)


def when_gone(owner: object, release: Callable[..., None], *arguments: Any) -> None:
    """Call `release` when `owner` is no longer referred to; the end of the process frees everything anyway."""
    weakref.finalize(owner, release, *arguments).atexit = False


def release(stream: Any, graphs: dict[int, Any]) -> None:
    """Destroy a stream on which nothing runs, and the graphs that ran on it."""
    for graph in filter(None, graphs.values()):
        call(cudart.cudaGraphExecDestroy(graph))
    call(cudart.cudaStreamDestroy(stream))


def capture(stream: Any, work: Callable[[], None]) -> Any:
    """The work that `work` puts on the stream as an executable CUDA graph, or None if it cannot be captured.

    Anything that must run at once, such as an allocation, breaks a capture; `work` may then raise RuntimeError, and
    none of it has run.
    """
    call(cudart.cudaStreamSynchronize(stream))
    call(cudart.cudaStreamBeginCapture(stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    try:
        work()
        is_whole = True
    except RuntimeError:
        is_whole = False
    error, graph = cudart.cudaStreamEndCapture(stream)  # ends the capture even where it reports that it is broken
    if not is_whole or error != cudart.cudaError_t.cudaSuccess:
        cudart.cudaGetLastError()  # or the next call would report it
        return None
    executable = call(cudart.cudaGraphInstantiate(graph, 0))
    call(cudart.cudaGraphDestroy(graph))
    return executable


def launch(graph: Any, stream: Any) -> None:
    """Run a captured graph, after all work on the stream."""
    call(cudart.cudaGraphLaunch(graph, stream))
