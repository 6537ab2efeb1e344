"""The command line of train/run.py, and the settings of a run: from the flags, a recipe, a net or an earlier run."""

import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from common.cli import given_arguments
from common.progress import printable
from common.refusal import Refusal
from common.spec import DatasetName, Delta, Family, ImageSpec, Nonlinearity, Parameterization, Spec
from train.recipes import Precision, Recipe, Schedule, Start, recipe

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint, PlainFile


# Options that may differ when a run is resumed: the epochs of both stay the same, bit for bit.
FREE_TO_CHANGE = (
    *("data_dir", "download", "device", "workers", "out", "resume", "json", "describe"),
    *("epochs", "patience", "tensorboard"),
)
BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("epochs", "batch_size", "image_size"), lambda value: value >= 1, "be at least 1"),
    (("weight_decay", "warmup", "w_std", "crop", "workers"), lambda value: value >= 0, "not be negative"),
    (("freeze", "patience", "mixup", "cutmix"), lambda value: value >= 0, "not be negative"),
    (("validation", "momentum", "label_smoothing", "ema"), lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    (("erase",), lambda value: 0 <= value <= 1, "be from 0 to 1"),
    (("lr",), lambda value: 0 < value < math.inf, "be positive and finite"),
    (("smallest_crop",), lambda value: 0 < value <= 1, "be above 0 and at most 1"),
)
PATHS = ("data_dir", "init", "out")
ARCHITECTURE = ("family", "depth", "width", "nonlinearity", "parameterization", "delta")  # of a `Spec`


@dataclass(frozen=True)
class TrainConfig:
    """The options. None means the family's default or the recipe's value; `resolved` fills them in."""

    dataset: Annotated[DatasetName | None, "data set to train on (default: digits, or folder with --data-dir)"] = None
    data_dir: Annotated[Path | None, "folder of the data set"] = None
    download: Annotated[bool, "let torchvision download the data set"] = False
    image_size: Annotated[int, "side of the input in pixels, for --dataset folder"] = 32
    skip_unreadable: Annotated[bool, "train without the files of a folder that cannot be read"] = False
    family: Annotated[
        Family,
        "cifar: Table 1; pooled: the same at half the resolution; "
        "imagenet: section 3.5; imagenet-table3: with the five-block last group behind Table 3's parameter counts; "
        "wrn: the residual reference",
    ] = "cifar"
    classes: Annotated[int | None, "with --describe: RGB images of this many classes, in place of a data set"] = None
    depth: Annotated[int, "6N + 4 layers, Table 1; 18 or 34 for imagenet"] = 16
    width: Annotated[float, "width factor k of Table 1"] = 1.0
    nonlinearity: Annotated[
        Nonlinearity | None,
        "section 2.2; relu is the ablation of section 3.4 (default: ncrelu, or relu with wrn and per-channel)",
    ] = None
    parameterization: Annotated[
        Parameterization | None,
        "dirac: eq. 4; per-output-b: b for each output channel, the authors' published 18-0.75; "
        "per-channel: a and b for each output channel, with relu; "
        "unnormalized: eq. 3; delta: eq. 14; plain: the baseline without Dirac; initialised: plain, and at the start "
        "the dirac net's function (default: dirac, or plain with wrn)",
    ] = None
    delta: Annotated[
        Delta, "ones where channels widen: repeated, eq. 8; first: on the first channels alone, the second release"
    ] = "repeated"
    init: Annotated[
        Path | None,
        "fine-tune the net of this checkpoint or plain.safetensors: its image spec and all its layers, "
        "the last one if the classes are the same",
    ] = None
    freeze: Annotated[int, "with --init: number of first epochs that train only the last layer"] = 0
    qat: Annotated[bool, "round filters and activations as to_onnx.py --precision int8 does"] = False
    recipe: Annotated[Literal["ours", "paper"], "source of the values below that are not given"] = "ours"
    epochs: Annotated[int | None, "passes over the training images"] = None
    batch_size: Annotated[int | None, "images per step, over all processes"] = None
    lr: Annotated[float | None, "initial learning rate"] = None
    momentum: Annotated[float | None, "of stochastic gradient descent"] = None
    nesterov: Annotated[Literal["yes", "no"] | None, "Nesterov's momentum"] = None
    weight_decay: Annotated[float | None, "on all parameters, eq. 6"] = None
    decay_ab: Annotated[Literal["auto", "yes", "no"], "decay a and b too; auto: unless per-channel"] = "auto"
    schedule: Annotated[Schedule | None, "to zero; or x0.2 at 30, 60, 80 %; or x0.1 at 30, 60, 90 %"] = None
    warmup: Annotated[float | None, "epochs over which the rate rises to --lr"] = None
    label_smoothing: Annotated[float | None, "probability spread evenly over all classes"] = None
    a0: Annotated[float | None, "initial a, section 3.3"] = None
    b0: Annotated[float | None, "initial b, section 2"] = None
    w_std: Annotated[float | None, "initial standard deviation of W, section 2"] = None
    start: Annotated[
        Start | None, "initial classifier and batch normalisation: PyTorch's; or He's normal and 0, γ uniform in [0, 1]"
    ] = None
    flip: Annotated[Literal["auto", "yes", "no"], "mirror half of the images; auto: where labels allow it"] = "auto"
    crop: Annotated[int | None, "shift images by up to N pixels; default: what suits the data set"] = None
    smallest_crop: Annotated[float | None, "folder: least share of an image's area that a random crop keeps"] = None
    erase: Annotated[float | None, "share of images that lose a random rectangle"] = None
    mixup: Annotated[float, "blend images in pairs, shares from Beta(X, X); 0 for none, 0.2 is usual"] = 0.0
    cutmix: Annotated[float, "paste a rectangle of another image, area from Beta(X, X); 0 for none, 1 is usual"] = 0.0
    balanced: Annotated[bool, "draw images of all classes equally often"] = False
    ema: Annotated[float, "decay of a running average of the weights, judged and folded instead; 0 for none"] = 0.0
    patience: Annotated[int | None, "stop after N epochs without a better validation accuracy; 0 for never"] = None
    validation: Annotated[float | None, "fraction of training images held out to choose best.pt; 0 for none"] = None
    seed: Annotated[int, "of initialisation, order and augmentation"] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], "device to train on"] = "auto"
    precision: Annotated[Precision | None, "of convolutions while training; auto: bf16 where the device has it"] = None
    sync_batch_norm: Annotated[bool, "batch statistics over all processes of torchrun; GPUs only"] = False
    compile: Annotated[bool, "compile the net with torch.compile"] = False
    workers: Annotated[int, "processes that decode the images of a folder"] = 2
    out: Annotated[Path | None, "run folder (default: runs/DATASET-DEPTH-WIDTH)"] = None
    resume: Annotated[bool, "continue the run in --out with its settings; --epochs may grow"] = False
    tensorboard: Annotated[bool, "also write TensorBoard event files to tensorboard/ in --out"] = False
    describe: Annotated[bool, "print the net that would be trained, without training"] = False
    json: Annotated[bool, "print the result as JSON on stdout"] = False

    def __post_init__(self) -> None:
        for names, fits, must in BOUNDS:
            for name in names:
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise Refusal(f"--{name.replace('_', '-')} must {must}, got {value}")
        if self.classes is not None and not self.describe:
            raise Refusal("--classes requires --describe; to train, name a data set")
        if self.freeze and not self.init:
            raise Refusal("--freeze keeps the layers of another net: name a checkpoint with --init")
        if self.qat and (self.precision not in (None, "auto", "fp32") or self.compile or self.family == "wrn"):
            raise Refusal("--qat trains chains of layers in fp32: leave out --compile, wrn and any other --precision")
        if self.patience and self.validation == 0:
            raise Refusal("--patience waits for the validation accuracy: --validation must be above 0")

    @property
    def learnt(self) -> DatasetName:
        return self.dataset or ("folder" if self.data_dir else "digits")

    @property
    def run_dir(self) -> Path:
        return self.out or Path("runs") / f"{self.learnt}-{self.depth}-{self.width:g}"

    def resolved(self, num_images: int | None = None) -> "Settings":
        """The options with the defaults of the family, and of the recipe for `num_images`, filled in."""
        wrn = self.family == "wrn"
        parameterization = self.parameterization or ("plain" if wrn else "dirac")
        values = asdict(recipe(self.recipe, family=self.family, dataset=self.learnt, num_images=num_images))
        values |= {"dataset": self.learnt, "parameterization": parameterization}
        values["nonlinearity"] = "relu" if wrn or parameterization == "per-channel" else "ncrelu"
        settings = Settings(**values | {name: value for name, value in vars(self).items() if value is not None})
        if self.warmup is None:  # a run that is cut short to few epochs warms up for a part of them
            settings = replace(settings, warmup=min(settings.warmup, settings.epochs / 4))
        return settings


@dataclass(frozen=True)
class Settings(Recipe, TrainConfig):
    """The settings of a training: a `TrainConfig` with all values of its recipe filled in."""

    dataset: DatasetName = "digits"
    nonlinearity: Nonlinearity = "ncrelu"
    parameterization: Parameterization = "dirac"

    def spec(self, image: ImageSpec, labels: tuple[str, ...]) -> Spec:
        """The spec of the net, for these images and labels."""
        return Spec(image=image, labels=labels, **{name: getattr(self, name) for name in ARCHITECTURE})


def continued(config: TrainConfig, state: "Checkpoint") -> Settings:
    """The settings of the run in `state`; refuses others that `config` gives."""
    if "epochs" not in state.config:
        raise Refusal(f"{config.run_dir} holds an imported net that was not trained here: name it with --init")
    names = {field.name for field in fields(Settings)}
    was: dict[str, Any] = {name: value for name, value in state.config.items() if name in names}
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    now = recorded(config)
    if changed := [name for name in sorted(given - {*FREE_TO_CHANGE}) if now[name] != was.get(name)]:
        flags = " ".join(f"--{name.replace('_', '-')} {was.get(name)}" for name in changed)
        raise Refusal(f"{config.run_dir} was started with {flags}; resume it with the same, or leave that out")
    paths = {name: Path(was[name]) for name in PATHS if was.get(name)}
    taken = {name: getattr(config, name) for name in (given | {"json", "resume"}) & {*FREE_TO_CHANGE}}
    together: dict[str, Any] = {**was, **paths, **taken, "out": config.run_dir}
    settings = Settings(**together)
    if settings.epochs < was["epochs"]:
        raise Refusal(f"--epochs may grow: {config.run_dir} was started with {was['epochs']}, got {settings.epochs}")
    return settings


def like(config: TrainConfig, source: "Checkpoint | PlainFile") -> TrainConfig:
    """`config` with the architecture of `source`; refuses another architecture on the command line."""
    spec, defaults = source.spec, TrainConfig()
    of_source = {name: getattr(spec, name) for name in ARCHITECTURE} | {"image_size": spec.image.height}
    for name, value in of_source.items():
        if (given := getattr(config, name)) not in (value, getattr(defaults, name)):
            flag = f"--{name.replace('_', '-')}"
            raise Refusal(f"the net of --init has {flag} {value}: leave out {flag} {given}")
    return replace(config, **of_source)


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The options for a checkpoint: paths as text; the data set's is absolute, so that later commands find it."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return values | {"data_dir": str(config.data_dir.resolve()) if config.data_dir else None}


def typed(config: TrainConfig) -> str:
    """The command as recorded with the model, without paths of this machine."""
    places = {name: getattr(config, name) for name in PATHS if getattr(config, name)}
    short = {name: Path(path.resolve().name) for name, path in places.items() if name != "out" or path.is_absolute()}
    return printable(f"python train/run.py {given_arguments(replace(config, **short))}".strip())


def command_to_resume(config: Settings, num_processes: int) -> str:
    """The command that resumes a run, for the shell that started it."""
    script = Path(__file__).with_name("run.py")
    script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    several = torchrun if num_processes > 1 else []
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, *several, str(script), "--resume", "--out", str(config.run_dir)])
