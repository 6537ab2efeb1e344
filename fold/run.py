"""python fold/run.py checkpoint.pt, or nets.py:make: make a net plain and prove that nothing changed."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import POSITIONAL, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fold.proof import Proof
    from fold.sources import Source

EXAMPLES = (
    "python fold/run.py runs/digits-16-1                    # best.pt of the run; writes plain.safetensors beside it",
    "python fold/run.py runs/digits-16-1/checkpoint.pt --out last.safetensors --json",
    "python fold/run.py nets.py:make --weights weights.safetensors --image-size 224 --mean 0.485 0.456 0.406 "
    "--std 0.229 0.224 0.225 --resize 256 --labels labels.txt",
    "python fold/run.py --timm repvgg_a0 --weights repvgg_a0.safetensors --data-dir photographs",
)
NUM_RANDOM = 8  # images for a user's own net: at 224x224, each takes a second in float64


@dataclass(frozen=True)
class FoldConfig:
    net: Annotated[
        str | None,
        "a run's folder (best.pt if it exists), a checkpoint, or FILE.py:FUNCTION that returns your own net",
        POSITIONAL,
    ] = None
    timm: Annotated[str | None, "instead: the name of a net in timm"] = None
    weights: Annotated[Path | None, "own net: its weights, .safetensors or a state dict from torch.save"] = None
    image_size: Annotated[tuple[int, ...], "own net: height and width of its images, or one number for both"] = ()
    mean: Annotated[tuple[float, ...], "own net: subtracted from each channel; black is 0, white is 1"] = ()
    std: Annotated[tuple[float, ...], "own net: divides each channel after that"] = ()
    resize: Annotated[int | None, "own net: pixels of the shorter side before the centre crop"] = None
    labels: Annotated[Path | None, "own net: a text file with one label per line"] = None
    out: Annotated[
        Path | None,
        "file to write (default: plain.safetensors, beside the checkpoint or, for an own net, in this folder)",
    ] = None
    data_dir: Annotated[
        Path | None, "folder of the data set (default: as in training); own net: a folder of images"
    ] = None
    images: Annotated[int, "test images to prove the fold on"] = 500
    json: Annotated[bool, "print the proof as JSON on stdout"] = False

    def __post_init__(self) -> None:
        if (self.net is None) == (self.timm is None):
            raise Refusal("name one net: a checkpoint, FILE.py:FUNCTION, or --timm NAME")
        flags = ("weights", "image_size", "mean", "std", "resize", "labels")
        given = [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name) not in (None, ())]
        if self.is_checkpoint and given:
            raise Refusal(f"leave out {', '.join(given)}: {self.net} is a checkpoint, which contains them")
        if self.images < 1 or min((*self.image_size, self.resize or 1)) < 1:
            raise Refusal("--images, --image-size and --resize must be at least 1")

    @property
    def is_checkpoint(self) -> bool:
        return self.net is not None and ".py" not in Path(self.net).suffix


def command(config: FoldConfig) -> int:
    """Fold a net into ordinary convolutions; writes nothing if any output changed."""
    import json
    from dataclasses import asdict

    from common.progress import make_console, progress
    from fold.plain import save_plain, stored_tensors
    from fold.proof import prove
    from train.machine import keep_large_buffers

    keep_large_buffers()
    console = make_console(json=config.json)
    source = _source(config)
    for line in source.notes:
        console.print(line, highlight=False)
    image_sets = _image_sets(config, source, console)
    with progress(console, "proving", 2 * sum(map(len, image_sets.values()))) as advance:
        proof = prove(source.net, source.plain, image_sets, traced=source.traced, advance=advance)
    _print_table(console, proof)
    if not proof:
        raise Refusal(f"nothing was written, the fold is not exact: {'; '.join(proof.failures())}")
    provenance = {**source.provenance, "fold": {**source.provenance["fold"], **proof.to_dict()}}
    out = config.out or source.beside / "plain.safetensors"
    save_plain(out, source.plain.float(), source.spec, provenance)
    num_plain = sum(tensor.numel() for tensor in stored_tensors(source.plain.graph, source.spec).values())
    console.print(f"wrote {out}: {num_plain:,} numbers, {out.stat().st_size / 1e6:.2f} MB")
    if config.json:
        print(json.dumps({"out": str(out), "logits": [asdict(end) for end in proof.ends]}))
    return 0


def _source(config: FoldConfig) -> "Source":
    from common.files import read_labels
    from fold.sources import from_checkpoint, from_user

    if config.is_checkpoint and config.net:
        return from_checkpoint(Path(config.net))
    stated = {name: getattr(config, name) for name in ("image_size", "mean", "std", "resize")}
    stated["labels"] = read_labels(config.labels) if config.labels else ()
    return from_user(config.net, config.timm, config.weights, **stated)


def _image_sets(config: FoldConfig, source: "Source", console: "Console") -> "dict[str, Tensor]":
    """Random images, and real ones if there are any; says why if not."""
    import torch

    from fold.image_sets import random_images, real_images

    image, few = source.spec.image, {} if config.is_checkpoint else {"num": NUM_RANDOM}
    where = {"data_dir": config.data_dir, "beside": source.beside}
    real, missing = real_images(image, dict(source.training), num=config.images, **where)
    random = torch.as_tensor(random_images(image, **few))
    if real is None:
        console.print(f"no real images, the proof is on random ones only: {missing}")
        return {"random": random}
    return {"random": random, "real": torch.as_tensor(real)}


def _print_table(console: "Console", proof: "Proof") -> None:
    """Relative errors, with a row for each layer with weights and a column for each precision and kind of images."""
    from common.progress import make_table

    columns = [(end.precision, end.images, end.num_images) for end in proof.ends]
    table = make_table("relative error", *(f"{precision}, {images}" for precision, images, _ in columns))
    errors = {(row.what, row.precision, row.images): f"{row.relative:.1e}" for row in (*proof.layers, *proof.ends)}
    for what in dict.fromkeys(row.what for row in (*proof.layers, *proof.ends)):
        table.add_row(what, *(errors[what, precision, images] for precision, images, _ in columns))
    table.add_section()
    table.add_row("top-1 changes", *(f"{end.top1_changes} of {end.num_images}" for end in proof.ends))
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_command(command, FoldConfig, examples=EXAMPLES))
