"""What the machine that trains can do."""

import ctypes
from contextlib import suppress

import torch

from common.refusal import Refusal


def choose_device(choice: str) -> str:
    """ "cuda" or "cpu"; refuses a GPU that is not there."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


def choose_precision(choice: str, device: str) -> str:
    """ "fp32", "bf16" or "fp16": "auto" is bf16 where `device` has instructions for it."""
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
