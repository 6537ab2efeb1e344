"""The authors' folded nets: convolutions with biases, a plain net at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.refusal import Refusal
from common.spec import Nonlinearity, Parameterization
from fold.authors.files import Saved
from fold.authors.shapes import infer_spec, matched
from fold.plain import Plain, skeleton

# The published nets with each nonlinearity.
FORMS: dict[Nonlinearity, Parameterization] = {"ncrelu": "per-output-b", "relu": "per-channel"}
# What a reader of the plain file could miss: these nets came without the nets that they were folded from.
NOT_PROVEN = (
    "the authors folded this net and its Dirac net is not in their file: that the fold changed nothing cannot be "
    "shown; nonlinearity and shapes were read off the tensors, the ReLU before the last pool, a, b, δ and the "
    "preprocessing are those of the authors' definition and training code"
)


def plain_of(path: Path, saved: Saved, digest: str, *, image_size: int | None = None) -> Plain:
    """A folded net that `read_saved` gave; refuses names and shapes that no published one has.

    Both releases are for ImageNet: NCReLU in the first, ReLU in the second, ReLU before the last pool in both.
    """
    if "conv.weight" in saved.numbers and saved.numbers["conv.weight"].shape[2:] == (3, 3):
        raise Refusal(
            f"{path} is a folded CIFAR net; the authors folded ImageNet nets alone: import what it was made of"
        )
    spec = infer_spec(path, saved.numbers, leaf=".weight", forms=FORMS, image_size=image_size)
    if spec.nonlinearity == "relu":
        spec = replace(spec, delta="first")
    net = skeleton(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    wanted = {ours.removeprefix("stem."): (ours, shape) for ours, shape in shapes.items()}
    with torch.no_grad():
        net.load_state_dict(matched(path, spec, saved.numbers, wanted), assign=True)
    provenance: dict[str, Any] = {
        "training": {"authors_file": path.name, "authors_sha256": digest},
        "fold": {"by": "the authors", "not_proven": NOT_PROVEN},
    }
    return Plain(net.eval(), spec, provenance, digest)
