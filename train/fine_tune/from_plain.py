"""Where fine-tuning of a plain file begins: opened, its batch statistics measured, and proved to be the same net."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from common.difference import TOLERANCES, difference, keeps_class
from common.progress import progress
from common.refusal import Refusal
from train.checkpoint import Checkpoint, PlainFile, load_checkpoint, read_plain_file
from train.config import Settings
from train.data.batches import Batch
from train.data.datasets import Dataset
from train.fine_tune.unfold import as_plain, unfold

Moments = dict[str, tuple[Tensor, Tensor]]  # a batch normalisation's name → mean and variance [C] of what it reads
NUM_MEASURED = 2048  # training images, as they are augmented
NUM_PROVED, PROVED_PIXELS = 64, 400_000  # images of each kind at most, and all of their pixels: float64 takes its time


@dataclass(frozen=True)
class LogitError:
    """How far the opened net's logits are from the plain file's."""

    images: str
    precision: str
    num_images: int
    relative: float
    top1_changes: int

    def __bool__(self) -> bool:
        return self.relative <= TOLERANCES[self.precision] and not self.top1_changes


def load_source(path: Path) -> Checkpoint | PlainFile:
    """The file of --init: a checkpoint, or the plain net of a family; refuses any other."""
    if path.suffix in (".onnx", ".engine"):
        raise Refusal(f"{path} is an exported file; name the plain.safetensors or checkpoint.pt that it was made of")
    if path.suffix != ".safetensors":
        return load_checkpoint(path)
    file = read_plain_file(path)
    if file.spec.net:
        raise Refusal(
            f"{path} holds {file.spec.name} as a graph, and training builds nets of its own families alone: "
            "fine-tune that net where it was made, and fold it again"
        )
    return file


def open_plain(
    file: PlainFile, settings: Settings, dataset: Dataset, batches: Iterable[Batch], device: str, console: Console
) -> Checkpoint:
    """The net of a plain file as training takes it up; refuses where it would not be the same net.

    Its batch statistics are those of `batches`, the first that it will be trained on.
    """
    torch.manual_seed(settings.seed)  # W of filters that are zero
    try:
        net = unfold(file.weights, file.spec, a=settings.a0, b=settings.b0, std=settings.w_std)
    except Refusal as refusal:
        raise Refusal(f"{file.path}: {refusal}") from refusal
    images = (batch.images for batch in batches)
    with progress(console, "measuring batch statistics", min(NUM_MEASURED, len(dataset.train))) as advance:
        moments, num_measured = measure(deepcopy(net).float().to(device), images, advance)
    if not num_measured:
        raise Refusal("none of the first training images could be read: repair them")
    standardize(net, moments)
    image = dataset.info.image
    num = max(1, min(NUM_PROVED, PROVED_PIXELS // (image.height * image.width), len(dataset.train)))
    random = np.random.default_rng(0).integers(0, 256, (num, *image.shape), dtype=np.uint8)
    image_sets = {"random": torch.from_numpy(random), "training": torch.from_numpy(dataset.train.first(num))}
    errors = prove(net, as_plain(net, file.weights), image_sets)
    if failed := [error for error in errors if not error]:
        clauses = (f"{each.precision} logits on {each.images} images differ by {each.relative:.1e}" for each in failed)
        raise Refusal(f"{file.path} cannot be opened exactly: {'; '.join(clauses)}; fold its net again")
    worst = {kind: max(error.relative for error in errors if error.precision == kind) for kind in TOLERANCES}
    kinds = " and ".join(f"{error.num_images} {error.images}" for error in errors if error.precision == "float64")
    console.print(
        f"{file.path} is open again: the logits differ by {worst['float64']:.1e} in float64 and {worst['float32']:.1e} "
        f"in float32 on {kinds} images, and no class changes; batch statistics are those of {num_measured:,} training "
        "images"
    )
    record = {"measured_on": num_measured, "logits": [vars(error) for error in errors]}
    return Checkpoint.fresh(file.spec, net.float().state_dict(), {"unfold": record}, sha256=file.sha256)


@torch.no_grad()
def prove(net: nn.Module, plain: nn.Module, image_sets: dict[str, Tensor]) -> list[LogitError]:
    """Both nets, float64, on images in float64 and in float32."""
    rows: list[LogitError] = []
    for kind, images in image_sets.items():
        for precision, tolerance in TOLERANCES.items():
            nets = (deepcopy(part).to(getattr(torch, precision)) for part in (plain, net))
            before, after = (
                torch.cat([part(batch) for batch in images.split(8)]).double().numpy(force=True) for part in nets
            )
            changes = int((~keeps_class(before, after, tolerance=tolerance)).sum())
            rows.append(LogitError(kind, precision, len(images), difference(before, after).relative, changes))
    return rows


@torch.no_grad()
def measure(
    net: nn.Module, batches: Iterable[Tensor], advance: Callable[[int], object] = lambda num: None
) -> tuple[Moments, int]:
    """Moments of what each batch normalisation of `net`, in evaluation mode, reads over `batches`; number of images."""
    net, num_images = deepcopy(net), 0  # the hooks stay in the copy
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0].double(), dim=(0, 2, 3), correction=0)
        seen.setdefault(name, []).append((mean.new_tensor(inputs[0].numel() // len(mean)), mean, var))

    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(partial(note, name))
    for images in filter(len, batches):  # empty if none of its files can be read
        net(images)
        num_images += len(images)
        advance(len(images))
    moments: Moments = {}
    for name, parts in seen.items():  # the variance within the batches, and that of their means
        nums, means, variances = (torch.stack(part) for part in zip(*parts, strict=True))
        shares = (nums / nums.sum()).view(-1, 1)
        mean = (shares * means).sum(0)
        moments[name] = mean, (shares * (variances + (means - mean) ** 2)).sum(0)
    return moments, num_images


@torch.no_grad()
def standardize(net: nn.Module, moments: Moments) -> None:
    """Give the batch normalisations these statistics, and the γ and β with which each still is the same s x + c."""
    for name, (mean, var) in moments.items():
        norm: Any = net.get_submodule(name)
        mean, var = mean.to(norm.running_mean), var.to(norm.running_var)
        before, after = ((part + norm.eps).sqrt() for part in (norm.running_var, var))
        norm.bias.add_(norm.weight * (mean - norm.running_mean) / before)
        norm.weight.mul_(after / before)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
