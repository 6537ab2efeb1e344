"""The machine that trains: its processes, device and precision, and whether a training fits into its memory."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from common.refusal import Refusal
from common.spec import Spec
from train.config import Settings
from train.families import outline

# Measured on the CPU over seven nets from DiracNet-16-1 at 32 pixels to DiracNet-18-0.75 at 224, right to a third:
# bytes that a step holds for each number of the layers' outputs, and for each weight.
OUTPUT_BYTES = {"fp32": 5.2, "bf16": 3.0, "fp16": 3.0}
WEIGHT_BYTES = 32  # itself, gradient, momentum, and what eq. 4 and 5 keep for the way back
LARGE = 96  # pixels, from which a net that keeps the stem's resolution is the wrong one


@dataclass(frozen=True)
class World:
    """This process among those that share each batch."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def wrap(self, net: nn.Module, *, sync_batch_norm: bool = False) -> nn.Module:
        """`net` with gradients averaged over all processes; batch statistics stay each process's own.

        With `sync_batch_norm` they are those of the whole batch: the layers of `net` change for it, and keep
        their parameters.
        """
        if self.size == 1:
            return net
        if sync_batch_norm:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return DistributedDataParallel(net, device_ids=[self.device] if self.device != "cpu" else None)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        total = numbers.clone()
        if self.size > 1:
            distributed.all_reduce(total)
        return total

    def count(self, number: int) -> int:
        """The sum over all processes of a number on the host: all learn it at the same step.

        It goes from host to host, so that no process waits for what its device has still to do.
        """
        return int(self.sum(torch.tensor(number))) if self.size > 1 else number

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.count(int(flag)) > 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, on "cpu" (gloo) or "cuda" (NCCL, one device each).

    With devices, numbers on the host go by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise Refusal(f"--nproc-per-node is over the {torch.cuda.device_count()} CUDA devices of this machine")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()


def choose_device(choice: str) -> str:
    """ "cuda" or "cpu"; refuses a GPU that is missing."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


def choose_precision(choice: str, device: str) -> str:
    """ "fp32", "bf16" or "fp16": "auto" is bf16 if `device` has instructions for it."""
    if choice != "auto":
        if choice == "fp16" and device == "cpu":
            raise Refusal("--precision fp16 needs a CUDA device; the CPU trains in fp32 or bf16")
        return choice
    if device == "cpu":
        can = torch.cpu.get_capabilities()
        return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def forbid_tf32() -> None:
    """Let float32 be float32: by default cuDNN rounds what a convolution multiplies to 10 bits of mantissa."""
    torch.backends.cudnn.allow_tf32 = False


def keep_large_buffers() -> None:
    """Let glibc keep freed activations for the next step rather than return them to the system.

    Training on two CPU cores is 1.4 times faster for it; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        mallopt(ctypes.c_int(-1), ctypes.c_int(1 << 30))  # M_TRIM_THRESHOLD


def refuse_what_does_not_fit(config: Settings, spec: Spec, world: World, *, available: int | None) -> str:
    """A clause about the memory that a step takes, with advice; refuses more than is `available`."""
    share = config.batch_size // world.size
    on_this_machine = world.size if world.device == "cpu" else 1
    need = on_this_machine * training_bytes(spec, share, config.precision)
    if available is not None and need > available:
        raise Refusal(
            f"{spec.name} needs about {_gb(need)} to train on {config.batch_size} images of {_size(spec)} at once, and "
            f"{_gb(available)} are free: lower --batch-size{_advice(spec, share, config.precision)}"
        )
    return f"about {_gb(need)} of memory{_advice(spec, share, config.precision)}"


def training_bytes(spec: Spec, batch_size: int, precision: str) -> int:
    """Memory that a training step of one process holds at once."""
    net, num_outputs = outline(spec).eval(), 0  # in training, an output of one pixel for one image is refused

    def add(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal num_outputs
        num_outputs += output.numel()

    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(add)
    with torch.no_grad(), torch.device("meta"):
        net(torch.empty(1, *spec.image.shape, dtype=torch.uint8))
    num_weights = sum(parameter.numel() for parameter in net.parameters())
    return round(WEIGHT_BYTES * num_weights + OUTPUT_BYTES[precision] * batch_size * num_outputs)


def available_bytes(device: str) -> int | None:
    """Free memory of a device, within the limit of this container; None if the system does not report it."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def _advice(spec: Spec, batch_size: int, precision: str) -> str:
    if spec.family not in ("cifar", "pooled") or min(spec.image.height, spec.image.width) < LARGE:
        return ""
    suited = replace(spec, family="imagenet", depth=18, width=0.5, nonlinearity="ncrelu", parameterization="dirac")
    need = training_bytes(suited, batch_size, precision)
    return (
        f"; for {_size(spec)} pixels take --family imagenet --depth 18 --width 0.5, about {_gb(need)}, "
        "which is made for such sizes"
    )


def _size(spec: Spec) -> str:
    return f"{spec.image.height}x{spec.image.width}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{max(1, num_bytes / 1e6):.0f} MB"
