"""python fold/draw.py checkpoint.pt: draw the parts of a filter, before and after folding."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.layers import DiracConv2d

PARTS = ("a δ", "b W_norm", "a δ + b W_norm", "folded with batch norm")
EXAMPLES = (
    "python fold/draw.py runs/digits-16-1/checkpoint.pt     # writes fold.png beside it",
    "python fold/draw.py runs/digits-16-1/checkpoint.pt --layers group0.block1.conv group2.block3.conv",
)


@dataclass(frozen=True)
class DrawConfig:
    checkpoint: Annotated[Path, "a checkpoint of train/run.py"]
    layers: Annotated[tuple[str, ...], "convolutions to draw (default: first, middle and last)"] = ()
    channels: Annotated[int, "how many inputs and outputs to show"] = 32
    out: Annotated[Path | None, "file to write (default: fold.png beside the checkpoint)"] = None


def command(config: DrawConfig) -> int:
    """Draw the central slice of trained filters: a δ, b W_norm, their sum, and the plain filter."""
    from matplotlib.figure import Figure

    from common.figure import png
    from common.files import write_whole
    from fold.graph import fold
    from train.checkpoint import load_checkpoint, load_net

    net = load_net(load_checkpoint(config.checkpoint))
    dirac = _dirac_layers(net, config)
    plain = fold(net).graph
    figure = Figure(figsize=(12, 2.7 * len(dirac)), layout="constrained")
    for row, (name, layer) in zip(figure.subplots(len(dirac), len(PARTS), squeeze=False), dirac.items(), strict=True):
        slices = [*central_slices(layer), _centre(plain[name].tensors["weight"])]
        for axes, title, values in zip(row, PARTS, slices, strict=True):
            shown = values[: config.channels, : config.channels].numpy()
            limit = max(abs(shown).max(), 1e-12)
            picture = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
            # matplotlib does not type this method.
            figure.colorbar(picture, ax=axes, format="%.2g")  # pyright: ignore[reportUnknownMemberType]
        num_out, num_in = slices[0].shape
        row[0].set(ylabel=f"{name}\nof {num_out} outputs", xlabel=f"of {num_in} inputs")
    out = config.out or config.checkpoint.with_name("fold.png")
    print(f"wrote {write_whole(out, png(figure))}: {', '.join(dirac)}")
    return 0


def central_slices(layer: "DiracConv2d") -> tuple["Tensor", "Tensor", "Tensor"]:
    """a δ, b W_norm and their sum (eq. 4) at the centre of the filters, each [N_o, N_i]."""
    import torch

    from train.layers import dirac_weight

    with torch.no_grad():
        whole = layer.folded_weight()
        skip = dirac_weight(layer.a, None, layer.delta, torch.zeros_like(layer.weight))
        return _centre(skip), _centre(whole - skip), _centre(whole)


def _centre(weight: "Tensor") -> "Tensor":
    return weight[(slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))]


def _dirac_layers(net: "nn.Module", config: DrawConfig) -> "dict[str, DiracConv2d]":
    """The layers to draw by name; refuses unknown names, and a net without Dirac convolutions."""
    from common.refusal import Refusal
    from train.layers import DiracConv2d

    owners = dict.fromkeys(key.rpartition(".")[0] for key in net.state_dict())  # in the order of the net
    modules = {name: net.get_submodule(name) for name in owners}
    found = {name: layer for name, layer in modules.items() if isinstance(layer, DiracConv2d)}
    if not found:
        raise Refusal(f"{config.checkpoint} has no Dirac convolution to draw: it was trained as plain")
    names = list(found)
    if missing := [name for name in config.layers if name not in found]:
        raise Refusal(f"no Dirac convolution is called {', '.join(missing)}; there are {', '.join(names)}")
    return {name: found[name] for name in config.layers or dict.fromkeys((names[0], names[len(names) // 2], names[-1]))}


if __name__ == "__main__":
    sys.exit(run_command(command, DrawConfig, examples=EXAMPLES))
