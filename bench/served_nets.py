"""The files that all servers serve: seeded random nets for 28x28 grey images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.macs import count_macs
from bench.nets import random_net
from common.files import write_whole
from common.image import decode
from common.spec import Spec
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from export.to_onnx import DEFAULT_LOWERING
from fold.lower import lower
from fold.plain import fold_net
from train.data.datasets import info_of

# Family, depth, width and nonlinearity.
SIZES = {"small": ("pooled", 16, 1.0, "relu"), "large": ("cifar", 16, 1.0, "ncrelu")}


@dataclass(frozen=True)
class ServedNet:
    """One ONNX file, and the class that it gives to each of the images."""

    path: Path
    title: str
    num_macs: int
    expected: list[int]


def write_net(size: str, folder: Path, pngs: list[bytes]) -> ServedNet:
    """Build, fold and export a net of `SIZES` into `folder`."""
    info = info_of("fashion-mnist")
    family, depth, width, nonlinearity = SIZES[size]
    spec = Spec(family, depth, width, nonlinearity, info.image, info.labels)
    plain = fold_net(random_net(spec, seed=0)).float()
    images = np.stack([decode(png, info.image) for png in pngs])
    _tell_apart(plain, images)
    model = to_onnx(lower(plain, DEFAULT_LOWERING), spec, {})
    path = write_whole(folder / f"{size}.onnx", model.SerializeToString())
    runtime = OnnxSession(path, num_threads=1)
    expected = runtime(images).argmax(axis=1).tolist()
    return ServedNet(path, f"{spec.name}, {family}, {nonlinearity}", count_macs(plain, info.image), expected)


@torch.no_grad()
def _tell_apart(plain: nn.Sequential, images: np.ndarray) -> None:
    """Standardise the logits over `images`: random weights give one class to everything, which would check nothing."""
    std, mean = torch.std_mean(plain(torch.from_numpy(images)), dim=0)
    plain.fc.weight /= std[:, None]
    plain.fc.bias.copy_((plain.fc.bias - mean) / std)
