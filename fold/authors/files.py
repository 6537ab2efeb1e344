"""The authors' files as tensors by name: PyTorch's pickles, old and new, and hickle's HDF5. Nothing is executed."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from common.refusal import Refusal, first_of
from fold.authors.hdf5 import SIGNATURE, read_hdf5


@dataclass(frozen=True)
class Saved:
    """The tensors of an authors' file, float32 on the CPU, by the authors' names without a wrapper's prefix."""

    numbers: dict[str, Tensor]
    eyes: dict[str, Tensor]  # the δ that their code cached as `eyeN_o_N_i_H_W`
    folded: bool  # convolutions with biases instead of a Dirac net


def read_saved(path: Path, content: bytes) -> Saved:
    """`params` and `stats` of a net, or the convolutions of a folded one.

    Refuses content other than tensors and plain containers, numbers that are not finite and real, and a layout that
    the authors' files do not have.
    """
    held = read_hdf5(path, content) if content.startswith(SIGNATURE) else _read_pickle(path, content)
    if not _is_dict(held):
        raise Refusal(f"{path} holds a {type(held).__name__}, not the dictionary of an authors' file")
    unfolded = "params" in held or "stats" in held
    parts = [held.get(name, {}) for name in ("params", "stats")] if unfolded else [held]
    # Names without the prefixes of `nn.DataParallel` and of the folded nets' only submodule.
    numbers: dict[str, Any] = {
        str(name).removeprefix("module.").removeprefix("features."): value
        for part in parts
        if _is_dict(part)
        for name, value in part.items()
    }
    if not unfolded and "conv.weight" not in numbers:
        found = ", ".join(sorted(map(str, held))[:5]) or "nothing"
        raise Refusal(
            f"{path} has neither a dictionary `params`, as the authors' nets, nor conv.weight, as their folded ones; "
            f"it has {found}"
        )
    if unfolded and not (_is_dict(held.get("params")) and held["params"]):
        raise Refusal(f"{path} has no tensors in `params`: it is none of the authors' layouts")
    strange = [
        name
        for name, value in numbers.items()
        if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.isfinite(value).all()
    ]
    if strange:
        raise Refusal(f"{path}: not a tensor of finite real numbers: {first_of(strange, 5)}")
    tensors = {name: value.detach().float() for name, value in numbers.items()}
    eyes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("eye")}
    return Saved(tensors, eyes, folded=not unfolded)


def _read_pickle(path: Path, content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen unrelated kinds
        raise Refusal(
            f"{path} is not a file of tensors in plain containers, or is cut short ({type(error).__name__}); "
            "nothing in it was executed"
        ) from error


def _is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)
