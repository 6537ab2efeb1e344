"""A `DiracConv1d`, `2d` or `3d` of the authors' module file as a layer of this project, from a state dict."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.refusal import Refusal
from common.spec import Parameterization
from fold.authors.shapes import delta_form
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d

LAYERS = (DiracConv1d, DiracConv2d, DiracConv3d)


def dirac_layer(
    state: Mapping[str, Tensor], prefix: str = "", *, padding: int = 0, dilation: int = 1
) -> DiracConv1d | DiracConv2d | DiracConv3d:
    """The layer with the tensors `alpha`, `beta`, `delta`, `weight` and, if any, `bias`, named after `prefix`.

    A state dict lacks `padding` and `dilation`, so they are given here; the stride of the authors' module is 1.
    Refuses tensors that are missing, do not fit each other or are not finite.
    """
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    missing = [prefix + name for name in ("alpha", "beta", "delta", "weight") if prefix + name not in state]
    if missing:
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
    layer = LAYERS[weight.dim() - 3](
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),
        padding=padding,
        dilation=dilation,
        bias="bias" in tensors,
        form=forms[many],
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
