"""Requests that cost a server much more than their sender: small files of many pixels, scans, chunks and values."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def scans_jpeg(side: int, num_scans: int) -> bytes:
    """A grey progressive JPEG of few bytes whose last scan comes again and again; each decodes every block anew."""
    file = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + num_scans * scan + file[-2:]


def chunks_png(num_chunks: int) -> bytes:
    """A PNG of one pixel behind chunks of a kind that nobody knows."""
    file = encode(Image.new("L", (1, 1)), "PNG")
    empty = bytes(4) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return file[:33] + num_chunks * empty + file[33:]


def flat_png(side: int, mode: str) -> bytes:
    """A PNG of one colour: a thousandth of its pixels' bytes."""
    if mode == "I;16":
        return encode(Image.fromarray(np.full((side, side), 4711, np.uint16)), "PNG")
    return encode(Image.new(mode, (side, side)), "PNG")


def noise_webp(side: int) -> bytes:
    """A WebP of noise, which takes longest to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "WEBP", quality=50, method=0)


def empty_lists(num_bytes: int) -> bytes:
    """JSON for POST /predict: a list of empty lists."""
    return b'{"images":[%b[]]}' % (b"[]," * (num_bytes // 3))


def nested_tensor(num_bytes: int) -> bytes:
    """JSON for /v2: pixels, each in a list of its own."""
    head = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[64,28,28,1],"data":['
    return head + b"[[[0]]]," * (num_bytes // 8) + b"[[[0]]]]}]}"


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file of that format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
