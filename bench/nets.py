"""The nets that are measured: Dirac form, plain form and the images on which they are compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.image_sets import extreme_images, random_images, real_images
from fold.plain import fold_net, load_plain
from train.data import cifar_image
from train.families import build
from train.spec import ImageSpec, Spec

SEEDED = ((16, 1.0), (34, 2.0))  # depth and width
NUM_CALIBRATION = 256
WITH_WEIGHTS = (nn.Conv2d, nn.Linear)


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


def seeded_net(depth: int, width: float, *, seed: int = 0) -> Net:
    """A DiracNet for CIFAR images with random weights."""
    labels = tuple(f"class {index}" for index in range(10))
    spec = Spec("cifar", depth, width, "ncrelu", cifar_image(), labels)
    net = random_net(spec, seed=seed)
    images = random_images(spec.image, NUM_CALIBRATION + 64)
    image_sets = {"random": images[NUM_CALIBRATION:], "extreme": extreme_images(spec.image)}
    plain = fold_net(net).float()
    return Net(spec.name, f"random, seed {seed}", spec, net, True, plain, image_sets, images[:NUM_CALIBRATION])


def random_net(spec: Spec, *, seed: int) -> nn.Sequential:
    """The Dirac net of `spec` with every parameter and statistic off its initial value."""
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
                case "weight" if ".bn." in name:
                    tensor.uniform_(0.7, 1.2)
    return net


def count_macs(plain: nn.Sequential, image: ImageSpec) -> int:
    """Multiplications of a plain net's convolutions and classifier for one image."""
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(layer.weight[0].numel() * output[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in plain.modules() if isinstance(layer, WITH_WEIGHTS)]
    with torch.inference_mode():
        plain(torch.zeros(1, image.height, image.width, image.channels, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def net_of_file(path: Path) -> Net:
    """A plain net of fold/run.py. Its Dirac form, gone since the fold, is played by one of random weights."""
    plain = load_plain(path)
    image = plain.spec.image
    images = random_images(image, NUM_CALIBRATION + 64)
    calibration = images[:NUM_CALIBRATION]
    image_sets = {"random": images[NUM_CALIBRATION:], "extreme": extreme_images(image)}
    real, _ = real_images(image, plain.provenance.get("training", {}), num=500 + NUM_CALIBRATION)
    if real is not None:
        calibration, image_sets = real[-NUM_CALIBRATION:], {"real": real[:-NUM_CALIBRATION], **image_sets}
    torch.manual_seed(0)
    dirac = build(plain.spec).eval()
    return Net(plain.spec.name, str(path), plain.spec, dirac, False, plain.net, image_sets, calibration)
