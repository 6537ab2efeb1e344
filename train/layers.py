"""The paper's two building blocks: Dirac-parameterised convolutions and NCReLU."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.refusal import Refusal
from common.spec import Delta, Parameterization

EPSILON = 1e-12  # eq. 5; the authors' value
A_0 = 5.0  # section 3.3
B_0 = 1e-3  # section 2


def dirac_delta(shape: Sequence[int], form: Delta = "repeated") -> Tensor:
    """The δ tensor of eq. 2, repeated as eq. 7 and eq. 8 say where N_i and N_o differ.

    `form` "first" leaves the repetitions out: ones on the first min(N_i, N_o) channels alone.
    `shape` is [N_o, N_i, K_1, ..., K_L]. Repeating refuses N_o and N_i of which neither is a multiple of the other.
    """
    num_out, num_in, *kernel = shape
    if min(num_out, num_in) < 1 or (form == "repeated" and max(num_out, num_in) % min(num_out, num_in)):
        raise Refusal(
            f"input and output channels must be multiples of each other (N_i = m N_o or N_o = m N_i), "
            f"got {num_in} and {num_out}"
        )
    delta = torch.zeros(tuple(shape))
    i = torch.arange(max(num_out, num_in) if form == "repeated" else min(num_out, num_in), device="cpu")
    centre = [size // 2 for size in kernel]
    delta[(i % num_out, i % num_in, *centre)] = 1
    return delta


def normalize_filters(weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    """W_norm: every filter (all dimensions but the first) scaled to unit Euclidean norm, eq. 5."""
    dims = tuple(range(1, weight.dim()))
    return weight / torch.linalg.vector_norm(weight, dim=dims, keepdim=True).clamp_min(epsilon)


def dirac_weight(a: Tensor, b: Tensor | None, delta: Tensor, weight: Tensor) -> Tensor:
    """Ŵ = a δ + b W_norm (eq. 4), or a δ + W (eq. 3) where `b` is None.

    `a` and `b` are scalars [] or have a value for every output channel [N_o].
    """
    per_filter = (-1, *[1] * (weight.dim() - 1))
    if b is not None:
        weight = b.view(per_filter) * normalize_filters(weight)
    return a.view(per_filter) * delta + weight


class _DiracConv(nn.modules.conv._ConvNd):
    """Ŵ in place of a convolution's weight; `weight` is W.

    `parameterization` says what `a` and `b` are: scalars (eq. 4, "dirac"), one for every output channel
    ("per-channel"), a scalar `a` and a `b` for every output channel ("per-output-b"), a scalar `a` alone
    (eq. 3, "unnormalized"), or neither (eq. 14, "delta"). `delta_form`: see `dirac_delta`.
    """

    delta: Tensor
    a: Tensor
    b: Tensor | None

    def __init__(
        self,
        *args,
        parameterization: Parameterization = "dirac",
        delta_form: Delta = "repeated",
        bias: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, bias=bias, **kwargs)
        if self.groups != 1:
            raise Refusal(f"a Dirac convolution has one group, got {self.groups}")
        self.register_buffer("delta", dirac_delta(self.weight.shape, delta_form), persistent=False)
        one, each = (), (self.out_channels,)  # the shapes of a and b
        shapes = {"dirac": (one, one), "per-channel": (each, each), "per-output-b": (one, each)}
        shapes |= {"unnormalized": (one, None), "delta": (None, None)}
        if parameterization not in shapes:
            raise Refusal(f"a Dirac convolution has no parameterization {parameterization}")
        of_a, of_b = shapes[parameterization]
        if of_a is None:
            self.register_buffer("a", torch.tensor(1.0), persistent=False)
        else:
            self.a = nn.Parameter(torch.full(of_a, A_0))
        self.b = None if of_b is None else nn.Parameter(torch.full(of_b, B_0))

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses another weight or bias: `fuse_conv_bn_eval` would scale W, which eq. 5 then normalises again."""
        known = self.__dict__.get("_parameters", {})
        if name in ("weight", "bias") and name in known and isinstance(value, nn.Parameter):
            raise Refusal(
                f"the {name} of a Dirac convolution is not replaced: batch norm is not fused into it before the fold "
                f"(use fold.graph.fold); to load numbers, copy them into {name} under torch.no_grad()"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)  # W ~ N(0, 1), section 2
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def folded_weight(self) -> Tensor:
        return dirac_weight(self.a, self.b, self.delta, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.folded_weight(), self.bias)


class DiracConv1d(_DiracConv, nn.Conv1d):
    """x [N, N_i, L] → [N, N_o, L']; arguments as `nn.Conv1d`, without groups, bias off."""


class DiracConv2d(_DiracConv, nn.Conv2d):
    """x [N, N_i, H, W] → [N, N_o, H', W']; arguments as `nn.Conv2d`, without groups, bias off."""


class DiracConv3d(_DiracConv, nn.Conv3d):
    """x [N, N_i, D, H, W] → [N, N_o, D', H', W']; arguments as `nn.Conv3d`, without groups, bias off."""


class _NCReLU(torch.autograd.Function):
    """Both halves written straight into their places, and only x kept: training is 8 % faster than with `cat`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        num, channels, *size = x.shape
        y = torch.empty((num, 2 * channels, *size), dtype=x.dtype, device=x.device, memory_format=layout)
        torch.clamp(x, min=0, out=y[:, :channels])
        torch.clamp(x, max=0, out=y[:, channels:])  # -ρ(-x) = min(x, 0)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as torch calls it
        (x,) = ctx.saved_tensors
        positive, negative = gradient.chunk(2, dim=1)
        return torch.where(x > 0, positive, negative)


@torch.fx.wrap  # a single node of a trace: the halves' own memory cannot be traced
def ncrelu(x: Tensor, dims: int | None = None) -> Tensor:
    """x [N, C, ...] → [N, 2C, ...], eq. 9; with `dims` spatial dimensions also [C, ...] → [2C, ...]."""
    if torch.compiler.is_compiling() and (dims is None or x.dim() == dims + 2):
        # The same as `_NCReLU`, without an autograd function, which would break the compiled graph.
        return torch.cat([torch.where(x > 0, x, 0.0), torch.where(x > 0, 0.0, x)], dim=1)
    if dims is None or x.dim() == dims + 2:
        return _NCReLU.apply(x)
    if x.dim() != dims + 1:
        raise Refusal(f"NCReLU of {dims} spatial dimensions takes [C, ...] or [N, C, ...], got {list(x.shape)}")
    return _NCReLU.apply(x.unsqueeze(0)).squeeze(0)


class NCReLU(nn.Module):
    """x [N, C, ...] → [N, 2C, ...]: positive half, then negative half, eq. 9.

    `dims` is the number of spatial dimensions, where x may come without N: [C, H, W] with `dims` of 2.
    Left out, x is a batch: nothing tells an unbatched image [C, H, W] from a batch of signals [N, C, L].
    """

    def __init__(self, dims: int | None = None) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]  # which knows no autograd function
            return torch.cat([x.clamp(min=0), x.clamp(max=0)], dim=1 if self.dims is None else -1 - self.dims)
        return ncrelu(x, self.dims)


class Residual(nn.Module):
    """y = body(x) + shortcut(x), eq. 13; an empty shortcut is the identity. For the nets of comparison."""

    def __init__(self, body: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


def sequence(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class Normalize(nn.Module):
    """images uint8 [N, H, W, C] → x [N, C, H, W] of zero mean and unit deviation, in the buffers' type.

    The first layer of every net, so that training and serving cannot normalise differently. It does
    not fold: zero padding comes after it.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([255 * m for m in mean]).view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # A permuted NHWC tensor is a channels-last NCHW one: no copy.
        return (images.permute(0, 3, 1, 2).to(self.scale.dtype) - self.offset) * self.scale
