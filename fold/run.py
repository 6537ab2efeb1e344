"""python fold/run.py checkpoint.pt: make a Dirac net plain, and prove that nothing changed."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command

if TYPE_CHECKING:
    from rich.console import Console

    from fold.proof import Proof
    from train.checkpoint import Checkpoint

EXAMPLES = (
    "python fold/run.py runs/digits-16-1                    # best.pt of the run; writes plain.safetensors beside it",
    "python fold/run.py runs/digits-16-1/checkpoint.pt --out last.safetensors --json",
)


@dataclass(frozen=True)
class FoldConfig:
    checkpoint: Annotated[Path, "a run's folder, of which best.pt is taken where there is one, or a checkpoint"]
    out: Annotated[Path | None, "file to write (default: plain.safetensors beside the checkpoint)"] = None
    data_dir: Annotated[Path | None, "where the data set lies (default: where training found it)"] = None
    images: Annotated[int, "test images to prove the fold on"] = 500
    json: Annotated[bool, "print the proof as JSON on stdout"] = False


def command(config: FoldConfig) -> int:
    """Fold a checkpoint into ordinary convolutions; refuses to write where any output changed."""
    import json
    from dataclasses import asdict

    import torch

    from fold.image_sets import random_images, real_images
    from fold.plain import fold_net, save_plain
    from fold.proof import prove
    from train.checkpoint import load_net
    from train.families import count_parameters
    from train.machine import keep_large_buffers
    from train.progress import make_console, progress
    from train.refusal import Refusal

    keep_large_buffers()
    console = make_console(json=config.json)
    path, checkpoint, choice = _choose(config.checkpoint)
    if choice:
        console.print(choice)
    net = load_net(checkpoint)
    plain = fold_net(net)
    image = checkpoint.spec.image
    image_sets = {"random": torch.as_tensor(random_images(image))}
    real, missing = real_images(
        image, checkpoint.config, num=config.images, data_dir=config.data_dir, beside=path.parent
    )
    if real is None:
        console.print(f"no real images, the proof is on random ones alone: {missing}")
    else:
        image_sets["real"] = torch.as_tensor(real)
    with progress(console, "proving", 2 * sum(map(len, image_sets.values()))) as advance:
        proof = prove(net, plain, image_sets, advance=advance)
    _print_table(console, proof)
    if not proof:
        raise Refusal(f"nothing was written, the fold is not exact: {'; '.join(proof.failures())}")
    out = config.out or path.with_name("plain.safetensors")
    provenance = {
        "training": checkpoint.training_record(),
        "fold": {
            "checkpoint_sha256": checkpoint.sha256,
            "dirac_parameters": count_parameters(net),
            **proof.to_dict(),
        },
    }
    with torch.no_grad():
        save_plain(out, plain.float(), checkpoint.spec, provenance)
    num_plain = sum(tensor.numel() for tensor in plain.state_dict().values())
    console.print(f"wrote {out}: {num_plain:,} numbers, {out.stat().st_size / 1e6:.2f} MB")
    if config.json:
        print(json.dumps({"out": str(out), "logits": [asdict(end) for end in proof.ends]}))
    return 0


def _choose(given: Path) -> "tuple[Path, Checkpoint, str]":
    """The checkpoint that `given` means, and which one that is where a run's folder has two."""
    from train.checkpoint import load_checkpoint

    last, best = ((given if given.is_dir() else given.parent) / name for name in ("checkpoint.pt", "best.pt"))
    path = given if not given.is_dir() else best if best.exists() else last
    state = load_checkpoint(path)
    if path not in (last, best) or not (last.exists() and best.exists()):
        return path, state, f"folding {path}" if given.is_dir() else ""
    score = state.history[-1]["validation_accuracy"] if state.history else None
    share = "" if score is None else f", {100 * score:.2f} % of the validation images"
    other = "best.pt is the epoch with the best validation" if path == last else "chosen by validation"
    return path, state, f"folding {path}: epoch {state.epoch}{share}; {other}"


def _print_table(console: "Console", proof: "Proof") -> None:
    """Relative errors: a row for each layer with weights, a column for each precision and kind of images."""
    from rich.table import Table

    columns = [(end.precision, end.images, end.num_images) for end in proof.ends]
    table = Table("relative error", *(f"{precision}, {images}" for precision, images, _ in columns))
    errors = {(row.what, row.precision, row.images): f"{row.relative:.1e}" for row in (*proof.layers, *proof.ends)}
    for what in dict.fromkeys(row.what for row in (*proof.layers, *proof.ends)):
        table.add_row(what, *(errors[what, precision, images] for precision, images, _ in columns))
    table.add_section()
    table.add_row("top-1 changes", *(f"{end.top1_changes} of {end.num_images}" for end in proof.ends))
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_command(command, FoldConfig, examples=EXAMPLES))
