"""The authors' Dirac nets, as trained: `params`, and in most of their files `stats`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_whole, sha256
from common.refusal import Refusal
from common.spec import Delta, Nonlinearity, Parameterization, Spec
from fold.authors.deltas import delta_form
from fold.authors.files import Saved, read_saved
from fold.authors.shapes import Shape, infer_spec, matched
from train.checkpoint import Checkpoint, load_net
from train.families import outline

# How the factors a and b of a block are called: in the training code of both releases, in the first days of the
# first, and in the net that was published with its notebook.
SCALES = (("alpha", "beta"), ("conv.alpha", "conv.beta"), ("conv.gamma", "conv.beta"))
NOTEBOOK = SCALES[2]


def import_net(path: Path, *, image_size: int | None = None) -> Checkpoint:
    """The checkpoint in an authors' file of either release.

    Family, depth, width and classes come from the shapes of the tensors, δ from the file's own.
    """
    content = read_whole(path)
    return checkpoint_of(path, read_saved(path, content), sha256(content), image_size=image_size)


def checkpoint_of(path: Path, saved: Saved, digest: str, *, image_size: int | None = None) -> Checkpoint:
    """A net that `read_saved` gave as a checkpoint; refuses names and shapes that no published net has."""
    numbers, scales = dict(saved.numbers), _scales(path, saved.numbers)
    forms = _forms(path, numbers, scales)
    spec = infer_spec(path, numbers, leaf="", forms=forms, image_size=image_size)
    if spec.parameterization == "per-channel":
        numbers |= _one_each(numbers, scales)
    model = matched(path, spec, numbers, _wanted(spec, scales))
    spec = replace(spec, delta=_form_of_all(path, numbers, saved.eyes))
    model |= {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in list(model)
        if name.endswith("running_mean")
    }
    config = {
        "dataset": {10: "cifar10", 100: "cifar100"}.get(len(spec.labels), "folder"),
        "authors_sha256": digest,
    }
    checkpoint = Checkpoint.fresh(spec, model, config)
    load_net(checkpoint)
    return checkpoint


def _scales(path: Path, numbers: Mapping[str, Tensor]) -> tuple[str, str]:
    found = [pair for pair in SCALES if all(f"group0.block0.{name}" in numbers for name in pair)]
    if not found:
        raise Refusal(
            f"{path} is none of the authors' layouts: group0.block0.alpha and group0.block0.beta are missing, "
            "and conv.gamma with conv.beta too"
        )
    return found[0]


def _forms(
    path: Path, numbers: Mapping[str, Tensor], scales: tuple[str, str]
) -> Mapping[Nonlinearity, Parameterization]:
    """What the net is with each nonlinearity, from how many numbers a and b are in the first block.

    The second release had one a and one b for a layer in its first months; the same layer has them for each output.
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


def _one_each(numbers: Mapping[str, Tensor], scales: tuple[str, str]) -> dict[str, Tensor]:
    """A layer's single a and b once for each of its outputs."""
    convolutions = {name.removesuffix(".conv"): w for name, w in numbers.items() if _is_conv(name) and w.dim()}
    names = {f"{block}.{scale}": len(w) for block, w in convolutions.items() for scale in scales}
    return {name: numbers[name].expand(num) for name, num in names.items() if _is_single(numbers.get(name))}


def _is_single(value: Tensor | None) -> bool:
    return value is not None and value.shape == (1,)


def _wanted(spec: Spec, scales: tuple[str, str]) -> dict[str, tuple[str, Shape]]:
    """Our name and the shape for each name of theirs."""
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
    """Which δ the file's net was trained with, from the tensors that its code cached as `eyeN_o_N_i_H_W`.

    Where N_i = N_o all forms are one. Refuses a δ that is of neither form, and one that is missing.
    """
    shapes = {"eye" + "_".join(map(str, value.shape)): value.shape for name, value in numbers.items() if _is_conv(name)}
    missing = [name for name, shape in shapes.items() if shape[0] != shape[1] and name not in eyes]
    if missing:
        raise Refusal(f"{path}: {missing[0]} missing: what the layers of this shape were trained with is not known")
    found: dict[str, Delta] = {
        name: form
        for name, shape in shapes.items()
        if name in eyes and (form := delta_form(path, name, eyes[name], shape))
    }
    if len(set(found.values())) > 1:
        raise Refusal(f"{path}: δ is of two forms: {', '.join(f'{name} {form}' for name, form in found.items())}")
    for form in found.values():
        return form
    return "repeated"


def _is_conv(name: str) -> bool:
    return name.startswith("group") and name.endswith(".conv")
