"""Batch normalisation's statistics measured anew, without a change to what the net answers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Moments = dict[str, tuple[Tensor, Tensor]]  # a batch normalisation's name → mean and variance [C] of what it reads


@torch.no_grad()
def measure(net: nn.Module, batches: Iterable[Tensor]) -> Moments:
    """Mean and variance of what each batch normalisation of `net`, in evaluation mode, reads over all `batches`."""
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    hooks = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):

            def note(_: nn.Module, inputs: tuple[Tensor], *, name: str = name) -> None:
                var, mean = torch.var_mean(inputs[0].double(), dim=(0, 2, 3), correction=0)
                seen.setdefault(name, []).append((inputs[0].numel() // len(mean), mean, var))

            hooks.append(layer.register_forward_pre_hook(note))
    try:
        for images in batches:
            net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _together(parts) for name, parts in seen.items()}


def _together(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of batches of so many values each: the variance within them and that of their means."""
    nums, means, variances = zip(*parts, strict=True)
    means, variances = torch.stack(means), torch.stack(variances)
    shares = torch.tensor(nums, dtype=torch.float64, device=means.device).view(-1, 1) / sum(nums)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0)


@torch.no_grad()
def standardize(net: nn.Module, moments: Moments) -> None:
    """Give the batch normalisations these statistics, and the γ and β with which each still is the same s x + c."""
    for name, (mean, var) in moments.items():
        norm = net.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = mean.to(norm.running_mean), var.to(norm.running_var)
        before, after = ((part + norm.eps).sqrt() for part in (norm.running_var, var))
        norm.bias.add_(norm.weight * (mean - norm.running_mean) / before)
        norm.weight.mul_(after / before)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
