"""The nets that are measured: DiracNets in three forms, run by PyTorch, and nets of other papers."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.spec import ImageSpec, Spec
from export.compare import Answer
from fold.graph import GraphNet, fold
from fold.image_sets import extreme_images, random_images, real_images
from fold.nodes import Graph
from fold.plain import load_plain
from train.data.datasets import cifar_image, imagenet_image
from train.families import build
from train.layers import DiracConv2d, NCReLU, Normalize

SEEDED = ((16, 1.0), (34, 2.0))  # depth and width
NUM_CALIBRATION = 256


@dataclass(frozen=True)
class Net:
    """One net in the forms that are raced."""

    weights: str  # where they come from
    spec: Spec
    dirac: nn.Sequential
    is_same: bool  # whether `dirac` has the weights of `plain`, so that its logits can be compared
    plain: GraphNet  # float32
    real: np.ndarray | None = None  # images of its data set

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def image_sets(self) -> dict[str, np.ndarray]:
        """Images uint8 [N, H, W, C] for parity, by kind."""
        real = {} if self.real is None else {"real": self.real[:-NUM_CALIBRATION]}
        others = random_images(self.spec.image, NUM_CALIBRATION + 64)[NUM_CALIBRATION:]
        return {**real, "random": others, "extreme": extreme_images(self.spec.image)}

    @property
    def calibration(self) -> np.ndarray:
        """Other images, for the ranges of eight bits."""
        return random_images(self.spec.image, NUM_CALIBRATION) if self.real is None else self.real[-NUM_CALIBRATION:]


def seeded_net(depth: int, width: float, *, family: str = "cifar") -> Net:
    """A DiracNet of random weights."""
    spec = dirac_spec(depth, width, family=family)
    net = random_net(spec)
    return Net("random, seed 0", spec, net, True, fold(net).float())


def dirac_spec(depth: int, width: float, *, family: str = "cifar") -> Spec:
    """For images of CIFAR or, in the families of ImageNet, of ImageNet."""
    image, num_labels = (imagenet_image(), 1000) if family.startswith("imagenet") else (cifar_image(), 10)
    return Spec(family, depth, width, "ncrelu", image, tuple(f"class {index}" for index in range(num_labels)))


def random_net(spec: Spec) -> nn.Sequential:
    """The net of `spec` with every parameter and statistic off its initial value."""
    torch.manual_seed(0)
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
    training, num = plain.provenance.get("training", {}), 500 + NUM_CALIBRATION
    real, _ = real_images(plain.spec.image, training, num=num, beside=path.parent)
    torch.manual_seed(0)
    return Net(str(path), plain.spec, build(plain.spec).eval(), False, plain.net, real)


def count_weights(net: GraphNet) -> int:
    """Weights and biases of all layers; the constants that normalise pixels are none."""
    layers = (node for node in net.graph.nodes if node.op != "normalize")
    return sum(tensor.numel() for node in layers for tensor in node.tensors.values())


def count_macs(net: nn.Module, image: ImageSpec) -> int:
    """Of one image in all convolutions and linear layers, each computed directly."""
    with FlopCounterMode(display=False) as counter:
        deepcopy(net).to("meta")(torch.empty((1, *image.shape), dtype=torch.uint8, device="meta"))
    return counter.get_total_flops() // 2


class ReferenceDiracConv2d(DiracConv2d):
    """Eq. 4 term by term: a and b expanded to a value per filter, δ dense, filters normalised as rows of a matrix."""

    def folded_weight(self) -> Tensor:
        a, b = (scale.expand(self.out_channels).view(-1, 1, 1, 1) for scale in (self.a, self.b))
        normalized = F.normalize(self.weight.flatten(1)).view(self.weight.shape)
        return a.expand_as(self.delta) * self.delta + b.expand_as(normalized) * normalized


class ReferenceNCReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), -(-x).relu()], dim=1)


def reference_form(net: nn.Sequential, kinds: tuple[type[nn.Module], ...] = (DiracConv2d, NCReLU)) -> nn.Sequential:
    """A Dirac net as a user has it before this project: every weight made anew at each call.

    Its layers of `kinds` are in the form of the authors' release; they share the parameters, which an optimizer may
    hold.
    """
    layers = (layer for layer in net.modules() if not isinstance(layer, nn.Sequential))
    return nn.Sequential(*(_reference(layer) if isinstance(layer, kinds) else layer for layer in layers))


def _reference(layer: nn.Module) -> nn.Module:
    if isinstance(layer, NCReLU):
        return ReferenceNCReLU()
    reference = ReferenceDiracConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    reference.a, reference.b = layer.a, layer.b
    reference.register_parameter("weight", layer.weight)
    return reference


def divided(net: nn.Sequential | GraphNet) -> tuple[nn.Module, nn.Module]:
    """The normalisation of pixels, and all that comes after it."""
    if isinstance(net, nn.Sequential):
        return net[0], net[1:]
    start, normalize, *rest = net.graph.nodes
    after = (node.reading({normalize.name: start.name}) for node in rest)
    return GraphNet(Graph((start, normalize))), GraphNet(Graph((start, *after)))


def torch_answer(net: nn.Sequential | GraphNet, *, device: str = "cpu", **options: Any) -> Answer:
    """`on_device` for pixels and logits on the host."""
    torch.backends.cudnn.benchmark = True
    run = on_device(net, device, **options)

    @torch.inference_mode()
    def answer(images: np.ndarray) -> np.ndarray:
        return run(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return answer


def on_device(
    net: nn.Sequential | GraphNet,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    is_compiled: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A copy of `net` in PyTorch. Pixels are normalised in float32 at least, as in the ONNX graph."""
    normalize, rest = divided(deepcopy(net).eval().to(device))
    normalize = normalize.to(torch.promote_types(dtype, torch.float32))
    rest = rest.to(dtype).to(memory_format=layout)
    run: Callable[[Tensor], Tensor] = rest
    if is_compiled:
        # Recompilations are limited, those of earlier nets count, and what is over the limit would run eagerly.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Replaying CUDA graphs is what makes small batches fast; the CPU has none.
        run = torch.compile(rest, dynamic=False, mode="reduce-overhead" if device == "cuda" else "default")
    return lambda x: run(normalize(x).to(dtype, memory_format=layout))


def wide_resnet(depth: int, width: float, spec: Spec) -> GraphNet:
    """Pre-activation blocks: the batch normalisation at their start folds into one weight for each channel."""
    settings = replace(spec, family="wrn", depth=depth, width=width, nonlinearity="relu", parameterization="plain")
    return fold(random_net(settings)).float()


def resnet18(spec: Spec) -> GraphNet:
    torch.manual_seed(0)
    return _folded(spec, torchvision.models.resnet18(num_classes=len(spec.labels)))


def repvgg(widths: Sequence[int], early_stride: int, spec: Spec) -> GraphNet:
    """RepVGG's deployed form: 3x3 convolutions and ReLUs; the first two stages have `early_stride`, the others 2."""
    torch.manual_seed(0)
    layers, num_in = [], spec.image.channels
    for stage, (num_blocks, num_out) in enumerate(zip(A0_BLOCKS, widths, strict=True)):
        for block in range(num_blocks):
            stride = 1 if block else early_stride if stage < 2 else 2
            layers += [nn.Conv2d(num_in, num_out, 3, stride, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight)  # or 22 layers would leave nothing of the images
            num_in = num_out
    return _folded(spec, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, len(spec.labels)))


def _folded(spec: Spec, *layers: nn.Module) -> GraphNet:
    return fold(nn.Sequential(Normalize(spec.image.mean, spec.image.std), *layers).eval()).float()


A0_BLOCKS, A0_WIDTHS = (1, 2, 4, 14, 1), (48, 48, 96, 192, 1280)
PEERS: dict[str, Callable[[Spec], GraphNet]] = {  # from the spec of a DiracNet, for images and labels
    "WRN-40-2": partial(wide_resnet, 40, 2.0),
    "WRN-16-1": partial(wide_resnet, 16, 1.0),
    "ResNet-18": resnet18,
    "RepVGG-A0": partial(repvgg, A0_WIDTHS, 2),
    "RepVGG-A0 at 32x32": partial(repvgg, A0_WIDTHS, 1),
    "RepVGG-A0/3 at 32x32": partial(repvgg, tuple(width // 3 for width in A0_WIDTHS), 1),
}
_WITHOUT_STRIDES = "none published: a chain of its stages without the strides of stem and first stage"
PUBLISHED = {
    "DiracNet-34-2": "5.6 % error on CIFAR-10 (table 2)",
    "DiracNet-18-0.75": "32.30 % top-1 error on ImageNet (table 3)",
    "WRN-40-2": "5.33 % error on CIFAR-10 (arXiv 1605.07146, table 4)",
    "WRN-16-1": "8.77 % error on CIFAR-10 (arXiv 1612.03928, table 1)",
    "ResNet-18": "30.50 % top-1 error on ImageNet (arXiv 1706.00388, table 3)",
    "RepVGG-A0": "27.59 % top-1 error on ImageNet (arXiv 2101.03697, table 4)",
    "RepVGG-A0 at 32x32": _WITHOUT_STRIDES,
    "RepVGG-A0/3 at 32x32": _WITHOUT_STRIDES,
}
