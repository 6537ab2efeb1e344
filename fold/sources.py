"""What fold/run.py folds: a checkpoint of this project, or a net that its user made. Both end as the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.files import read_whole
from common.refusal import Refusal
from common.spec import ImageSpec, Spec
from fold.graph import GraphNet
from fold.nodes import Graph, Node
from fold.plain import RESERVED, PlainNet, fold_net
from fold.rules import simplify
from fold.tracing import trace
from fold.user_net import Made, from_file, from_timm
from fold.weights import load_weights
from train.checkpoint import Checkpoint, load_checkpoint, load_net
from train.families import count_parameters
from train.layers import Normalize


@dataclass(frozen=True)
class Source:
    """A net of images uint8 [N, H, W, C], its plain form in float64, and what is known of both."""

    net: nn.Module
    plain: PlainNet
    spec: Spec
    training: Mapping[str, Any]  # a checkpoint's config: which images it learnt from; empty where nobody says
    provenance: dict[str, Any]
    beside: Path  # the folder that the plain file goes to
    traced: Graph | None = None  # of a net that is a graph
    said: tuple[str, ...] = ()  # lines for people


@dataclass(frozen=True)
class Asked:
    """What a user says of a net of their own; empty where nothing."""

    weights: Path | None
    image_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    labels: tuple[str, ...]


def from_checkpoint(given: Path) -> Source:
    """A checkpoint, or of a run's folder the one to take."""
    path, checkpoint, choice = _choose(given)
    net = load_net(checkpoint)
    record = {"checkpoint_sha256": checkpoint.sha256, "dirac_parameters": count_parameters(net)}
    provenance = {"training": checkpoint.training_record(), "fold": record}
    said = (choice,) if choice else ()
    return Source(net, fold_net(net), checkpoint.spec, checkpoint.config, provenance, path.parent, said=said)


def _choose(given: Path) -> tuple[Path, Checkpoint, str]:
    """The checkpoint that `given` means, and which one that is where a run's folder has two."""
    last, best = ((given if given.is_dir() else given.parent) / name for name in ("checkpoint.pt", "best.pt"))
    path = given if not given.is_dir() else best if best.exists() else last
    state = load_checkpoint(path)
    if path not in (last, best) or not (last.exists() and best.exists()):
        return path, state, f"folding {path}" if given.is_dir() else ""
    score = state.history[-1]["validation_accuracy"] if state.history else None
    share = "" if score is None else f", {100 * score:.2f} % of the validation images"
    other = "best.pt is the epoch with the best validation" if path == last else "chosen by validation"
    return path, state, f"folding {path}: epoch {state.epoch}{share}; {other}"


def from_user(net: str | None, timm: str | None, asked: Asked) -> Source:
    """Refuses, in one line, a net that cannot be made, filled, traced or folded, or that classifies no images."""
    made = from_timm(timm, num_classes=len(asked.labels) or None) if timm else from_file(net or "")
    weights = load_weights(made.net, asked.weights) if asked.weights else None
    said = () if weights else (f"no --weights: the numbers are those that {net or 'timm'} starts from, seed 0",)
    return from_made(replace(made, record={**made.record, "weights_sha256": weights}), asked, said=said)


def from_made(made: Made, asked: Asked, *, said: tuple[str, ...] = ()) -> Source:
    """The same of a net with its numbers."""
    body = made.net.float().eval()
    image, assumed = _image(body, made, asked)
    reference, example = _of_images(body, image), _example(image)
    num_classes = _num_classes(reference, example)
    labels = asked.labels or made.labels or tuple(f"class {index}" for index in range(num_classes))
    if len(labels) != num_classes:
        raise Refusal(f"the net has {num_classes} classes, and there are {len(labels)} labels; give one for each")
    if not (asked.labels or made.labels):
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
    said = (*said, *assumed, folded, *map("not merged: {}".format, plain.graph.blocked))
    return Source(reference, plain, Spec.of_net(made.name, image, labels), {}, {"fold": record}, Path(), traced, said)


def _image(body: nn.Module, made: Made, asked: Asked) -> tuple[ImageSpec, tuple[str, ...]]:
    """How an image becomes the input, and what was assumed of it."""
    size = asked.image_size or made.image_size
    if len(size) not in (1, 2):
        raise Refusal("say how large the net's images are: --image-size 224, or --image-size HEIGHT WIDTH")
    height, width = size[0], size[-1]
    resize = asked.resize or (made.resize if not asked.image_size else None)
    own = _own_normalize(body)
    if own is not None:
        if asked.mean or asked.std:
            raise Refusal("the net normalizes by itself, with train.layers.Normalize; leave --mean and --std out")
        mean = tuple(value.item() / 255 for value in own.offset.flatten())
        std = tuple(1 / (255 * value.item()) for value in own.scale.flatten())
        return ImageSpec(height, width, len(mean), mean, std, resize), ()
    channels = max(len(asked.mean), len(asked.std)) or len(made.mean) or _num_channels(body, height, width)
    mean = asked.mean or made.mean or (0.0,) * channels
    std = asked.std or made.std or (1.0,) * channels
    assumed = [
        f"--{name} {value:g}"
        for name, value, given in (("mean", 0, asked.mean or made.mean), ("std", 1, asked.std or made.std))
        if not given
    ]
    said = (f"assumed: {', '.join(assumed)}, of pixels from 0 to 1",) if assumed else ()
    if resize is None:
        said += (f"images are stretched to {height}x{width}; --resize scales the shorter side and crops instead",)
    return ImageSpec(height, width, channels, mean, std, resize), said


def _own_normalize(body: nn.Module) -> Normalize | None:
    return next((layer for layer in body.modules() if isinstance(layer, Normalize)), None)


def _num_channels(body: nn.Module, height: int, width: int) -> int:
    """3, or 1 where the net takes that alone."""
    for channels in (3, 1):
        try:
            with torch.no_grad():
                body(torch.zeros(2, channels, height, width))
        except Exception:  # whatever the net's own code raises; said when the net is run in earnest
            continue
        return channels
    return 3


def _of_images(body: nn.Module, image: ImageSpec) -> nn.Module:
    """The net with its pixels' normalisation before it."""
    if _own_normalize(body) is not None:
        return body
    return nn.Sequential(Normalize(image.mean, image.std), body).eval()


def _example(image: ImageSpec) -> Tensor:
    shape = (2, image.height, image.width, image.channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _num_classes(net: nn.Module, example: Tensor) -> int:
    _, height, width, channels = example.shape
    taken = f"{channels} channel{'s' * (channels > 1)} of {height}x{width}"
    try:
        with torch.no_grad():
            answer = net(example)
    except Exception as error:  # whatever the net's own code raises
        line = " ".join(str(error).split())[:200]
        raise Refusal(f"the net does not take images of {taken}: {type(error).__name__}: {line}") from error
    if not isinstance(answer, Tensor):
        raise Refusal(f"the net answers a {type(answer).__name__}; a classifier answers one tensor, [N, classes]")
    if answer.dim() != 2 or len(answer) != len(example) or answer.shape[1] < 2:
        shown = ", ".join(map(str, answer.shape[1:]))
        raise Refusal(f"the net answers [N, {shown}] to images of {taken}; a classifier answers [N, classes]")
    return answer.shape[1]


def _traced(body: nn.Module, reference: nn.Module, example: Tensor, image: ImageSpec) -> Graph:
    """The graph of images; nodes have the names of the user's own net, as if nothing were before it."""
    if body is reference:
        return _renamed(trace(body, example))
    normalize = Normalize(image.mean, image.std)
    graph = _renamed(trace(body, normalize(example)))
    start, taken = graph.nodes[0], {node.name for node in graph.nodes}
    name = "normalize"
    while name in taken:
        name += "_"
    tensors = {"offset": normalize.offset.double(), "scale": normalize.scale.double()}
    first = Node(name, "normalize", (start.name,), {}, tensors)
    rest = [
        replace(node, inputs=tuple(name if source == start.name else source for source in node.inputs))
        for node in graph.nodes[1:]
    ]
    return replace(graph, nodes=(start, first, *rest))


def _renamed(graph: Graph) -> Graph:
    """No node is called as the input or output of an exported net."""
    taken = {node.name for node in graph.nodes}
    names = {name: name for name in taken}
    for name in RESERVED:
        while names.get(name, "") in (*RESERVED, *(taken - {name})) and name in names:
            names[name] += "_"
    nodes = (
        replace(node, name=names[node.name], inputs=tuple(names[source] for source in node.inputs))
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


def read_labels(path: Path) -> tuple[str, ...]:
    """One label a line; an empty line at the end is none."""
    try:
        return tuple(line.strip() for line in read_whole(path).decode("utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not a text file in UTF-8; write one label a line") from error
