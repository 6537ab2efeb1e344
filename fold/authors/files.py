"""The authors' files as tensors by name: PyTorch's pickles, old and new, and hickle's HDF5. Nothing is executed."""

# pyright: basic
# h5py has no types.

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.refusal import Refusal, first_of
from train.checkpoint import read_pickle

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# The largest tensor of the authors' nets has 38 MB; a file of a few bytes can announce any size.
LARGEST_DATASET_BYTES = 1 << 30


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
    held = _read_hdf5(path, content) if content.startswith(HDF5_SIGNATURE) else _read_pickle(path, content)
    if not isinstance(held, dict):
        raise Refusal(f"{path} holds a {type(held).__name__}, not the dictionary of an authors' file")
    unfolded = "params" in held or "stats" in held
    parts = [held.get(name, {}) for name in ("params", "stats")] if unfolded else [held]
    # Names without the prefixes of `nn.DataParallel` and of the folded nets' only submodule.
    numbers: dict[str, Any] = {
        str(name).removeprefix("module.").removeprefix("features."): value
        for part in parts
        if isinstance(part, dict)
        for name, value in part.items()
    }
    if not unfolded and "conv.weight" not in numbers:
        found = ", ".join(sorted(map(str, held))[:5]) or "nothing"
        raise Refusal(
            f"{path} has neither a dictionary `params`, as the authors' nets, nor conv.weight, as their folded ones; "
            f"it has {found}"
        )
    if unfolded and not (isinstance(held.get("params"), dict) and held["params"]):
        raise Refusal(f"{path} has no tensors in `params`: it is none of the authors' layouts")
    if strange := [
        name
        for name, value in numbers.items()
        if not isinstance(value, Tensor) or not value.is_floating_point() or not torch.isfinite(value).all()
    ]:
        raise Refusal(f"{path}: not a tensor of finite real numbers: {first_of(strange, 5)}")
    tensors = {name: value.detach().float() for name, value in numbers.items()}
    eyes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("eye")}
    return Saved(tensors, eyes, folded=not unfolded)


def _read_pickle(path: Path, content: bytes) -> Any:
    fault = f"{path} is not a file of tensors in plain containers, or is cut short"
    return read_pickle(content, lambda kind: f"{fault} ({kind}); nothing in it was executed")


def _read_hdf5(path: Path, content: bytes) -> Any:
    """Nested dictionaries of float32 tensors, read by h5py alone: hickle itself would run the pickles in a file.

    Refuses other content, and what hickle would not write.
    """
    try:
        import h5py
    except ImportError as error:
        raise Refusal(f"{path} is HDF5, and h5py is not installed: pip install 'diracnet-road[hdf5]'") from error
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            return _unwrapped(dict(_members(path, file, set())))
    except Refusal:
        raise
    except Exception as error:  # damage shows as OSError, RuntimeError, KeyError, ValueError or RecursionError
        raise Refusal(f"{path} is a damaged HDF5 file, or is cut short ({type(error).__name__})") from error


def _members(path: Path, group: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """The members of a group by name: tensors, and dictionaries for inner groups.

    hickle writes a dictionary as a group, and each of its keys as another, with the value as `data_0`; since
    hickle 3, keys are quoted.
    """
    import h5py

    for name in group:
        where = f"{path}: {group.name.rstrip('/')}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Refusal(f"{where} points to another place, which is not followed")
        member = group[name]
        if member.id in seen:  # equal for the same object, whatever its path
            raise Refusal(f"{where} is in the file twice; hickle writes everything once")
        seen.add(member.id)
        if isinstance(member, h5py.Group):
            yield _unquoted(name), _unwrapped(dict(_members(path, member, seen)))
        else:
            yield _unquoted(name), _tensor(where, member)


def _tensor(where: str, dataset: Any) -> Tensor:
    if dataset.dtype.kind != "f":
        raise Refusal(f"{where} holds {dataset.dtype}, not real numbers; no text or pickle in it was executed")
    if dataset.external or dataset.is_virtual:
        raise Refusal(f"{where} takes its numbers from another file, which is not read")
    if dataset.nbytes > LARGEST_DATASET_BYTES:
        raise Refusal(f"{where} announces {dataset.nbytes:,} bytes: no tensor of the authors' nets is as large")
    return torch.tensor(np.asarray(dataset[()], np.float32))


def _unwrapped(members: dict[str, Any]) -> Any:
    return members["data_0"] if members.keys() == {"data_0"} else members


def _unquoted(name: str) -> str:
    """'conv' for conv, 'conv', u'conv' and b'conv'."""
    for quote in ("'", '"'):
        start = name.find(quote)
        if start in (0, 1) and name[:start] in ("", "u", "b") and len(name) > start + 1 and name.endswith(quote):
            return name[start + 1 : -1]
    return name
