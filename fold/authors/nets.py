"""The authors' nets, as trained or folded, and single layers of theirs, from the tensors of their files."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.refusal import Refusal, first_of
from common.spec import Delta, ImageSpec, Nonlinearity, Parameterization, Spec
from fold.authors.files import Saved
from fold.graph import GraphNet
from fold.plain import Plain, skeleton, stored_tensors
from fold.shapes import Shape
from train.checkpoint import Checkpoint, load_net, misfits
from train.data import datasets
from train.families import IMAGENET_GROUPS, TABLE3_GROUPS, outline
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, dirac_delta

# A file with up to this many convolutions too few or too many is refused by their names; with more, as another net.
FEW = 2
# The names of a block's factors a and b: in the training code of both releases, in early files of the first, and in
# the net that was published with its notebook.
SCALES = (("alpha", "beta"), ("conv.alpha", "conv.beta"), ("conv.gamma", "conv.beta"))
NOTEBOOK = SCALES[2]
FOLDED_FORMS: dict[Nonlinearity, Parameterization] = {"ncrelu": "per-output-b", "relu": "per-channel"}
# Recorded in the plain file, because these nets come without the nets that they were folded from.
NOT_PROVEN = (
    "the authors folded this net, and their file lacks its Dirac net: that the fold changed nothing cannot be "
    "shown; nonlinearity and shapes are inferred from the tensors, the ReLU before the last pool, a, b, δ and the "
    "preprocessing are taken from the authors' definition and training code"
)


def checkpoint_of(path: Path, saved: Saved, digest: str, *, image_size: int | None = None) -> Checkpoint:
    """The checkpoint of a net from `read_saved`; refuses names and shapes that no published net has.

    Family, depth, width and classes come from the shapes of the tensors, δ from the file's own.
    """
    numbers = dict(saved.numbers)
    scales = next((pair for pair in SCALES if all(f"group0.block0.{name}" in numbers for name in pair)), None)
    if scales is None:
        raise Refusal(
            f"{path} is none of the authors' layouts: group0.block0.alpha and group0.block0.beta are missing, "
            "and conv.gamma with conv.beta too"
        )
    spec = infer_spec(path, numbers, leaf="", forms=_forms(path, numbers, scales), image_size=image_size)
    if spec.parameterization == "per-channel":  # a layer's single a and b, repeated for each of its outputs
        convolutions = [(name.removesuffix(".conv"), w) for name, w in numbers.items() if _is_conv(name) and w.dim()]
        for name, num in ((f"{block}.{scale}", len(w)) for block, w in convolutions for scale in scales):
            if name in numbers and numbers[name].shape == (1,):
                numbers[name] = numbers[name].expand(num)
    model = matched(path, spec, numbers, _wanted(spec, scales))
    spec = replace(spec, delta=_form_of_all(path, numbers, saved.eyes))
    norms = [name.removesuffix("running_mean") for name in model if name.endswith("running_mean")]
    model |= {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    dataset = {10: "cifar10", 100: "cifar100"}.get(len(spec.labels), "folder")
    checkpoint = Checkpoint.fresh(spec, model, {"dataset": dataset, "authors_sha256": digest})
    load_net(checkpoint)
    return checkpoint


def plain_of(path: Path, saved: Saved, digest: str, *, image_size: int | None = None) -> Plain:
    """The plain net of a folded net from `read_saved`; refuses names and shapes that no published one has.

    Both releases are for ImageNet: NCReLU in the first, ReLU in the second, ReLU before the last pool in both.
    """
    if "conv.weight" in saved.numbers and saved.numbers["conv.weight"].shape[2:] == (3, 3):
        raise Refusal(
            f"{path} is a folded CIFAR net; the authors folded only ImageNet nets: import its Dirac net instead"
        )
    spec = infer_spec(path, saved.numbers, leaf=".weight", forms=FOLDED_FORMS, image_size=image_size)
    if spec.nonlinearity == "relu":
        spec = replace(spec, delta="first")
    graph = skeleton(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(graph, spec).items()}
    wanted = {ours.removeprefix("stem."): (ours, shape) for ours, shape in shapes.items()}
    net = GraphNet(graph.with_tensors(matched(path, spec, saved.numbers, wanted)))
    provenance: dict[str, Any] = {
        "training": {"authors_file": path.name, "authors_sha256": digest},
        "fold": {"by": "the authors", "not_proven": NOT_PROVEN},
    }
    return Plain(net.eval(), spec, provenance, digest)


def _forms(
    path: Path, numbers: Mapping[str, Tensor], scales: tuple[str, str]
) -> Mapping[Nonlinearity, Parameterization]:
    """The parameterization for each possible nonlinearity, from the sizes of a and b in the first block.

    In its first months, the second release had a single a and b per layer; they mean the same for each output.
    """
    num_a, num_b = (numbers[f"group0.block0.{name}"].numel() for name in scales)
    if scales == NOTEBOOK and num_a == 1:
        return {"ncrelu": "per-output-b"}
    if num_a == num_b == 1:
        return {"ncrelu": "dirac", "relu": "per-channel"}
    if num_a > 1 and num_b > 1 and scales != NOTEBOOK:
        return {"relu": "per-channel"}
    raise Refusal(
        f"{path}: group0.block0.{scales[0]} and {scales[1]} hold {num_a} and {num_b} numbers: the authors' nets have "
        "1 and 1, 1 and one for each output, or both for each output"
    )


def _wanted(spec: Spec, scales: tuple[str, str]) -> dict[str, tuple[str, Shape]]:
    """For each of the authors' names, our name and the shape."""
    wanted: dict[str, tuple[str, Shape]] = {}
    for ours, tensor in outline(spec).state_dict().items():
        where, _, leaf = ours.rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        theirs = ours.removeprefix("stem.")
        if where.endswith("conv") and leaf == "weight":
            theirs = theirs.removesuffix(".weight")
        elif where.endswith("conv"):
            theirs = f"{where.removesuffix('.conv')}.{scales[leaf == 'b']}"
        wanted[theirs] = (ours, tuple(tensor.shape))
    return wanted


def _form_of_all(path: Path, numbers: Mapping[str, Tensor], eyes: Mapping[str, Tensor]) -> Delta:
    """The δ that the net was trained with, from the tensors that its code cached as `eyeN_o_N_i_H_W`.

    For N_i = N_o the forms are the same. Refuses a δ of neither form, and a missing one.
    """
    shapes = {"eye" + "_".join(map(str, value.shape)): value.shape for name, value in numbers.items() if _is_conv(name)}
    if missing := [name for name, shape in shapes.items() if shape[0] != shape[1] and name not in eyes]:
        raise Refusal(f"{path}: {missing[0]} missing: what the layers of this shape were trained with is not known")
    found: dict[str, Delta] = {}
    for name, shape in shapes.items():
        if name in eyes and (form := delta_form(path, name, eyes[name], shape)):
            found[name] = form
    if len(set(found.values())) > 1:
        raise Refusal(f"{path}: δ is of two forms: {', '.join(f'{name} {form}' for name, form in found.items())}")
    forms: list[Delta] = [*found.values(), "repeated"]
    return forms[0]


def _is_conv(name: str) -> bool:
    return name.startswith("group") and name.endswith(".conv")


def dirac_layer(
    state: Mapping[str, Tensor], prefix: str = "", *, padding: int = 0, dilation: int = 1
) -> DiracConv1d | DiracConv2d | DiracConv3d:
    """The layer with the tensors `alpha`, `beta`, `delta`, `weight` and, if any, `bias`, named after `prefix`.

    A state dict lacks `padding` and `dilation`, so they are given here; the stride of the authors' module is 1.
    Refuses tensors that are missing, do not fit each other or are not finite.
    """
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    if missing := [prefix + name for name in ("alpha", "beta", "delta", "weight") if prefix + name not in state]:
        raise Refusal(f"no module of the authors' at {prefix or 'the top'}: {', '.join(missing)} missing")
    names = [name for name in ("alpha", "beta", "delta", "weight", "bias") if prefix + name in state]
    tensors = {name: state[prefix + name].detach().float().cpu() for name in names}
    _check(prefix, tensors)
    weight = tensors["weight"]
    forms: dict[tuple[bool, bool], Parameterization] = {
        (False, False): "dirac",
        (False, True): "per-output-b",
        (True, True): "per-channel",
    }
    many = (tensors["alpha"].numel() > 1, tensors["beta"].numel() > 1)
    if many not in forms:
        raise Refusal(f"{prefix}alpha has {tensors['alpha'].numel()} numbers and {prefix}beta one: not the authors'")
    layer = (DiracConv1d, DiracConv2d, DiracConv3d)[weight.dim() - 3](
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),
        padding=padding,
        dilation=dilation,
        bias="bias" in tensors,
        parameterization=forms[many],
        delta_form=delta_form("the state dict", f"{prefix}delta", tensors["delta"], weight.shape) or "repeated",
    )
    assert layer.b is not None  # each of the three forms has one
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.a.copy_(tensors["alpha"].reshape(layer.a.shape))
        layer.b.copy_(tensors["beta"].reshape(layer.b.shape))
        if layer.bias is not None:
            layer.bias.copy_(tensors["bias"])
    return layer


def _check(prefix: str, tensors: Mapping[str, Tensor]) -> None:
    weight = tensors["weight"]
    if weight.dim() not in (3, 4, 5) or 0 in weight.shape:
        raise Refusal(f"{prefix}weight is {list(weight.shape)}: a convolution has 3 to 5 dimensions")
    outputs = (weight.shape[0],)
    fitting = {"alpha": {(1,), outputs}, "beta": {(1,), outputs}, "bias": {outputs}, "delta": {tuple(weight.shape)}}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Refusal(f"{prefix}{name} holds NaN or infinite values")
        if name != "weight" and tuple(tensor.shape) not in fitting[name]:
            raise Refusal(f"{prefix}{name} is {list(tensor.shape)} beside {prefix}weight of {list(weight.shape)}")


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
    if image_size is not None:
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
    if wrong := misfits(numbers, {name: shape for name, (_, shape) in wanted.items()}):
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
