"""An image file becomes pixels the way the spec says: one function for training folders and the server."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from train.refusal import Refusal
from train.spec import ImageSpec

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# A 50-megapixel photograph passes; anything larger is refused before its pixels are decoded.
MAX_PIXELS = 64_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is another number and names no size


class TooManyPixels(Refusal):
    """The header announces more pixels than the limit."""


def decode(
    content: bytes,
    spec: ImageSpec,
    *,
    max_pixels: int = MAX_PIXELS,
    crop: Callable[[Image.Image, ImageSpec], Image.Image] | None = None,
) -> np.ndarray:
    """Bytes of a PNG, JPEG, WebP or BMP of any size and mode → uint8 [height, width, channels].

    Resized and cropped at the centre as `spec` says, or by `crop`.
    Raises `TooManyPixels` before decoding, `Refusal` where the bytes are no such image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise TooManyPixels(
                    f"the image is {image.width}x{image.height}, over the limit of {max_pixels:,} pixels"
                )
            upright = _upright(image, spec.channels)
            return _pixels((crop or _centre_crop)(upright, spec), spec)
    except Refusal:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise Refusal(f"not a readable {', '.join(FORMATS)} image ({type(error).__name__})") from error


def _upright(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode in RGB or grey, turned as its EXIF tag says.

    Transparent pixels lie on white, as a viewer shows them; 16-bit samples keep their upper eight bits.
    """
    ImageOps.exif_transpose(image, in_place=True)
    flat, mode = _flatten(image), "L" if channels == 1 else "RGB"
    return flat if flat.mode == mode else flat.convert(mode)


def _centre_crop(image: Image.Image, spec: ImageSpec) -> Image.Image:
    size, box = (spec.width, spec.height), _crop_box(image, spec)
    if image.size == size and box == (0, 0, *size):
        return image
    # Resampling only the box that survives the crop bounds the work for extreme aspect ratios.
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    # Half the time of np.asarray(image); the bytes are read-only, and the server copies them into a batch.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(spec.height, spec.width, spec.channels)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque
    return image


def _crop_box(image: Image.Image, spec: ImageSpec) -> tuple[float, float, float, float] | Any:
    """The part of the source that becomes the input, in source pixels."""
    if spec.resize is None:
        return (0.0, 0.0, float(image.width), float(image.height))
    scale = min(image.width, image.height) / spec.resize
    width, height = spec.width * scale, spec.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return (left, top, left + width, top + height)
