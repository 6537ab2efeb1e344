"""From an image file to the pixels that the spec asks for: the same function for training and serving."""

import io
import math
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps

from common.refusal import Refusal
from common.spec import ImageSpec

_WITH_AVIF = find_spec("PIL._avif") is not None  # Pillow was built with it
# Not TIFF: its library decodes whole tiles whatever the image's size (8x8 pixels in 783 KB took 768 MB and 4 s),
# returns damaged pixels without an error, and writes to stderr.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", *(("AVIF",) if _WITH_AVIF else ()))
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", *((".avif",) if _WITH_AVIF else ()))
_HEADS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WebP", b"BM": "BMP", b"GIF8": "GIF"}
# The first bytes of formats that are refused by name.
_OTHERS = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\x01\0": "ICO", b"%PDF": "PDF", b"<svg": "SVG"}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}  # follow "ftyp"
# A 50-megapixel photograph passes; anything larger is refused before its pixels are decoded.
MAX_PIXELS = 64_000_000
# Decoded pixels for each pixel of the input, along a side. Eleven detailed photographs of 12 megapixels, scaled to
# 224 pixels, differ from full decoding by 0.63 of 255 levels (rms, on average) and 6 at most, in half the time.
DETAIL = 2
_BAND_PIXELS = 2**20  # converted at once, of a large image
_MAX_GIF_BLOCKS = 10_000  # of comments and the like before a GIF's first frame; 2.5 MB of them
_PNG_END = bytes(4) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit differs from MAX_PIXELS, and its error names no size


class TooManyPixels(Refusal):
    """The header announces more pixels than the limit."""


def decode(
    content: bytes,
    spec: ImageSpec,
    *,
    max_pixels: int = MAX_PIXELS,
    crop: Callable[[Image.Image, ImageSpec], Image.Image] | None = None,
    smallest_crop: float = 1.0,
) -> np.ndarray:
    """Bytes of an image in one of FORMATS, of any size and mode → uint8 [height, width, channels].

    Of an animation, the first frame. Resized and cropped at the centre as `spec` says, or by `crop`, which keeps
    `smallest_crop` of the area or more. A JPEG far larger than the input is decoded at a half, quarter or eighth of
    its size. Raises `TooManyPixels` before decoding, `Refusal` if the bytes are not such an image.
    """
    if crop is None and spec.width * spec.height <= max_pixels and (plain := _plain_png(content, spec)):
        return _pixels(plain, spec)
    try:
        content = _without_comments(content) if content.startswith(b"GIF8") else content
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            refuse_too_many_pixels(image.width, image.height, max_pixels)
            side = DETAIL * (spec.resize or max(spec.width, spec.height)) / math.sqrt(smallest_crop)
            image.draft(None, (math.ceil(side), math.ceil(side)))  # the smallest size to decode; only JPEG has several
            return _pixels((crop or _centre_crop)(_upright(image, spec.channels), spec), spec)
    except Refusal:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        if isinstance(error, OSError) and "truncated" in str(error):
            raise Refusal("the image is cut short: its last bytes are missing; send the whole file") from error
        kind = _OTHERS.get(content[:4]) or (_BRANDS.get(content[8:12]) if content[4:8] == b"ftyp" else None)
        if kind and kind not in FORMATS:
            raise Refusal(f"the image is {kind}, which is not decoded here; convert it to PNG or JPEG") from error
        if not content:
            raise Refusal("the file is empty") from error
        if name := kind or next((name for head, name in _HEADS.items() if content.startswith(head)), None):
            raise Refusal(f"the image is a damaged {name} file; save or download it again") from error
        raise Refusal(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error


def begins_as_an_image(content: bytes) -> bool:
    """Whether the first bytes are those of a format that `decode` reads, or refuses by its name."""
    return content.startswith((*_HEADS, *_OTHERS)) or content[4:8] == b"ftyp"


def refuse_too_many_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises `TooManyPixels` for an image of more than `max_pixels`."""
    if width * height > max_pixels:
        raise TooManyPixels(f"the image is {width}x{height}, over the limit of {max_pixels:,} pixels")


def _plain_png(content: bytes, spec: ImageSpec) -> Image.Image | None:
    """A PNG that needs no conversion: the input's size and mode, 8 bits, one IDAT chunk and nothing else.

    Takes half the time of the general path, which all other files take, damaged ones too.
    """
    head = _plain_png_head(spec)
    start, end = len(head) + 8, len(content) - len(_PNG_END) - 4
    chunk = struct.pack(">I4s", max(0, end - start), b"IDAT")
    if not head or not content.startswith(head + chunk) or not content.endswith(_PNG_END):
        return None
    mode = "L" if spec.channels == 1 else "RGB"
    try:
        return Image.frombytes(mode, (spec.width, spec.height), content[start:end], "zip", mode, 0)
    except ValueError:
        return None


@lru_cache
def _plain_png_head(spec: ImageSpec) -> bytes:
    """Signature and IHDR chunk of such a PNG; empty if `spec` resizes or crops an image of the input's size."""
    if spec.resize not in (None, min(spec.width, spec.height)):
        return b""
    fields = struct.pack(">IIBBBBB", spec.width, spec.height, 8, 0 if spec.channels == 1 else 2, 0, 0, 0)
    header = b"IHDR" + fields
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(fields)) + header + struct.pack(">I", zlib.crc32(header))


def _upright(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode in RGB or grey, turned as its EXIF tag says.

    Transparent pixels are laid on white, as viewers show them; 16-bit samples keep their upper eight bits. A large
    image is converted in bands, so that intermediate modes take the memory of one band only.
    """
    ImageOps.exif_transpose(image, in_place=True)
    mode = "L" if channels == 1 else "RGB"
    if image.width * image.height <= _BAND_PIXELS or (image.mode == mode and not image.has_transparency_data):
        return _flatten(image, mode)
    flat, rows = Image.new(mode, image.size), max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        flat.paste(_flatten(band, mode), (0, top))
    return flat


def _without_comments(content: bytes) -> bytes:
    """A GIF without the comments and profiles before its first frame; refuses a file with too many of them.

    Pillow takes 5 s to read 20 MB of one-letter comments, and blocks all other threads meanwhile.
    Raises `IndexError` if the file ends too early.
    """
    has_table, table_size = content[10] & 0x80, content[10] & 7
    end = at = 13 + (3 << (table_size + 1) if has_table else 0)
    control, num_blocks = b"", 0
    while content[at] == 0x21:  # an extension: its kind, then blocks up to one of no bytes
        start = at
        at += 2
        while content[at]:
            at += content[at] + 1
            num_blocks += 1
        at += 1
        num_blocks += 1
        if num_blocks > _MAX_GIF_BLOCKS:
            raise Refusal(f"the GIF has over {_MAX_GIF_BLOCKS:,} blocks before its first frame; send it as PNG")
        if content[start + 1] == 0xF9:  # graphic control: says which colour is transparent
            control = content[start:at]
    return content[:end] + control + content[at:]


def _centre_crop(image: Image.Image, spec: ImageSpec) -> Image.Image:
    size, box = (spec.width, spec.height), (0.0, 0.0, float(image.width), float(image.height))  # box: in source pixels
    if spec.resize is not None:
        scale = min(image.size) / spec.resize
        # Rounding can exceed the image's edge, which Pillow refuses: 28 * (29 / 28) > 29.
        width, height = min(image.width, spec.width * scale), min(image.height, spec.height * scale)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
    if image.size == size and box == (0, 0, *size):
        return image
    # Resampling only the box that survives the crop bounds the work for extreme aspect ratios.
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    # Takes half the time of np.asarray(image). The array is read-only; the server copies it into a batch.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(spec.height, spec.width, spec.channels)


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        flat = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        flat = Image.new("RGBA", image.size, "white")
        flat.alpha_composite(image.convert("RGBA"))
    else:
        flat = image
    return flat if flat.mode == mode else flat.convert(mode)
