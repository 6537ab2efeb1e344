"""The nets that are measured, of random weights: DiracNets in three forms, nets of other papers, a checkpoint."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.spec import ImageSpec, Spec
from fold.image_sets import extreme_images, random_images, real_images
from fold.plain import fold_net, load_plain, named_layers
from train.checkpoint import Checkpoint, save_checkpoint
from train.data.batches import Batch
from train.data.datasets import cifar_image, imagenet_image
from train.families import build, count_parameters, initialize
from train.layers import DiracConv2d, NCReLU, Normalize, Residual
from train.trainer import make_optimizer, train_step

SEEDED = ((16, 1.0), (34, 2.0))  # depth and width
NUM_CALIBRATION = 256
A0_BLOCKS, A0_WIDTHS = (1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)


@dataclass(frozen=True)
class Net:
    """One net in the forms that are raced."""

    name: str
    weights: str  # where they come from
    spec: Spec
    dirac: nn.Sequential
    is_same: bool  # whether `dirac` has the weights of `plain`, so that its logits can be compared
    plain: nn.Sequential  # float32
    image_sets: dict[str, np.ndarray]  # images uint8 [N, H, W, C] for parity, by kind
    calibration: np.ndarray  # other images, for the ranges of eight bits


def seeded_net(depth: int, width: float, *, family: str = "cifar", seed: int = 0) -> Net:
    """A DiracNet of random weights for images of CIFAR or, in the families of ImageNet, of ImageNet."""
    image, num_labels = (imagenet_image(), 1000) if family.startswith("imagenet") else (cifar_image(), 10)
    spec = Spec(family, depth, width, "ncrelu", image, tuple(f"class {index}" for index in range(num_labels)))
    net = random_net(spec, seed=seed)
    return Net(spec.name, f"random, seed {seed}", spec, net, True, fold_net(net).float(), *_random_sets(image))


def random_net(spec: Spec, *, seed: int = 0) -> nn.Sequential:
    """The net of `spec` with every parameter and statistic off its initial value."""
    torch.manual_seed(seed)
    net = build(spec).eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            match name.rpartition(".")[2]:
                case "running_var":
                    tensor.uniform_(0.5, 2)
                case "a":
                    tensor.uniform_(0.5, 1.5)
                case "b":
                    tensor.normal_(0, 0.5)
                case "running_mean" | "bias":
                    tensor.normal_(0, 0.2)
                case "weight" if ".bn" in name:
                    tensor.uniform_(0.7, 1.2)
    return net


def net_of_file(path: Path) -> Net:
    """A plain net of fold/run.py. The fold left no Dirac form: that has random weights."""
    plain = load_plain(path)
    image_sets, calibration = _random_sets(plain.spec.image)
    real, _ = real_images(plain.spec.image, plain.provenance.get("training", {}), num=500 + NUM_CALIBRATION)
    if real is not None:
        calibration, image_sets = real[-NUM_CALIBRATION:], {"real": real[:-NUM_CALIBRATION], **image_sets}
    torch.manual_seed(0)
    dirac = build(plain.spec).eval()
    return Net(plain.spec.name, str(path), plain.spec, dirac, False, plain.net, image_sets, calibration)


def count_macs(net: nn.Module, image: ImageSpec) -> int:
    """Of one image in all convolutions and linear layers, each computed directly."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * prod(layer.weight.shape[1:])

    net = deepcopy(net).to("meta")
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    net(torch.empty((1, image.height, image.width, image.channels), dtype=torch.uint8, device="meta"))
    return total


def make_checkpoint(depth: int, width: float, path: Path, *, seed: int = 0) -> int:
    """A DiracNet for CIFAR images after one step on noise, with its momentum; gives its number of parameters.

    Batch normalisation has the statistics of that step, so that activations keep their size over any depth.
    """
    torch.manual_seed(seed)
    spec = Spec("cifar", depth, width, "ncrelu", cifar_image(), tuple(f"class {index}" for index in range(10)))
    net = build(spec)
    initialize(net, a=1.0, b=0.1, std=0.03)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all steps: of the only one
    optimizer = make_optimizer(net, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_ab=True)
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(0, 0, images, torch.randint(10, (8,)))
    train_step(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, 1e-3)
    # No data set lies beside the checkpoint, so that none is read wherever this runs.
    config = {"dataset": "cifar10", "data_dir": str(path.parent), "seed": seed}
    state = Checkpoint.fresh(spec, net.state_dict(), config, optimizer=optimizer.state_dict(), epoch=1)
    save_checkpoint(path, state)
    return count_parameters(net)


class ReferenceDiracConv2d(DiracConv2d):
    """Eq. 4 term by term: a and b expanded to a value per filter, δ dense, filters normalised as rows of a matrix."""

    def folded_weight(self) -> Tensor:
        a, b = (scale.expand(self.out_channels).view(-1, 1, 1, 1) for scale in (self.a, self.b))
        normalized = F.normalize(self.weight.flatten(1)).view(self.weight.shape)
        return a.expand_as(self.delta) * self.delta + b.expand_as(normalized) * normalized


class ReferenceNCReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), -(-x).relu()], dim=1)


class Contiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


def reference_convolution(conv: DiracConv2d) -> ReferenceDiracConv2d:
    """The layer in the form of the authors' release; it shares the parameters, which an optimizer may hold."""
    reference = ReferenceDiracConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
    reference.a, reference.b = conv.a, conv.b
    reference.register_parameter("weight", conv.weight)
    return reference


def reference_form(net: nn.Sequential) -> nn.Sequential:
    """A Dirac net as a user has it before this project: every weight made anew at each call, contiguous NCHW."""

    def convert(layer: nn.Module) -> nn.Module:
        match layer:
            case DiracConv2d():
                return reference_convolution(layer)
            case NCReLU():
                return ReferenceNCReLU()
            case Normalize():
                return nn.Sequential(layer, Contiguous())
        return layer

    return nn.Sequential(*(convert(layer) for _, layer in named_layers(net))).eval()


@dataclass(frozen=True)
class Peer:
    """`make` takes the spec of the DiracNet, for images and labels."""

    published: str
    make: Callable[[Spec], nn.Sequential]


def wide_resnet(depth: int, width: float, spec: Spec) -> nn.Sequential:
    """Pre-activation blocks: the batch normalisation at their start folds into one weight for each channel."""
    settings = replace(spec, family="wrn", depth=depth, width=width, nonlinearity="relu", parameterization="plain")
    return fold_net(random_net(settings)).float()


def resnet18(spec: Spec) -> nn.Sequential:
    """Four groups of two blocks of two convolutions, each with the batch normalisation after it folded in."""
    net = _start(spec)
    net.append(_convolution(spec.image.channels, 64, size=7, stride=2)).append(nn.ReLU()).append(nn.MaxPool2d(3, 2, 1))
    num_in = 64
    for num_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block_stride in (stride, 1):
            body = (_convolution(num_in, num_out, stride=block_stride), nn.ReLU(), _convolution(num_out, num_out))
            shortcut = [] if num_in == num_out else [_convolution(num_in, num_out, size=1, stride=block_stride)]
            net.append(Residual(nn.Sequential(*body), nn.Sequential(*shortcut))).append(nn.ReLU())
            num_in = num_out
    return _finish(net, num_in, spec)


def repvgg(widths: Sequence[int], strides: Sequence[int], spec: Spec) -> nn.Sequential:
    """RepVGG's deployed form: 3x3 convolutions and ReLUs; a stage's first convolution has its stride."""
    net, num_in = _start(spec), spec.image.channels
    for num_blocks, num_out, stride in zip(A0_BLOCKS, widths, strides, strict=True):
        for block in range(num_blocks):
            net.append(_convolution(num_in, num_out, stride=1 if block else stride)).append(nn.ReLU())
            num_in = num_out
    return _finish(net, num_in, spec)


NOT_PUBLISHED = "none published: a chain of its stages without the strides of stem and first stage"
PEERS = {
    "WRN-40-2": Peer("5.33 % error on CIFAR-10 (arXiv 1605.07146, table 4)", partial(wide_resnet, 40, 2.0)),
    "WRN-16-1": Peer("8.77 % error on CIFAR-10 (arXiv 1612.03928, table 1)", partial(wide_resnet, 16, 1.0)),
    "ResNet-18": Peer("30.50 % top-1 error on ImageNet (arXiv 1706.00388, table 3)", resnet18),
    "RepVGG-A0": Peer(
        "27.59 % top-1 error on ImageNet (arXiv 2101.03697, table 4)", partial(repvgg, A0_WIDTHS, (2, 2, 2, 2, 2))
    ),
    "RepVGG-A0 at 32x32": Peer(NOT_PUBLISHED, partial(repvgg, A0_WIDTHS, (1, 1, 2, 2, 2))),
    "RepVGG-A0/3 at 32x32": Peer(
        NOT_PUBLISHED, partial(repvgg, tuple(width // 3 for width in A0_WIDTHS), (1, 1, 2, 2, 2))
    ),
}


def _random_sets(image: ImageSpec) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Image sets for parity, and other images for calibration."""
    images = random_images(image, NUM_CALIBRATION + 64)
    return {"random": images[NUM_CALIBRATION:], "extreme": extreme_images(image)}, images[:NUM_CALIBRATION]


def _start(spec: Spec) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Normalize(spec.image.mean, spec.image.std))


def _finish(net: nn.Sequential, num_in: int, spec: Spec) -> nn.Sequential:
    net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(num_in, len(spec.labels)))
    return net.eval().requires_grad_(False)


def _convolution(num_in: int, num_out: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(num_in, num_out, size, stride=stride, padding=size // 2)
    nn.init.kaiming_normal_(convolution.weight)  # or 22 layers would leave nothing of the images
    return convolution
