"""python export/parity.py plain.onnx --against checkpoint.pt: the same images, several forms, one verdict."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command

NUM_RANDOM = 64
EXAMPLES = (
    "python export/parity.py plain.onnx --against runs/digits-16-1/checkpoint.pt plain.safetensors",
    "python export/parity.py plain.onnx --against plain.engine --json        # where there is a GPU",
)


@dataclass(frozen=True)
class ParityConfig:
    artefact: Annotated[Path, "what is checked: .onnx, .safetensors, .engine or checkpoint .pt"]
    against: Annotated[tuple[Path, ...], "what it is checked against, the same kinds"] = ()
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    images: Annotated[int, "test images to compare on"] = 500
    report: Annotated[Path | None, "write the comparisons, and how the artefact was made, to this JSON file"] = None
    json: Annotated[bool, "print the same as JSON on stdout"] = False


def command(config: ParityConfig) -> int:
    """Compare the forms of one net on real and random images; exit status 1 beyond tolerance."""
    import json

    from rich.table import Table

    from export.compare import answer_all, compare
    from train.files import write_whole
    from train.progress import make_console, progress
    from train.refusal import Refusal

    if not config.against:
        raise Refusal("name what to compare with: --against runs/NAME/checkpoint.pt, plain.safetensors, ...")
    console = make_console(json=config.json)
    paths = (config.artefact, *config.against)
    forms = [_open(path) for path in paths]
    _, spec, provenance = forms[0]
    for path, (_, other, _) in zip(paths, forms, strict=True):
        if other.image != spec.image or len(other.labels) != len(spec.labels):
            raise Refusal(f"{path} is another model than {config.artefact}: {other.name}, not {spec.name}")
    image_sets = _image_sets(spec, provenance.get("training", {}), config, console)
    comparisons = []
    total = len(forms) * sum(map(len, image_sets.values()))
    with progress(console, "comparing", total) as advance:
        for kind, images in image_sets.items():
            logits = [answer_all(answer, images, advance) for answer, _, _ in forms]
            for path, reference in zip(config.against, logits[1:], strict=True):
                row = compare((str(path), reference), (str(config.artefact), logits[0]))
                comparisons.append((kind, row))
    table = Table("against", "images", "max abs", "relative", "tolerance", "top-1 agreement", "verdict")
    for kind, row in comparisons:
        numbers = (f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.tolerance:.0e}")
        agreement = f"{100 * row.top1_agreement:.2f} %"
        table.add_row(row.reference, f"{row.num_images} {kind}", *numbers, agreement, "same" if row else "DIFFERENT")
    console.print(table)
    report = {
        "model": spec.name,
        "parity": [{"images": kind, **row.to_dict()} for kind, row in comparisons],
        **provenance,
    }
    if config.report:
        write_whole(config.report, (json.dumps(report, indent=1) + "\n").encode())
        console.print(f"wrote {config.report}")
    if config.json:
        print(json.dumps(report))
    return 0 if all(row for _, row in comparisons) else 1


def _open(path: Path):
    """An artefact as (images → logits, spec, provenance)."""
    match path.suffix:
        case ".pt":
            from train.checkpoint import load_checkpoint, load_net

            checkpoint = load_checkpoint(path)
            return _from_torch(load_net(checkpoint)), checkpoint.spec, {"training": checkpoint.training_record()}
        case ".safetensors":
            from fold.plain import load_plain

            plain = load_plain(path)
            return _from_torch(plain.net), plain.spec, plain.provenance
        case _:
            from export.runtimes.load import load_runtime

            runtime = load_runtime(path)
            return runtime, runtime.model.spec, runtime.model.provenance


def _from_torch(net):
    import torch

    def answer(images):
        with torch.no_grad():
            return net(torch.from_numpy(images)).numpy()

    return answer


def _image_sets(spec, training, config: ParityConfig, console):
    """Real test images where the data set is at hand, and random ones."""
    import numpy as np

    from train import data
    from train.refusal import Refusal

    image = spec.image
    shape = (NUM_RANDOM, image.height, image.width, image.channels)
    image_sets = {"random": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    try:
        if "dataset" not in training:
            raise Refusal("the artefact does not say what it was trained on")
        dataset = data.load(training["dataset"], data_dir=config.data_dir, image_size=image.height)
        image_sets["real"] = dataset.test.first(config.images)
    except Refusal as refusal:
        console.print(f"no real images, parity is on random ones alone: {refusal}")
    return image_sets


if __name__ == "__main__":
    sys.exit(run_command(command, ParityConfig, examples=EXAMPLES))
