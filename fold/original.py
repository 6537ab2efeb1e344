"""python fold/original.py AUTHORS.pt7: the authors' published weights as a checkpoint of ours."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command

if TYPE_CHECKING:
    from torch import Tensor

    from train.checkpoint import Checkpoint
    from train.spec import Delta, ImageSpec, Parameterization, Spec

BLOCK_PARTS = {"conv": "conv.weight", "alpha": "conv.a", "beta": "conv.b"}
# The first release as published with its notebook names them by the convolution.
NOTEBOOK_PARTS = {"conv.gamma": "conv.a", "conv.beta": "conv.b"}
EXAMPLES = (
    "python fold/original.py model.pt7 --out runs/diracnet-34-8/checkpoint.pt",
    "python fold/run.py runs/diracnet-34-8/checkpoint.pt",
)


@dataclass(frozen=True)
class OriginalConfig:
    authors: Annotated[Path, "a model.pt7 of the authors' training code, first or second release"]
    out: Annotated[Path, "checkpoint to write"] = Path("checkpoint.pt")
    image_size: Annotated[int | None, "side of the input in pixels (default: 32 for CIFAR, 224 for ImageNet)"] = None


def command(config: OriginalConfig) -> int:
    """Import a checkpoint that the authors of the paper published; nothing in the file is executed."""
    from train.checkpoint import save_checkpoint
    from train.families import build, count_parameters

    if config.out.exists() and config.out.samefile(config.authors):
        from train.refusal import Refusal

        raise Refusal(f"--out {config.out} is the authors' file itself: name another")
    checkpoint = import_original(config.authors, image_size=config.image_size)
    save_checkpoint(config.out, checkpoint)
    spec = checkpoint.spec
    print(
        f"wrote {config.out}: {spec.name}, {spec.family}, {spec.nonlinearity}, {spec.parameterization}, "
        f"{len(spec.labels)} classes, {count_parameters(build(spec)):,} parameters"
    )
    return 0


def import_original(path: Path, *, image_size: int | None = None) -> "Checkpoint":
    """The checkpoint in an authors' file of either release.

    Family, depth, width and classes come from the shapes of the tensors. Refuses a file with anything
    but tensors and plain containers in it, and names or shapes that no published net has.
    """
    from dataclasses import replace

    from train.checkpoint import Checkpoint, load_net
    from train.files import read_whole, sha256

    content = read_whole(path)
    numbers, eyes = _read(path, content)
    delta: Delta = _delta_form(path, numbers, eyes)
    spec = replace(_infer_spec(path, numbers, image_size), delta=delta)
    config = {
        "dataset": {10: "cifar10", 100: "cifar100"}.get(len(spec.labels), "folder"),
        "authors_sha256": sha256(content),
    }
    checkpoint = Checkpoint.fresh(spec, _renamed(numbers), config)
    load_net(checkpoint)  # refuses tensors that do not fit the spec
    return checkpoint


def _read(path: Path, file: bytes) -> tuple[dict[str, "Tensor"], dict[str, "Tensor"]]:
    """`params` and `stats` as one flat dict of float32 tensors, and the deltas that were cached in either."""
    import io

    import torch

    from train.refusal import Refusal

    try:
        content = torch.load(io.BytesIO(file), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen unrelated kinds
        raise Refusal(
            f"{path} is no file of tensors in plain containers, or is cut short ({type(error).__name__}); "
            "nothing in it was executed"
        ) from error
    parts = [content.get(name, {}) for name in ("params", "stats")] if _is_dict(content) else []
    dicts = [part for part in parts if _is_dict(part)]
    if len(dicts) != 2 or not dicts[0]:
        raise Refusal(f"{path} has no dictionary `params`: it is none of the authors' layouts")
    numbers = {str(name): value for part in dicts for name, value in part.items()}
    strange = [
        name
        for name, value in numbers.items()
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not torch.isfinite(value).all()
    ]
    if strange:
        raise Refusal(f"{path}: {', '.join(strange[:5])}: no tensors of finite real numbers")
    tensors = {name.removeprefix("module."): value.detach().float() for name, value in numbers.items()}
    eyes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("eye")}
    return tensors, eyes


def _delta_form(path: Path, numbers: dict[str, "Tensor"], eyes: dict[str, "Tensor"]) -> "Delta":
    """Which δ the file's net was trained with, from the tensors that its code cached as `eyeN_o_N_i_H_W`.

    Where N_i = N_o all forms are one. Refuses a δ that is of neither form, and one that is missing.
    """
    import torch

    from train.layers import dirac_delta
    from train.refusal import Refusal

    shapes = {"eye" + "_".join(map(str, value.shape)): value.shape for name, value in numbers.items() if _is_conv(name)}
    missing = [name for name, shape in shapes.items() if shape[0] != shape[1] and name not in eyes]
    if missing:
        raise Refusal(f"{path}: {missing[0]} missing: what the layers of this shape were trained with is not known")
    found: dict[str, Delta] = {}
    forms: tuple[Delta, ...] = ("repeated", "first")
    for name, eye in eyes.items():
        if name not in shapes:
            continue
        fits: list[Delta] = [form for form in forms if torch.equal(eye, dirac_delta(shapes[name], form))]
        if not fits:
            raise Refusal(f"{path}: {name} is neither the repeated δ of eq. 7 and 8 nor that of torch.nn.init.dirac_")
        if len(fits) == 1:
            found[name] = fits[0]
    if len(set(found.values())) > 1:
        raise Refusal(f"{path}: δ is of two forms: {', '.join(f'{name} {form}' for name, form in found.items())}")
    for form in found.values():
        return form
    return "repeated"


def _is_conv(name: str) -> bool:
    return name.startswith("group") and name.endswith(".conv")


def _is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def _infer_spec(path: Path, numbers: dict[str, "Tensor"], image_size: int | None) -> "Spec":
    from train import data
    from train.families import IMAGENET_GROUPS, TABLE3_GROUPS
    from train.refusal import Refusal
    from train.spec import Spec

    def refuse(why: str) -> Refusal:
        return Refusal(f"{path} is none of the authors' layouts: {why}")

    notebook = "group0.block0.conv.gamma" in numbers
    scales = ("conv.gamma", "conv.beta") if notebook else ("alpha", "beta")
    first = ("conv", "fc.weight", *(f"group0.block0.{part}" for part in ("conv", *scales)))
    missing = [name for name in first if name not in numbers]
    if missing:
        raise refuse(f"{', '.join(missing)} missing")
    stem, block = numbers["conv"].shape, numbers["group0.block0.conv"].shape
    classifier = numbers["fc.weight"].shape
    if len(stem) != 4 or len(block) != 4 or stem[1:] not in ((3, 3, 3), (3, 7, 7)) or len(classifier) != 2:
        shapes = f"{tuple(stem)}, the first block's {tuple(block)}, the classifier {tuple(classifier)}"
        raise refuse(f"the first convolution is {shapes}")
    groups = _count_blocks(numbers)
    if tuple(stem[1:]) == (3, 3, 3):
        if len(groups) != 3 or len(set(groups)) != 1:
            raise refuse(f"a CIFAR net has three equal groups, found {groups}")
        family, depth, base, image = "cifar", 3 * groups[0] + 4, 16, data.cifar_image()
    else:
        named = [("imagenet", IMAGENET_GROUPS), ("imagenet-table3", TABLE3_GROUPS)]
        found = [(family, depth) for family, table in named for depth, layers in table.items() if layers == groups]
        if not found:
            raise refuse(f"no ImageNet net has groups of {groups} convolutions")
        (family, depth), base, image = found[0], 64, data.imagenet_image()
    ncrelu = block[1] == 2 * stem[0]
    num_scales = tuple(numbers[f"group0.block0.{part}"].numel() for part in scales)
    known: dict[tuple[bool, bool, bool], Parameterization] = {  # NCReLU; more than one alpha, more than one beta
        (True, False, False): "dirac",
        (True, False, True): "per-output-b",
        (False, True, True): "per-channel",
    }
    form = known.get((ncrelu, num_scales[0] > 1, num_scales[1] > 1 or notebook))
    if form is None:
        raise refuse(
            f"group0.block0.{scales[0]} and {scales[1]} hold {num_scales[0]} and {num_scales[1]} numbers: "
            f"NCReLU goes with 1 and 1 or with 1 and one for each output, ReLU with one for each output"
        )
    return Spec(
        family=family,
        depth=depth,
        width=stem[0] / base,
        nonlinearity="ncrelu" if ncrelu else "relu",
        image=_resized(image, image_size),
        labels=_labels(classifier[0]),
        parameterization=form,
    )


def _count_blocks(numbers: dict[str, "Tensor"]) -> tuple[int, ...]:
    """Convolutions in each group, from names such as group0.block3.conv."""
    blocks = [name.split(".")[0] for name in numbers if _is_conv(name)]
    return tuple(blocks.count(f"group{index}") for index in range(len(set(blocks))))


def _resized(image: "ImageSpec", size: int | None) -> "ImageSpec":
    from dataclasses import replace

    if size is None:
        return image
    return replace(image, height=size, width=size, resize=round(size * (image.resize or image.height) / image.height))


def _labels(num: int) -> tuple[str, ...]:
    """The classes' names where the number of classes says which data set it was."""
    from train import data

    if num in (10, 100):
        return data.describe(f"cifar{num}").labels
    if num == 1000:
        from torchvision.models import ResNet18_Weights  # pyright: ignore[reportMissingTypeStubs]  # it has none

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(num))


def _renamed(numbers: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The authors' names as ours; scalars of shape [1] become shape []."""
    import torch

    model: dict[str, Tensor] = {}
    for name, value in numbers.items():
        where, _, leaf = name.rpartition(".")
        if name == "conv":
            name = "stem.conv.weight"
        elif name.startswith("bn."):
            name = f"stem.{name}"
        elif (parts := name.split(".", 2)) and len(parts) == 3 and parts[2] in NOTEBOOK_PARTS:
            name = f"{parts[0]}.{parts[1]}.{NOTEBOOK_PARTS[parts[2]]}"
            value = value.squeeze() if parts[2] == "conv.gamma" else value
        elif where.startswith("group") and leaf in BLOCK_PARTS:
            name = f"{where}.{BLOCK_PARTS[leaf]}"
            value = value.squeeze() if leaf != "conv" and value.numel() == 1 else value
        model[name] = value
        if leaf == "running_mean":
            model[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return model


if __name__ == "__main__":
    sys.exit(run_command(command, OriginalConfig, examples=EXAMPLES))
