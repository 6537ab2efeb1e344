"""The nets that are measured: Dirac form, plain form and the images on which they are compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.spec import Spec
from fold.image_sets import extreme_images, random_images, real_images
from fold.plain import fold_net, load_plain
from train.data.datasets import cifar_image, imagenet_image
from train.families import build

SEEDED = ((16, 1.0), (34, 2.0))  # depth and width
NUM_CALIBRATION = 256


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
    images = random_images(spec.image, NUM_CALIBRATION + 64)
    image_sets = {"random": images[NUM_CALIBRATION:], "extreme": extreme_images(spec.image)}
    plain = fold_net(net).float()
    return Net(spec.name, f"random, seed {seed}", spec, net, True, plain, image_sets, images[:NUM_CALIBRATION])


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
