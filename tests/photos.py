"""A small set of real photographs: crops of those that scikit-learn and scikit-image bring."""

from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image

_SKIMAGE, _SKLEARN = (Path(module.__file__).parent for module in (skimage, sklearn.datasets))
PHOTOS = {
    "Kätzchen": _SKIMAGE / "data" / "chelsea.png",
    "coffee cup": _SKIMAGE / "data" / "coffee.png",
    "flower": _SKLEARN / "images" / "flower.jpg",
    "retina": _SKIMAGE / "data" / "retina.jpg",
    "temple": _SKLEARN / "images" / "china.jpg",
}


def make_photos(root: Path, *, per_class: int, seed: int = 0) -> Path:
    """`per_class` crops of each photograph, of different sizes and kinds of file, in a folder of its own."""
    rng = np.random.default_rng(seed)
    for label, source in PHOTOS.items():
        (root / label).mkdir(parents=True)
        with Image.open(source) as file:
            photo = file.convert("RGB")
        for index in range(per_class):
            side = rng.integers(photo.height // 3, photo.height // 2, 2)
            left, top = (int(rng.integers(0, whole - part)) for whole, part in zip(photo.size, side, strict=True))
            crop = photo.crop((left, top, left + int(side[0]), top + int(side[1])))
            crop.thumbnail((200, 200))
            name = f"IMG {index:03d}.{('JPG', 'png', 'webp')[index % 3]}"
            crop.convert("L" if index % 10 == 9 else "RGB").save(root / label / name)
    return root
