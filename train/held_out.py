"""python train/held_out.py: write test images of a data set as PNG files, to post to a server."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command
from train.spec import Published

EXAMPLES = ("python train/held_out.py --dataset digits --out held-out --count 10",)


@dataclass(frozen=True)
class HeldOutConfig:
    dataset: Annotated[Published, "whose test images"] = "digits"
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    out: Annotated[Path, "folder for files named LABEL_INDEX.png"] = Path("held-out")
    count: Annotated[int, "how many, from the start of the test images"] = 10


def command(config: HeldOutConfig) -> int:
    """Write test images, which training has not seen, as PNG files named after their label."""
    import io

    from PIL import Image

    from train import data
    from train.files import write_whole

    dataset = data.load(config.dataset, data_dir=config.data_dir)
    images = dataset.test.first(config.count)
    for index, pixels in enumerate(images):
        label = dataset.info.labels[dataset.test.targets[index]].replace("/", "-")
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
        write_whole(config.out / f"{label}_{index}.png", file.getvalue())
    print(f"wrote {len(images)} images to {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, HeldOutConfig, examples=EXAMPLES))
