"""What an exported net takes and gives, ours or somebody else's, and how pixels become its input."""

from dataclasses import dataclass

import numpy as np

from train.refusal import Refusal
from train.spec import ImageSpec, Spec


@dataclass(frozen=True)
class Signature:
    """One input of images, one output of logits.

    A net of ours takes `images` uint8 [N, H, W, C]. Somebody else's may take uint8 or float,
    [N, H, W, C] or [N, C, H, W]; float input gets pixels scaled to [0, 1].
    """

    input_name: str
    output_name: str
    dtype: str  # uint8, float16 or float32
    shape: tuple[int | None, ...]  # of the input; None where it is free

    def __post_init__(self) -> None:
        shown = [size or "N" for size in self.shape]
        if self.dtype not in ("uint8", "float16", "float32"):
            raise Refusal(f"the net takes {self.dtype}; images must be uint8, float32 or float16")
        if len(self.shape) != 4 or None in self.shape[1:]:
            raise Refusal(f"the net takes {self.input_name} {shown}; export it with a fixed height, width and channels")
        if self.shape[3] not in (1, 3) and self.shape[1] not in (1, 3):
            raise Refusal(f"the net takes {self.input_name} {shown}; images have 1 or 3 channels")

    @property
    def batch(self) -> int | None:
        """The only batch size that the net takes, or None where any will do."""
        return self.shape[0]

    @property
    def channels_first(self) -> bool:
        return self.shape[3] not in (1, 3)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, *sizes = (size or 0 for size in self.shape)
        return (sizes[1], sizes[2], sizes[0]) if self.channels_first else (sizes[0], sizes[1], sizes[2])

    def to_input(self, images: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, H, W, C] → what the net takes, in C order."""
        x = images.transpose(0, 3, 1, 2) if self.channels_first else images
        if self.dtype != "uint8":
            x = x.astype(self.dtype) / np.asarray(255, self.dtype)
        return np.ascontiguousarray(x)


def generic_spec(signature: Signature, *, num_classes: int) -> Spec:
    """The spec of somebody else's net: images stretched to its input, labels by number."""
    height, width, channels = signature.sizes
    return Spec(
        family="unknown",
        depth=0,
        width=0.0,
        nonlinearity="relu",
        image=ImageSpec(height, width, channels, (0.0,) * channels, (1.0,) * channels, resize=None),
        labels=tuple(f"class {index}" for index in range(num_classes)),
    )


def pad(images: np.ndarray, batch: int) -> np.ndarray:
    """At least `batch` images, black ones at the end."""
    missing = max(0, batch - len(images))
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
