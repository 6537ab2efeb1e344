"""From the bytes of an image to its pixels, and from bad images to one problem."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from common.image import FORMATS, TooManyPixels, decode
from common.refusal import Refusal
from common.spec import ImageSpec
from serve.request.problems import TOO_MANY_PIXELS, UNDECODABLE, Problem

Decoded = np.ndarray | Exception  # uint8 [H, W, C], or why there are none: a Refusal where it is the image's fault


def decode_image(content: bytes, spec: ImageSpec, *, max_pixels: int) -> Decoded:
    """uint8 [H, W, C], or why there is none."""
    try:
        return decode(content, spec, max_pixels=max_pixels)
    except Refusal as refusal:
        return kept(refusal)


def kept(error: Exception) -> Exception:
    """An exception as a value: without the traceback, whose frames hold the image's bytes and often itself."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def warm_up_decoders(spec: ImageSpec) -> None:
    """Decode a pixel in every format: Pillow loads a format's code when it meets the first image of it.

    But for AVIF, whose images are decoded in processes alone (serve/decode/weigh.py).
    """
    for kind in FORMATS:
        if kind == "AVIF":
            continue
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, kind)
        decode(file.getvalue(), spec)


def find_problem(images: Sequence[Decoded | None]) -> Exception | None:
    """One problem that names every image which could not be decoded; None where all could."""
    bad = {index: image for index, image in enumerate(images) if isinstance(image, Exception)}
    if not bad:
        return None
    if failed := [error for error in bad.values() if not isinstance(error, Refusal)]:
        return failed[0]
    kind = TOO_MANY_PIXELS if isinstance(next(iter(bad.values())), TooManyPixels) else UNDECODABLE
    if len(images) == 1:
        return Problem(kind, str(bad[0]))
    return Problem(kind, "; ".join(f"image {index + 1} of {len(images)}: {refusal}" for index, refusal in bad.items()))
