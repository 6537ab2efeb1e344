import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    """A folder of ten random photographs for each of two classes, "dark" and "light"."""
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for label in ("dark", "light"):
        (root / label).mkdir(parents=True)
        for index in range(10):
            pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    return root
