"""Which δ a tensor of the authors' is."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.refusal import Refusal
from common.spec import Delta
from train.layers import dirac_delta

FORMS: tuple[Delta, ...] = ("repeated", "first")


def delta_form(where: Path | str, name: str, eye: Tensor, shape: Sequence[int]) -> Delta | None:
    """The form of δ that `eye` is for a layer of `shape`, None where both are the same; refuses a tensor of neither."""
    fits: list[Delta] = [form for form in FORMS if _has(form, shape) and torch.equal(eye, dirac_delta(shape, form))]
    if not fits:
        raise Refusal(f"{where}: {name} is neither the repeated δ of eq. 7 and 8 nor that of torch.nn.init.dirac_")
    return fits[0] if len(fits) == 1 else None


def _has(form: Delta, shape: Sequence[int]) -> bool:
    """Whether such a layer exists: a δ is repeated a whole number of times."""
    return form == "first" or max(shape[:2]) % min(shape[:2]) == 0
