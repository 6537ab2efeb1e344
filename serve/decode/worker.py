"""One process of serve/decode/process.py: decodes images one after another, within the memory and time of each.

Descriptor 0 is a socket to the parent. It sends how an image is decoded and then its bytes, and gets one letter and the
pixels in C order, or why there are none; no bytes at the start say that the process is ready. It ends when the parent's
end closes. An image that breaks out of its decoder is not in the process that holds keys and connections.
"""

import os
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from common.image import TooManyPixels, decode
from common.refusal import Refusal
from common.spec import ImageSpec

PIXELS, REFUSED, TOO_MANY = b"p", b"r", b"t"  # the first byte of an answer
_NICE = 5  # where cores are short, light images and the model come first
_SPARE_BYTES = 48 * 2**20  # for what no header says: blocks of allocators, libraries that load late


def run() -> None:
    """Answer until the parent is gone."""
    os.nice(_NICE)
    Image.init()
    if avif := sys.modules.get("PIL.AvifImagePlugin"):
        vars(avif)["DEFAULT_MAX_THREADS"] = 1  # each more takes address space that no header tells
    connection = Connection(0)
    with suppress(EOFError, OSError):
        connection.send_bytes(b"")
        while True:
            spec, max_pixels, num_bytes, limit_s = connection.recv()
            content = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, limit_s)  # of processor time; SIGPROF ends the process
            answer = _answer(content, spec, max_pixels, num_bytes)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(answer)
            del content, answer


def _answer(content: bytes, spec: ImageSpec, max_pixels: int, num_bytes: int) -> bytes:
    _allow(num_bytes)
    try:
        return PIXELS + decode(content, spec, max_pixels=max_pixels).tobytes()
    except TooManyPixels as refusal:
        return TOO_MANY + str(refusal).encode()
    except Refusal as refusal:
        if isinstance(refusal.__cause__, MemoryError):
            return TOO_MANY + b"the image takes more memory than its header says; save it again"
        return REFUSED + str(refusal).encode()
    finally:
        _allow(None)


def _allow(num_bytes: int | None) -> None:
    """Limit memory to `num_bytes` beyond what the process has now; no limit for None, or without /proc."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft, held = hard, Path("/proc/self/statm")
    if num_bytes is not None and held.exists():
        soft = int(held.read_text().split()[0]) * resource.getpagesize() + num_bytes + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
