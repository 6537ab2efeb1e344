"""The algebra of the fold: pure functions on tensors, in whatever precision they are given."""

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    *,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """A convolution and the batch normalisation after it as one convolution: (weight, bias).

    `weight` [N_o, ...] must be a folded one (eq. 4): scaled before, a Dirac filter would be normalised
    again and lose the scale. The statistics are per output channel, [N_o].
    """
    s = 1 / torch.sqrt(var + epsilon)
    if gamma is not None:
        s = gamma * s
    shift = -s * mean if bias is None else s * (bias - mean)
    if beta is not None:
        shift = shift + beta
    return s.view(-1, *[1] * (weight.dim() - 1)) * weight, shift


def split_ncrelu(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[W1 W2] of eq. 10: the filters' halves that read max(x, 0) and min(x, 0)."""
    w1, w2 = weight.chunk(2, dim=1)
    return w1, w2
