"""Small nets for the fold, with every number moved away from its start, and how far a fold is off."""

from collections import Counter

import torch
from torch import nn

from common.difference import difference
from fold.graph import fold

# Folding reorders some hundred roundings of 2^-53 for each output.
TOLERANCE = 1e-13


class Sum(nn.Module):
    """The sum of branches of one input; `sum` begins with 0 +."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Lambda(nn.Module):
    """What a forward does with layers: Lambda(lambda x, a, b: a(x) + b(x), a, b)."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def moved(net, seed=0):
    torch.manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.dim() < 2:
            tensor.normal_(0.3, 0.8)
    return net.double().eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def error(net, plain, x):
    with torch.no_grad():
        return difference(net(x).numpy(), plain(x).numpy()).relative


def conv(num_in=4, num_out=4, size=3, **how):
    return nn.Conv2d(num_in, num_out, size, **{"padding": 0 if isinstance(size, tuple) else size // 2, **how})


def check_row(net, shape, left, *said):
    """Which operations the fold leaves, the whole of what was not merged, and outputs as before."""
    net, x = moved(net), noise(*shape)
    plain = fold(net, x)
    assert Counter(node.op for node in plain.graph.nodes) == {"input": 1, **left}
    assert plain.graph.blocked == said
    assert error(net, plain, x) < TOLERANCE
