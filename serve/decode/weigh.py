"""The most that decoding an image can cost, by its header and the structure of its file, before it is decoded.

A file that takes much longer to decode than its pixels explain is refused: too many scans, chunks or segments.
"""

import re
import struct
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from common.image import DETAIL, TooManyPixels, refuse_too_many_pixels
from common.refusal import Refusal
from common.spec import ImageSpec

MAX_SCANS = 100  # of a JPEG; encoders write 10. Each costs a 64-megapixel one 36 ms, and 95 bytes of the file
MAX_SEGMENTS = 1000  # of a JPEG, before its pixels; a profile of 16 MB has 250
MAX_CHUNKS, CHUNK_BYTES = 256, 1024  # of a PNG: so many, and one more for so many bytes; libpng's have 8,192
MAX_RLE_PIXELS = 4_000_000  # of a BMP whose runs Pillow expands in Python, byte by byte
MAX_AVIF_SIZES = 64  # of the image, its transparency and its tiles, which share one
_AVIF_SIZE = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)
_TEXT_BYTES = 2**20  # what Pillow inflates of one compressed text or profile
_BAND_BYTES = 20 * 2**20  # for conversions in common/image.py, which take as much for each of 2^20 pixels at once
_PNG = b"\x89PNG\r\n\x1a\n"
_FEW_BYTES = 4096  # a shorter file cannot be out of proportion
_ODD_CHUNKS = (b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf", b"tRNS")
_CHUNK = struct.Struct(">I4s")


class Weight(NamedTuple):
    """Size of an image, memory to decode it, and roughly the seconds on one core, which decide its turn."""

    width: int
    height: int
    num_bytes: int
    seconds: float


LIGHT = Weight(0, 0, 8 * 2**20, 0.02)  # the most that a thread of this process decodes; heavier images go to a process
NO_WEIGHT = Weight(0, 0, 0, 0.0)  # not an image, or a damaged header: the decoder refuses it


def is_light(weight: Weight) -> bool:
    """Whether an image may be decoded in a thread of this process."""
    return weight.num_bytes <= LIGHT.num_bytes and weight.seconds <= LIGHT.seconds


def weigh(content: bytes, spec: ImageSpec, *, max_pixels: int, max_bytes: int) -> Weight:
    """The weight of an image that becomes the input of a model.

    Raises `TooManyPixels` above either limit, `Refusal` where the structure is out of proportion.
    """
    try:
        weight = _weigh(content, spec)
    except (struct.error, IndexError, ValueError):
        return NO_WEIGHT
    width, height, num_bytes, _ = weight
    refuse_too_many_pixels(width, height, max_pixels)
    if num_bytes > max_bytes:
        raise TooManyPixels(
            f"the image is {width}x{height} and takes {num_bytes / 1e6:,.0f} MB while it is decoded, over the limit of "
            f"{max_bytes / 1e6:,.0f} MB; send a smaller one, or as a JPEG that is not progressive"
        )
    return weight


def _weigh(content: bytes, spec: ImageSpec) -> Weight:
    if content.startswith(_PNG):
        if len(content) <= _FEW_BYTES:
            return _weigh_small_png(content[16:26], spec.channels)
        return _weigh_png(content[16:26], spec.channels, len(content), *_count_chunks(content))
    if content.startswith(b"\xff\xd8"):
        return _weigh_jpeg(content, spec)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _weigh_whole(content, *_size_of_webp(content), bytes_per_pixel=20, seconds=6e-8)
    if content.startswith(b"BM"):
        return _weigh_bmp(content)
    if content[4:8] == b"ftyp":
        return _weigh_avif(content)
    if content.startswith(b"GIF8"):
        return _weigh_whole(content, *struct.unpack_from("<HH", content, 6), bytes_per_pixel=12, seconds=3e-8)
    return NO_WEIGHT


def _weigh_whole(content: bytes, width: int, height: int, *, bytes_per_pixel: int, seconds: float) -> Weight:
    """An image that is decoded whole; `seconds` for each pixel and each byte of the file."""
    num_pixels = width * height
    num_bytes = bytes_per_pixel * num_pixels + 2 * len(content)
    return Weight(width, height, num_bytes, seconds * (num_pixels + len(content)))


@lru_cache
def _weigh_small_png(header: bytes, channels: int) -> Weight:
    """Without counting its chunks, in a fifth of the time: nearly every request to a small model."""
    return _weigh_png(header, channels, _FEW_BYTES, num_chunks=3, num_odd=1)


def _weigh_png(header: bytes, channels: int, file_bytes: int, num_chunks: int, num_odd: int) -> Weight:
    width, height, depth, colour = struct.unpack(">IIBB", header)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 4)
    held = 4 if samples > 1 else 2 if depth == 16 else 1  # bytes of a pixel as Pillow holds it
    is_input = (colour, channels) == (2, 3) or ((colour, channels) == (0, 1) and depth in (2, 4, 8))
    copied = 0 if is_input else 1 if channels == 1 else 4  # bytes of a pixel in the model's mode
    num_pixels = width * height
    num_bytes = held * num_pixels + 2 * file_bytes + _TEXT_BYTES * num_odd
    if copied or num_odd:
        num_bytes += max(held, copied) * num_pixels + min(20 * num_pixels, _BAND_BYTES)
    nanoseconds = (0.5 * samples * depth + 20) * num_pixels + 10 * file_bytes
    return Weight(width, height, num_bytes, 1e-9 * nanoseconds + 11e-6 * num_chunks + 3e-3 * max(0, num_odd - 1))


def _count_chunks(content: bytes) -> tuple[int, int]:
    """All chunks of a PNG, and those that are inflated, turn it or make it transparent."""
    most = MAX_CHUNKS + len(content) // CHUNK_BYTES
    position, num_chunks, num_odd = 8, 0, 0
    while position + 8 <= len(content):
        length, kind = _CHUNK.unpack_from(content, position)
        num_chunks += 1
        num_odd += kind in _ODD_CHUNKS
        if num_chunks > most:
            raise Refusal(f"the PNG has more than {most:,} chunks in {len(content):,} bytes; save it again")
        if kind == b"IEND":
            break
        position += 12 + length
    return num_chunks, num_odd


def _weigh_jpeg(content: bytes, spec: ImageSpec) -> Weight:
    marker, width, height, factors, position = _read_frame(content)
    sampling = [across * down for across, down in factors]  # of each component
    is_buffered = marker & 3 == 2 or content[position + 4] < len(sampling)  # all coefficients are kept
    num_scans = content.count(b"\xff\xda", position) if is_buffered else 0  # otherwise only one is read
    if num_scans > MAX_SCANS:
        raise Refusal(f"the JPEG has {num_scans:,} scans, and {MAX_SCANS} are accepted; save it again")
    largest = max(across for across, _ in factors) * max(down for _, down in factors)
    block = 8 * largest
    num_pixels = -(-width // block) * -(-height // block) * block * block
    num_samples = num_pixels * sum(sampling) / largest
    reduction = min(width, height) // (DETAIL * (spec.resize or max(spec.width, spec.height)))
    scale = next((scale for scale in (8, 4, 2) if reduction >= scale), 1)
    num_kept = num_pixels / scale**2
    held = 1 if len(sampling) == 1 else 4
    per_pixel = 2 * held + (0 if held == (1 if spec.channels == 1 else 4) else 4)
    num_bytes = per_pixel * num_kept + 2 * len(content) + (2 * num_samples if is_buffered else 0)
    nanoseconds = (4 / scale + 0.6 * num_scans) * num_samples + 30 * len(content) + 5 * num_kept
    return Weight(width, height, int(num_bytes), 1e-9 * nanoseconds)


def _read_frame(content: bytes) -> tuple[int, int, int, list[tuple[int, int]], int]:
    """Marker and size of the image, the sampling factors of its components, and where its first scan begins."""
    position, frame = 2, None
    for _ in range(MAX_SEGMENTS):
        marker, length = struct.unpack_from(">HH", content, position)
        if marker == 0xFFDA and frame:
            return *frame, position
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width, num_components = struct.unpack_from(">HHB", content, position + 5)
            factors = [content[position + 11 + 3 * index] for index in range(num_components)]
            frame = marker, width, height, [(max(1, factor >> 4), max(1, factor & 15)) for factor in factors]
        is_bare = marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD9
        position += 1 if marker < 0xFFC0 or marker == 0xFFFF else 2 if is_bare else 2 + length
    raise Refusal(f"the JPEG has more than {MAX_SEGMENTS:,} segments before its pixels; save it again")


def _size_of_webp(content: bytes) -> tuple[int, int]:
    match content[12:16]:
        case b"VP8X":
            width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", content, 21)
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case _:
            width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", content, 26))
    return width, height


def _weigh_avif(content: bytes) -> Weight:
    """Never light: its coded stream has a size of its own, which only a process's memory limit can bound."""
    sizes = [struct.unpack(">II", match[1]) for match in islice(_AVIF_SIZE.finditer(content), MAX_AVIF_SIZES + 1)]
    if len(sizes) > MAX_AVIF_SIZES:
        raise Refusal(f"the AVIF has more than {MAX_AVIF_SIZES} sizes of its parts; save it again")
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    num_pixels = width * height
    num_bytes = LIGHT.num_bytes + 20 * num_pixels + 2 * len(content)
    return Weight(width, height, num_bytes, 2 * LIGHT.seconds + 4e-8 * num_pixels)


def _weigh_bmp(content: bytes) -> Weight:
    (header,) = struct.unpack_from("<I", content, 14)
    width, height = map(abs, struct.unpack_from("<HH" if header == 12 else "<ii", content, 18))
    num_pixels = width * height
    compression = 0 if header == 12 else struct.unpack_from("<I", content, 30)[0]
    if compression not in (1, 2):
        num_bytes = 8 * num_pixels + min(20 * num_pixels, _BAND_BYTES) + 2 * len(content)
        return Weight(width, height, num_bytes, 1e-8 * num_pixels)
    if num_pixels > MAX_RLE_PIXELS:
        detail = f"the BMP is compressed and has {num_pixels:,} pixels, and {MAX_RLE_PIXELS:,} are accepted; send a PNG"
        raise Refusal(detail)
    weight = _weigh_whole(content, width, height, bytes_per_pixel=12, seconds=5e-7)
    return weight._replace(num_bytes=weight.num_bytes + LIGHT.num_bytes)
