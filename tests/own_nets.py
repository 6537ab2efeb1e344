"""Nets as somebody else might write them this morning: no line of this project is in them, nor knows of them."""

import torch
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    """RepVGG's block: 3x3, 1x1 and batch norm alone, of one input."""

    def __init__(self, num_in, num_out, stride=1):
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out))
        self.small = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        self.same = nn.BatchNorm2d(num_in) if (num_in, stride) == (num_out, 1) else None

    def forward(self, x):
        y = self.large(x) + self.small(x)
        return F.relu(y if self.same is None else y + self.same(x))


class Mixer(nn.Module):
    """ConvNeXt's block with batch norm: depthwise 7x7, two 1x1 with GELU between them, and a scale per channel."""

    def __init__(self, num):
        super().__init__()
        self.wide = nn.Conv2d(num, num, 7, padding=3, groups=num)
        self.norm = nn.BatchNorm2d(num)
        self.up, self.down = nn.Conv2d(num, 2 * num, 1), nn.Conv2d(2 * num, num, 1)
        self.gamma = nn.Parameter(torch.full((num, 1, 1), 0.3))

    def forward(self, x):
        return x + self.gamma * self.down(F.gelu(self.up(self.norm(self.wide(x)))))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, num):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(num, num // 4, 1), nn.Conv2d(num // 4, num, 1)

    def forward(self, x):
        return x * self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class ThisMorning(nn.Module):
    """RepVGG-like branches, layer scale, GELU, a gate, a pool that rounds up, two ends joined, and a head."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = Branches(3, 16, 2)
        self.body = nn.Sequential(Branches(16, 16), Branches(16, 32, 2), Mixer(32), Gate(32))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.logits = nn.Linear(64, num_classes)  # as an exported net's output is called

    def forward(self, x):
        x = self.body(self.stem(x))
        ends = torch.cat([self.pool(x), F.avg_pool2d(F.hardswish(x), 3, 2, 1)], 1)
        return self.logits(ends.mean((2, 3)))


class Everything(nn.Module):
    """All that a graph lists and the nets above have not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=(0, 2), dilation=(1, 2))
        self.scale = nn.Parameter(torch.tensor(1.7))
        self.leaky, self.tanh, self.clip = nn.LeakyReLU(0.2), nn.Tanh(), nn.ReLU6()
        self.soft = nn.GELU(approximate="tanh")
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = F.pad(self.leaky(self.conv(x)), (1, 0, 0, 2)) * self.scale + 0.25
        x = torch.cat([self.tanh(x[:, :4]), F.hardsigmoid(x[:, 4:])], 1)
        y = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        x = torch.cat([F.max_pool2d(x, 3, 2, 1, ceil_mode=True), y, self.clip(4 * y - 1)], 1)
        x = self.soft(x * x.sigmoid() - 0.5 * x)
        return self.head(F.silu(self.norm(F.adaptive_avg_pool2d(x, 1).flatten(1))))


def this_morning():
    return ThisMorning()


def everything():
    return Everything()


def chain():
    """RepVGG's blocks alone: what is left of them is a chain."""
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(Branches(3, 8, 2), Branches(8, 8), Branches(8, 16, 2), Branches(16, 16), *ends)


def moved(net, seed=0):
    """The net with every number away from where it starts, and classes apart."""
    torch.manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
        elif tensor.is_floating_point():
            tensor.normal_(0.3, 0.8)
    return net.eval()
