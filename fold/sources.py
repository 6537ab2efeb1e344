"""The nets that fold/run.py folds: checkpoints of this project and users' own nets, both as a `Source`."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.refusal import Refusal, one_line
from common.spec import ImageSpec, Spec
from fold.graph import GraphNet, fold
from fold.nodes import Graph, Node
from fold.plain import RESERVED
from fold.rules import simplify
from fold.tracing import trace
from fold.user_net import SEED, Made, from_file, from_timm, load_weights
from train.checkpoint import load_checkpoint, load_net
from train.families import count_parameters
from train.layers import Normalize


class Contiguous(Normalize):
    """`Normalize` for a user's net: its forward may use `view`, which refuses the channels-last tensors of ours."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).contiguous()


@dataclass(frozen=True)
class Source:
    """A net for images uint8 [N, H, W, C], its plain form in float64, and what is known about them."""

    net: nn.Module
    plain: GraphNet
    spec: Spec
    training: Mapping[str, Any]  # a checkpoint's config, which names the data set; empty if unknown
    provenance: dict[str, Any]
    beside: Path  # the folder for the plain file
    traced: Graph | None = None  # of a net that a user gives
    notes: tuple[str, ...] = ()  # lines for the user


def from_checkpoint(given: Path) -> Source:
    """A checkpoint, or the best one in a run's folder."""
    folder = given if given.is_dir() else given.parent
    last, best = folder / "checkpoint.pt", folder / "best.pt"
    path = given if not given.is_dir() else best if best.exists() else last
    checkpoint, note = load_checkpoint(path), f"folding {path}" if given.is_dir() else ""
    if path in (last, best) and last.exists() and best.exists():
        score = checkpoint.history[-1]["validation_accuracy"] if checkpoint.history else None
        share = "" if score is None else f", {100 * score:.2f} % of the validation images"
        other = "best.pt is the epoch with the best validation" if path == last else "chosen by validation"
        note = f"folding {path}: epoch {checkpoint.epoch}{share}; {other}"
    net = load_net(checkpoint)
    record = {"checkpoint_sha256": checkpoint.sha256, "dirac_parameters": count_parameters(net)}
    provenance = {"training": checkpoint.training_record(), "fold": record}
    notes = (note,) if note else ()
    return Source(net, fold(net), checkpoint.spec, checkpoint.config, provenance, path.parent, notes=notes)


def from_user(net: str | None, timm: str | None, weights: Path | None, **stated: Any) -> Source:
    """A net of FILE.py:FUNCTION or of timm; `stated` are fields of `Made` that the user gives, empty if not given.

    Refuses, in one line, a net that cannot be made, loaded, traced or folded, or is not an image classifier.
    """
    given = {name: value for name, value in stated.items() if value}
    made = from_timm(timm, num_classes=len(given.get("labels", ())) or None) if timm else from_file(net or "")
    digest = load_weights(made.net, weights) if weights else None
    notes = () if digest else (f"no --weights: {net or 'timm'} keeps its initial weights, seed {SEED}",)
    if "image_size" in given:
        made = replace(made, resize=None)  # which was for timm's own size
    return from_made(replace(made, record={**made.record, "weights_sha256": digest}, **given), notes=notes)


def from_made(made: Made, *, notes: tuple[str, ...] = ()) -> Source:
    """The same for a net with its weights."""
    body = made.net.float().eval()
    image, assumed = _image(body, made)
    # Pixels are normalised before the net, unless it does so itself.
    reference = body if _own_normalize(body) else nn.Sequential(Contiguous(image.mean, image.std), body).eval()
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(256, (2, *image.shape), dtype=torch.uint8, generator=generator)
    num_classes = _num_classes(reference, example)
    labels = made.labels or tuple(f"class {index}" for index in range(num_classes))
    if len(labels) != num_classes:
        raise Refusal(f"the net has {num_classes} classes, and there are {len(labels)} labels; give one for each")
    if not made.labels:
        assumed += ("no --labels: classes are called 'class 0', 'class 1', ...",)
    try:
        traced = _traced(body, reference, example, image)
    except (TypeError, ValueError) as error:
        raise Refusal(f"{made.name} {error}; docs/fold-your-own-net.md says what can be folded") from error
    plain = GraphNet(simplify(traced)).eval()
    before, after = (graph.count("conv") for graph in (traced, plain.graph))
    record = {
        **made.record,
        "convolutions": [before, after],
        "scalings": [traced.count("affine"), plain.graph.count("affine")],
        "not_merged": list(plain.graph.blocked),
    }
    folded = f"{made.name}: {before} convolutions before, {after} after"
    notes = (*notes, *assumed, folded, *map("not merged: {}".format, plain.graph.blocked))
    return Source(reference, plain, Spec.of_net(made.name, image, labels), {}, {"fold": record}, Path(), traced, notes)


def _image(body: nn.Module, made: Made) -> tuple[ImageSpec, tuple[str, ...]]:
    """How an image becomes the input, and notes on what was assumed."""
    if len(made.image_size) not in (1, 2):
        raise Refusal("say how large the net's images are: --image-size 224, or --image-size HEIGHT WIDTH")
    height, width = made.image_size[0], made.image_size[-1]
    if own := _own_normalize(body):
        if made.mean or made.std:
            raise Refusal("the net normalizes by itself, with train.layers.Normalize; leave out --mean and --std")
        mean = tuple(value.item() / 255 for value in own.offset.flatten())
        std = tuple(1 / (255 * value.item()) for value in own.scale.flatten())
        return ImageSpec(height, width, len(mean), mean, std, made.resize), ()
    channels = max(len(made.mean), len(made.std)) or _num_channels(body, height, width)
    mean, std = made.mean or (0.0,) * channels, made.std or (1.0,) * channels
    assumed = [*(() if made.mean else ("--mean 0",)), *(() if made.std else ("--std 1",))]
    notes = (f"assumed: {', '.join(assumed)}, of pixels from 0 to 1",) if assumed else ()
    if made.resize is None:
        notes += (f"images are stretched to {height}x{width}; --resize scales the shorter side and crops instead",)
    return ImageSpec(height, width, channels, mean, std, made.resize), notes


def _own_normalize(body: nn.Module) -> Normalize | None:
    return next((layer for layer in body.modules() if isinstance(layer, Normalize)), None)


def _num_channels(body: nn.Module, height: int, width: int) -> int:
    """1 if the net takes that and not 3, else 3."""
    for channels in (3, 1):
        # Whatever the net's own code raises is reported when the net runs on an example.
        with contextlib.suppress(Exception), torch.no_grad():
            body(torch.zeros(2, channels, height, width))
            return channels
    return 3


def _num_classes(net: nn.Module, example: Tensor) -> int:
    _, height, width, channels = example.shape
    taken = f"{channels} channel{'s' * (channels > 1)} of {height}x{width}"
    try:
        with torch.no_grad():
            answer = net(example)
    except Exception as error:  # whatever the net's own code raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise Refusal(f"the net does not take images of {taken}: {reason}") from error
    if not isinstance(answer, Tensor):
        raise Refusal(f"the net answers a {type(answer).__name__}; a classifier answers one tensor, [N, classes]")
    if answer.dim() != 2 or len(answer) != len(example) or answer.shape[1] < 2:
        shown = ", ".join(map(str, answer.shape[1:]))
        raise Refusal(f"the net answers [N, {shown}] to images of {taken}; a classifier answers [N, classes]")
    return answer.shape[1]


def _traced(body: nn.Module, reference: nn.Module, example: Tensor, image: ImageSpec) -> Graph:
    """The graph for images, whose nodes have the names of the user's net without the normalisation before it."""
    if body is reference:
        return _without_reserved_names(trace(body, example))
    normalize = Contiguous(image.mean, image.std)
    graph = _without_reserved_names(trace(body, normalize(example)))
    start, name = graph.nodes[0], _free_name("normalize", graph)
    tensors = {"offset": normalize.offset.double(), "scale": normalize.scale.double()}
    first = Node(name, "normalize", (start.name,), {}, tensors)
    return replace(graph, nodes=(start, first, *(node.reading({start.name: name}) for node in graph.nodes[1:])))


def _without_reserved_names(graph: Graph) -> Graph:
    """No node has the name of the input or output of an exported net."""
    names = {name: _free_name(f"{name}_", graph) for name in RESERVED}
    nodes = (replace(node, name=names.get(node.name, node.name)).reading(names) for node in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def _free_name(name: str, graph: Graph) -> str:
    taken = {node.name for node in graph.nodes}
    while name in taken:
        name += "_"
    return name
