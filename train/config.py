"""The command line of train/run.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from train.refusal import Refusal


@dataclass(frozen=True)
class TrainConfig:
    dataset: Annotated[Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder"], "what to learn"] = "digits"
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    download: Annotated[bool, "let torchvision download the data set"] = False
    image_size: Annotated[int, "side of the input in pixels, for --dataset folder"] = 32
    family: Annotated[Literal["cifar"], "architecture, Table 1"] = "cifar"
    classes: Annotated[int | None, "with --describe: RGB images of this many classes, in place of a data set"] = None
    depth: Annotated[int, "6N + 4 layers, Table 1"] = 16
    width: Annotated[float, "width factor k of Table 1"] = 1.0
    nonlinearity: Annotated[Literal["ncrelu", "relu"], "section 2.2; relu is the ablation of section 3.4"] = "ncrelu"
    epochs: Annotated[int, "passes over the training images"] = 40
    batch_size: Annotated[int, "images per step"] = 32
    lr: Annotated[float, "learning rate at the start"] = 0.1
    momentum: Annotated[float, "of stochastic gradient descent"] = 0.9
    weight_decay: Annotated[float, "on all parameters, a and b too, eq. 6"] = 5e-4
    schedule: Annotated[Literal["cosine", "step"], "cosine to zero, or x0.2 at 30, 60 and 80 % as the paper"] = "cosine"
    flip: Annotated[Literal["auto", "yes", "no"], "mirror half of the images; auto: where labels allow it"] = "auto"
    crop: Annotated[int | None, "shift images by up to N pixels; default: what suits the data set"] = None
    validation: Annotated[float, "fraction of training images held out to pick best.pt by; 0 for none"] = 0.1
    seed: Annotated[int, "of initialisation, order and augmentation"] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to train"] = "auto"
    out: Annotated[Path | None, "run folder (default: runs/DATASET-DEPTH-WIDTH)"] = None
    resume: Annotated[bool, "continue the run in --out where it stopped"] = False
    describe: Annotated[bool, "print what would be trained, and train nothing"] = False
    json: Annotated[bool, "print the result as JSON on stdout"] = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise Refusal(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.validation < 1:
            raise Refusal(f"--validation must be at least 0 and below 1, got {self.validation}")
        if self.lr <= 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise Refusal("--lr must be positive, --weight-decay not negative, --momentum in [0, 1)")
        if self.crop is not None and self.crop < 0:
            raise Refusal(f"--crop must not be negative, got {self.crop}")
        if self.classes is not None and not self.describe:
            raise Refusal("--classes goes with --describe; to train, name a data set")

    @property
    def run_dir(self) -> Path:
        return self.out or Path("runs") / f"{self.dataset}-{self.depth}-{self.width:g}"
