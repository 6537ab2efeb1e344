"""What one request may ask of the server."""

from dataclasses import dataclass

from train.image import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """Bounds of one request. The server holds no more of a body than `max_body_bytes`."""

    max_body_bytes: int = 20 * 2**20
    max_images: int = 64
    max_pixels: int = MAX_PIXELS  # of each image, as its header announces
    num_decoders: int = 4  # images decoded at once, over all requests; bounds memory and processors
