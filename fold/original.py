"""python fold/original.py AUTHORS_FILE: import the authors' published weights as a checkpoint or a plain net."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from common.spec import Spec

EXAMPLES = (
    "python fold/original.py model.pt7 --out runs/diracnet-34-8/checkpoint.pt           # then fold/run.py",
    "python fold/original.py diracnet18v2folded-a2174e15.pth --out plain.safetensors    # then export/to_onnx.py",
    "python fold/original.py diracnet-18-0.75-br-export.hkl --out plain.safetensors     # with pip install h5py",
)


@dataclass(frozen=True)
class OriginalConfig:
    authors: Annotated[Path, "model.pt7, .pth or .hkl of the authors, first or second release, as trained or folded"]
    out: Annotated[
        Path | None, "file to write (default: checkpoint.pt, or plain.safetensors for a folded net, in this folder)"
    ] = None
    image_size: Annotated[int | None, "side of the input in pixels (default: 32 for CIFAR, 224 for ImageNet)"] = None


def command(config: OriginalConfig) -> int:
    """Import a file that the paper's authors published, without executing anything in it."""
    from common.files import read_whole, sha256
    from fold.authors.files import read_saved
    from fold.authors.nets import checkpoint_of, plain_of
    from fold.plain import save_plain, stored_tensors
    from train.checkpoint import load_net, save_checkpoint
    from train.families import count_parameters

    content = read_whole(config.authors)
    saved, digest = read_saved(config.authors, content), sha256(content)
    out = _place(config, folded=saved.folded)
    if saved.folded:
        plain = plain_of(config.authors, saved, digest, image_size=config.image_size)
        save_plain(out, plain.net, plain.spec, plain.provenance)
        numbers = stored_tensors(plain.net.graph, plain.spec)
        _report(out, plain.spec, sum(tensor.numel() for tensor in numbers.values()))
        print("folded by the authors: without the Dirac net, the fold cannot be verified")
        return 0
    checkpoint = checkpoint_of(config.authors, saved, digest, image_size=config.image_size)
    save_checkpoint(out, checkpoint)
    _report(out, checkpoint.spec, count_parameters(load_net(checkpoint)))
    return 0


def _place(config: OriginalConfig, *, folded: bool) -> Path:
    """The path to write; refuses the authors' file itself, and a suffix that does not fit the content."""
    kind, default = ("folded already", "plain.safetensors") if folded else ("not folded", "checkpoint.pt")
    out, suffix = config.out or Path(default), Path(default).suffix
    if out.suffix != suffix:
        raise Refusal(f"{config.authors} is {kind}: --out must end in {suffix}, got {out}")
    if out.exists() and out.samefile(config.authors):
        raise Refusal(f"--out {out} is the authors' file itself: name another")
    return out


def _report(out: Path, spec: "Spec", num_parameters: int) -> None:
    kind = f"{spec.family}, {spec.nonlinearity}, {spec.parameterization}"
    print(f"wrote {out}: {spec.name}, {kind}, {len(spec.labels)} classes, {num_parameters:,} parameters")


if __name__ == "__main__":
    sys.exit(run_command(command, OriginalConfig, examples=EXAMPLES))
