"""From a Dirac net to a plain one: convolutions with bias, activations, pools and a classifier."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fold.passes import fold_batch_norm, split_ncrelu
from train.families import outline
from train.files import read_whole, sha256, write_whole
from train.layers import DiracConv1d, DiracConv2d, DiracConv3d, NCReLU, Normalize, Residual, dirac_weight
from train.refusal import Refusal
from train.spec import Spec

FORMAT = "diracnet-plain-1"
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
DiracConvolution = DiracConv1d | DiracConv2d | DiracConv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
MakeConvolution = Callable[..., Convolution]
CONVOLUTION_BESIDE: dict[type[BatchNorm], MakeConvolution] = {
    nn.BatchNorm1d: nn.Conv1d,
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}
PLAIN_CONVOLUTION: dict[type[Convolution], MakeConvolution] = {
    DiracConv1d: nn.Conv1d,
    DiracConv2d: nn.Conv2d,
    DiracConv3d: nn.Conv3d,
}


@dataclass(frozen=True)
class Plain:
    """A plain net read from its file."""

    net: nn.Sequential
    spec: Spec
    provenance: dict[str, Any]
    sha256: str


def fold_net(net: nn.Sequential) -> nn.Sequential:
    """A plain net in float64 with the outputs of `net` in evaluation mode; `net` stays as it was.

    Layers keep their names. Batch normalisation disappears into the convolution before it; where there
    is none, as at the start of a residual block, it becomes a convolution of one weight per channel. An
    NCReLU that follows a ReLU disappears with the half of the next filters that only ever reads zeros.
    Refuses, all in one message, the layers that it does not know.
    """
    unknown: list[str] = []
    plain, _ = _fold_sequential(net, "", nonnegative=False, unknown=unknown)
    if unknown:
        raise TypeError(f"cannot be folded: {', '.join(unknown)}")
    return plain.eval()


def named_layers(net: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The leaves of nested sequences in the order in which they run, with dotted names."""
    for name, layer in net.named_children():
        if isinstance(layer, nn.Sequential):
            yield from named_layers(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def convolution_like(layer: Convolution, weight: Tensor, bias: Tensor | None) -> Convolution:
    """An ordinary convolution of weights [N_o, N_i, ...] that strides and pads like `layer`, a Dirac one or not."""
    make = PLAIN_CONVOLUTION.get(type(layer), type(layer))
    plain = make(
        weight.shape[1] * layer.groups,
        weight.shape[0],
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    return _with_weights(plain, weight, bias)


def skeleton(spec: Spec) -> nn.Sequential:
    """The plain net of `spec` without weights, on the meta device."""
    plain = fold_net(outline(spec)).float()
    plain.normalize = Normalize(spec.image.mean, spec.image.std)
    return plain


def save_plain(path: Path, net: nn.Sequential, spec: Spec, provenance: dict[str, Any]) -> None:
    """plain.safetensors: weights and biases, and in the header the spec and what made them."""
    metadata = {"format": FORMAT, "spec": spec.to_json(), "provenance": json.dumps(provenance)}
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    write_whole(path, save(weights, metadata))


def load_plain(path: Path) -> Plain:
    """The inverse of `save_plain`; refuses what is no whole plain net of ours, or holds NaN or Inf."""
    content = read_whole(path)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise Refusal(f"{path} is no safetensors file, or is cut short: {error}") from error
    metadata = _metadata(content)
    if metadata.get("format") != FORMAT:
        raise Refusal(f"{path} is no {FORMAT} file; make one with fold/run.py")
    spec = Spec.from_json(metadata.get("spec", ""))
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise Refusal(f"{path} holds NaN or infinite values in {', '.join(bad)}: the training diverged")
    net = skeleton(spec)
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise Refusal(f"{path} does not fit its spec: {' '.join(str(error).split())[:200]}") from error
    provenance = json.loads(metadata.get("provenance", "{}"))
    return Plain(net.eval(), spec, provenance, sha256(content))


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself: JSON behind its length in eight bytes, sound where `load` reads it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__") or {}


def _fold_sequential(
    net: nn.Sequential, prefix: str, *, nonnegative: bool, unknown: list[str]
) -> tuple[nn.Sequential, bool]:
    """One level of the nest. `nonnegative` says that no value that enters (and is returned) is below zero."""
    plain: dict[str, nn.Module] = {}
    dead_half = False  # the next convolution's second half reads zeros
    for name, layer in net.named_children():
        before, last = next(reversed(plain.items()), (name, None))
        match layer:
            case nn.Sequential():
                folded, nonnegative = _fold_sequential(
                    layer, f"{prefix}{name}.", nonnegative=nonnegative, unknown=unknown
                )
                plain[name] = folded
            case DiracConv1d() | DiracConv2d() | DiracConv3d() | nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                plain[name] = _plain_convolution(layer, dead_half=dead_half)
                nonnegative = dead_half = False
            case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() if isinstance(last, Convolution):
                plain[before] = _with_batch_norm(last, layer)
            case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() if not dead_half:
                plain[name] = _with_batch_norm(_identity_beside(layer), layer)
                nonnegative = False
            case Residual() if not dead_half:
                branches = (
                    _fold_sequential(branch, f"{prefix}{name}.", nonnegative=nonnegative, unknown=unknown)[0]
                    for branch in (layer.body, layer.shortcut)
                )
                plain[name] = Residual(*branches)
                nonnegative = False
            case NCReLU() if nonnegative:
                dead_half = True
            case NCReLU():
                plain[name] = NCReLU()
            case nn.ReLU() if nonnegative:
                pass
            case nn.ReLU():
                plain[name] = nn.ReLU()
                nonnegative = True
            case nn.MaxPool2d() | nn.AdaptiveAvgPool2d() | nn.Flatten():
                plain[name] = deepcopy(layer)
            case Normalize() | nn.Linear() if not dead_half:
                plain[name] = deepcopy(layer).double().requires_grad_(False)
                nonnegative = False
            case _:
                unknown.append(f"{prefix}{name} ({type(layer).__name__})")
    result = nn.Sequential()
    for name, layer in plain.items():
        result.add_module(name, layer)
    return result, nonnegative


def _plain_convolution(layer: Convolution, *, dead_half: bool) -> Convolution:
    """A convolution of `layer`'s weights, Dirac ones folded (eq. 4), with a bias."""
    weight = layer.weight.detach().double()
    if isinstance(layer, DiracConvolution) and not weight.is_meta:
        b = None if layer.b is None else layer.b.detach().double()
        weight = dirac_weight(layer.a.detach().double(), b, layer.delta.double(), weight)
    if dead_half:
        weight, _ = split_ncrelu(weight)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return convolution_like(layer, weight, bias)


def _identity_beside(layer: BatchNorm) -> Convolution:
    """The convolution that leaves what a batch normalisation reads as it is, channel by channel."""
    num = layer.num_features
    plain = CONVOLUTION_BESIDE[type(layer)](num, num, 1, groups=num, device="meta")
    weight = layer.get_buffer("running_mean").new_ones(plain.weight.shape, dtype=torch.float64)
    return _with_weights(plain, weight, weight.new_zeros(num))


def _with_batch_norm(plain: Convolution, layer: BatchNorm) -> Convolution:
    """`plain` with the batch normalisation after it folded in."""
    if plain.weight.is_meta:  # of a skeleton: PyTorch imports its compiler, a second's work, to compute with shapes
        return plain
    parts: dict[str, Tensor] = {name: part.double() for name, part in layer.state_dict().items()}
    weight, bias = fold_batch_norm(
        plain.weight,
        plain.bias,
        gamma=parts.get("weight"),
        beta=parts.get("bias"),
        mean=parts["running_mean"],
        var=parts["running_var"],
        epsilon=layer.eps,
    )
    return _with_weights(plain, weight, bias)


def _with_weights(plain: Convolution, weight: Tensor, bias: Tensor | None) -> Convolution:
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain
