"""python train/held_out.py: write test images of a data set as files, to post to a server."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from common.spec import DatasetName

EXAMPLES = (
    "python train/held_out.py --dataset digits --out held-out --count 10",
    "python train/held_out.py --run runs/photos --out held-out     # what that run has tested on",
)


@dataclass(frozen=True)
class HeldOutConfig:
    dataset: Annotated[DatasetName | None, "data set (default: digits, or folder with --data-dir)"] = None
    data_dir: Annotated[Path | None, "folder of the data set"] = None
    run: Annotated[Path | None, "folder of a run, to take the images that it tested on"] = None
    out: Annotated[Path, "folder for files named LABEL_INDEX.png, or as a photograph's format is"] = Path("held-out")
    count: Annotated[int, "number of images: the first ones; of a folder, evenly from all classes"] = 10


def command(config: HeldOutConfig) -> int:
    """Write test images, which training has not seen, as files named after their label; photographs as they are."""
    import io

    import numpy as np
    from PIL import Image

    from common.files import read_whole, write_whole
    from train.checkpoint import load_checkpoint
    from train.data import datasets
    from train.data.folder import Files

    if config.run and config.dataset:
        raise Refusal("--run says what the data set is: leave out --dataset")
    if config.run:
        state = load_checkpoint(config.run / "checkpoint.pt")
        where = {"data_dir": config.data_dir, "beside": config.run}
        dataset = datasets.load_as_trained(state.config, image=state.spec.image, **where)
    else:
        name = config.dataset or ("folder" if config.data_dir else "digits")
        dataset = datasets.load(name, data_dir=config.data_dir)
    test, num = dataset.test, min(config.count, len(dataset.test))
    spread = np.linspace(0, len(test) - 1, num).round().astype(int)
    for index, place in enumerate(spread if isinstance(test, Files) else range(num)):
        label = dataset.info.labels[test.targets[place]].replace("/", "-")
        if isinstance(test, Files):
            path = Path(test.paths[place])
            write_whole(config.out / f"{label}_{index}{path.suffix}", read_whole(path))
        else:
            pixels, file = np.asarray(test.images[place]), io.BytesIO()
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
            write_whole(config.out / f"{label}_{index}.png", file.getvalue())
    print(f"wrote {num} images to {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, HeldOutConfig, examples=EXAMPLES))
