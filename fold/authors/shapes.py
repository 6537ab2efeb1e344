"""Which of the authors' nets a file contains, from the shapes of its tensors, and the tensors by our names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from common.refusal import Refusal, first_of
from common.spec import Delta, ImageSpec, Nonlinearity, Parameterization, Spec
from train.data import datasets
from train.families import IMAGENET_GROUPS, TABLE3_GROUPS
from train.layers import dirac_delta

Shape = tuple[int, ...]
# A file with up to this many convolutions too few or too many is refused by their names; with more, as another net.
FEW = 2


def infer_spec(
    path: Path,
    numbers: Mapping[str, Tensor],
    *,
    leaf: str,
    forms: Mapping[Nonlinearity, Parameterization],
    image_size: int | None,
) -> Spec:
    """The spec, but for δ, of the net whose convolutions are called `conv` and `groupG.blockB.conv` and then `leaf`.

    Several tensors vote, so that `matched` can name one of a wrong shape. `forms` has the parameterization for each
    nonlinearity, which follows from the inputs of the first group: twice as many after NCReLU.
    """
    stem, block = f"conv{leaf}", f"group0.block0.conv{leaf}"
    for name, dims in ((stem, 4), (block, 4), ("fc.weight", 2)):
        if name not in numbers:
            raise Refusal(f"{path} is none of the authors' layouts: {name} is missing")
        if numbers[name].dim() != dims or 0 in numbers[name].shape:
            raise Refusal(f"{path}: {name} is {list(numbers[name].shape)}, must have {dims} dimensions")
    groups = _count_blocks(numbers, leaf)
    family, depth, at_width_one, image = _family(path, numbers[stem], groups, name=stem)
    told = [numbers[stem].shape[0], numbers[block].shape[0], numbers["fc.weight"].shape[1] // 2 ** (len(groups) - 1)]
    base = Counter(told).most_common(1)[0][0] or 1
    nonlinearity: Nonlinearity = "ncrelu" if round(numbers[block].shape[1] / base) == 2 else "relu"
    if nonlinearity not in forms:
        raise Refusal(
            f"{path}: {block} reads {numbers[block].shape[1]} channels: such a net with {nonlinearity} is not known"
        )
    if image_size:
        resize = round(image_size * (image.resize or image.height) / image.height)
        image = replace(image, height=image_size, width=image_size, resize=resize)
    sizes = [numbers[name].shape[0] for name in ("fc.weight", "fc.bias") if name in numbers and numbers[name].dim()]
    num_classes = next((size for size in sizes if size in (10, 100, 1000)), sizes[0])
    return Spec(family, depth, base / at_width_one, nonlinearity, image, _labels(num_classes), forms[nonlinearity])


def matched(
    path: Path, spec: Spec, numbers: Mapping[str, Tensor], wanted: Mapping[str, tuple[str, Shape]]
) -> dict[str, Tensor]:
    """The tensors by our names; `wanted` has our name and the shape for each of the authors' names.

    Refuses, by name, tensors that are missing, of another shape or not part of the net. [1] is accepted for [].
    """
    wrong: list[str] = []
    for name, (_, shape) in wanted.items():
        if name not in numbers:
            wrong.append(f"{name} is missing")
        elif (found := tuple(numbers[name].shape)) != shape and (found, shape) != ((1,), ()):
            wrong.append(f"{name} is {list(found)}, must be {list(shape)}")
    wrong += [f"{name} is not part of it" for name in numbers if name not in wanted]
    if wrong:
        raise Refusal(f"{path} is not a whole {spec.name} of {spec.family}: {first_of(wrong)}")
    return {ours: numbers[theirs].reshape(shape) for theirs, (ours, shape) in wanted.items()}


def delta_form(where: Path | str, name: str, eye: Tensor, shape: Sequence[int]) -> Delta | None:
    """The form of δ that `eye` is for a layer of `shape`, None if both are the same; refuses a tensor of neither."""
    is_whole = max(shape[:2]) % min(shape[:2]) == 0  # else δ cannot be repeated
    forms: list[Delta] = ["repeated", "first"] if is_whole else ["first"]
    fits: list[Delta] = [form for form in forms if torch.equal(eye, dirac_delta(shape, form))]
    if not fits:
        raise Refusal(f"{where}: {name} is neither the repeated δ of eq. 7 and 8 nor that of torch.nn.init.dirac_")
    return fits[0] if len(fits) == 1 else None


def _family(path: Path, stem: Tensor, groups: Shape, *, name: str) -> tuple[str, int, int, ImageSpec]:
    """(family, depth, channels at width one, image) of the net whose groups differ from these by at most FEW."""
    kernel = tuple(stem.shape[2:])
    if kernel == (3, 3):
        even = 2 * ((max(groups) + 1) // 2)  # 2N convolutions in each group, Table 1
        nets = [("cifar", 3 * even + 4, (even,) * 3)]
        base, image = 16, datasets.cifar_image()
    elif kernel == (7, 7):
        named = (("imagenet", IMAGENET_GROUPS), ("imagenet-table3", TABLE3_GROUPS))
        nets = [(family, depth, layers) for family, table in named for depth, layers in table.items()]
        base, image = 64, datasets.imagenet_image()
    else:
        raise Refusal(f"{path}: {name} is {list(stem.shape)}: the authors' nets begin with 3x3 or 7x7 taps")
    family, depth, layers = min(nets, key=lambda net: _distance(net[2], groups))
    if _distance(layers, groups) > FEW:
        tables = " or ".join(", ".join(map(str, net[2])) for net in nets)
        known = "a CIFAR net has three of 2N each" if base == 16 else f"ImageNet nets have {tables}"
        raise Refusal(f"{path}: groups of {', '.join(map(str, groups))} convolutions: {known}")
    return family, depth, base, image


def _distance(one: Shape, other: Shape) -> int:
    return sum(abs(left - right) for left, right in zip_longest(one, other, fillvalue=0))


def _count_blocks(numbers: Mapping[str, Tensor], leaf: str) -> Shape:
    """The number of convolutions in each group, up to the last one in the file."""
    pattern = re.compile(rf"group(\d{{1,2}})\.block(\d{{1,3}})\.conv{re.escape(leaf)}")
    places = [tuple(map(int, found.groups())) for found in map(pattern.fullmatch, numbers) if found]
    num_groups = 1 + max(group for group, _ in places)
    return tuple(max((1 + block for at, block in places if at == group), default=0) for group in range(num_groups))


def _labels(num: int) -> tuple[str, ...]:
    """The names of the classes, if their number identifies the data set."""
    if num in (10, 100):
        return datasets.info_of(f"cifar{num}").labels
    if num == 1000:
        from torchvision.models import ResNet18_Weights  # pyright: ignore[reportMissingTypeStubs]  # it has none

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(num))
