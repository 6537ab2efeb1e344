"""From the bytes of images to one batch of pixels, in threads beside the event loop."""

import asyncio
from functools import partial

import numpy as np
from anyio import CapacityLimiter, to_thread

from serve.problems import TOO_MANY_PIXELS, UNDECODABLE, Problem
from train.image import TooManyPixels, decode
from train.refusal import Refusal
from train.spec import ImageSpec


async def decode_images(
    contents: list[bytes], spec: ImageSpec, *, max_pixels: int, decoders: CapacityLimiter
) -> np.ndarray:
    """Files of N images → uint8 [N, H, W, C]. Looks at all of them, then names each bad one."""
    work = partial(_decode, spec=spec, max_pixels=max_pixels)
    images = await asyncio.gather(*(to_thread.run_sync(work, content, limiter=decoders) for content in contents))
    bad = {index: image for index, image in enumerate(images) if isinstance(image, Refusal)}
    if bad:
        kind = TOO_MANY_PIXELS if isinstance(next(iter(bad.values())), TooManyPixels) else UNDECODABLE
        raise Problem(kind, "; ".join(f"image {index}: {refusal}" for index, refusal in bad.items()))
    return np.stack([image for image in images if not isinstance(image, Refusal)])


def _decode(content: bytes, *, spec: ImageSpec, max_pixels: int) -> np.ndarray | Refusal:
    try:
        return decode(content, spec, max_pixels=max_pixels)
    except Refusal as refusal:
        return refusal
