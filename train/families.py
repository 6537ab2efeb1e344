"""Table 1: from a spec to a net whose layers have names."""

from torch import nn

from train.layers import DiracConv2d, NCReLU, Normalize
from train.refusal import Refusal
from train.spec import Spec

NUM_GROUPS = 3


def build(spec: Spec) -> nn.Sequential:
    """The Dirac net of `spec`: images uint8 [N, H, W, C] → logits [N, K].

    Table 1 with what it omits: batch normalisation after every convolution, ReLU after the stem's.
    Refuses a depth that is not 6N + 4, a width below one channel and images that pool away.
    """
    if spec.family != "cifar":
        raise Refusal(f"family must be cifar, got {spec.family}")
    image, num_layers = spec.image, _layers_per_group(spec.depth)
    base = int(16 * spec.width)
    if base < 1:
        raise Refusal(f"width must be at least 1/16 (one channel in the first group), got {spec.width:g}")
    if min(image.height, image.width) < 2 ** (NUM_GROUPS - 1):
        raise Refusal(f"images must be at least 4x4 pixels, got {image.height}x{image.width}")
    net = nn.Sequential()
    net.add_module("normalize", Normalize(image.mean, image.std))
    net.add_module("stem", _stem(image.channels, base))
    num_in = base
    for group in range(NUM_GROUPS):
        num_out = base * 2**group
        if group:
            net.add_module(f"pool{group}", nn.MaxPool2d(2))
        blocks = nn.Sequential()
        for layer in range(num_layers):
            blocks.add_module(f"block{layer}", _block(num_in, num_out, spec))
            num_in = num_out
        net.add_module(f"group{group}", blocks)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(num_in, len(spec.labels)))
    return net


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers of a net: W, a, b, batch normalisation's γ and β, the classifier."""
    return sum(parameter.numel() for parameter in net.parameters())


def _layers_per_group(depth: int) -> int:
    """2N of Table 1, from depth = 6N + 4."""
    if depth < 10 or depth % 6 != 4:
        raise Refusal(f"depth must be 6N + 4 (10, 16, 22, 28, 34, ...), got {depth}")
    return (depth - 4) // NUM_GROUPS


def _stem(num_in: int, num_out: int) -> nn.Sequential:
    stem = nn.Sequential()
    stem.add_module("conv", nn.Conv2d(num_in, num_out, 3, padding=1, bias=False))
    stem.add_module("bn", nn.BatchNorm2d(num_out))
    stem.add_module("relu", nn.ReLU())
    return stem


def _block(num_in: int, num_out: int, spec: Spec) -> nn.Sequential:
    block = nn.Sequential()
    if spec.nonlinearity == "ncrelu":
        block.add_module("ncrelu", NCReLU())
        num_in *= 2
    else:
        block.add_module("relu", nn.ReLU())
    block.add_module("conv", DiracConv2d(num_in, num_out, 3, padding=1))
    block.add_module("bn", nn.BatchNorm2d(num_out))
    return block
