"""python export/parity.py plain.onnx --against checkpoint.pt: the same images, several forms, one verdict."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, write_whole
from common.progress import make_console
from common.refusal import Refusal
from export.model_file.reading import NO_HINTS, ReadingFlags, from_flags

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from export.artefacts import Artefact

EXAMPLES = (
    "python export/parity.py plain.onnx --against runs/digits-16-1/checkpoint.pt plain.safetensors",
    "python export/parity.py plain.onnx --against plain.safetensors --layers --plot layers.png",
    "python export/parity.py plain.onnx --against plain.safetensors --providers cpu cuda tensorrt mnn",
    "python export/parity.py plain.onnx --against plain.engine --json        # where there is a GPU",
)


@dataclass(frozen=True)
class ParityConfig(ReadingFlags):
    artefact: Annotated[Path, "what is checked: .onnx, .safetensors, .engine or checkpoint .pt"]
    against: Annotated[tuple[Path, ...], "what it is checked against, the same kinds"] = ()
    providers: Annotated[
        tuple[Literal["cpu", "cuda", "tensorrt", "mnn", "torch"], ...],
        "check an .onnx on each of these of ONNX Runtime, on MNN and on PyTorch (default: on ONNX Runtime's best)",
    ] = ()
    layers: Annotated[bool, "compare every layer, and name the first beyond tolerance; engines by their .onnx"] = False
    plot: Annotated[Path | None, "draw the error of every layer to this PNG; implies --layers"] = None
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    images: Annotated[int, "test images to compare on"] = 500
    report: Annotated[Path | None, "write the comparisons, and how the artefact was made, to this JSON file"] = None
    json: Annotated[bool, "print the same as JSON on stdout"] = False


def command(config: ParityConfig) -> int:
    """Compare the forms of one net on real, random and extreme images; exit status 1 beyond tolerance.

    The more precise of two forms is the reference, and the precision of the other sets the tolerance.
    """
    from export.pairs import by_precision, compare_all_layers, compare_logits, draw_layers, print_rows

    console = make_console(json=config.json)
    forms, others = _open(config, console)
    pairs = [by_precision(form, other) for form in forms for other in others]
    image_sets = _image_sets([*forms, *others], config, console)
    rows = compare_logits(pairs, image_sets, console)
    print_rows(console, rows)
    layers = compare_all_layers(pairs, image_sets, console) if config.layers or config.plot else []
    if config.plot:
        console.print(f"wrote {write_whole(config.plot, draw_layers(layers))}")
    report = {
        "model": forms[0].spec.name,
        "artefacts": {str(form.path): form.digest for form in (*forms, *others)},
        "parity": [row.to_dict() for row in rows],
        **forms[0].provenance,
        **({"layers": [comparison.to_dict() for comparison in layers]} if layers else {}),
    }
    if config.report:
        write_whole(config.report, (json.dumps(report, indent=1) + "\n").encode())
        console.print(f"wrote {config.report}")
    if config.json:
        print(json.dumps(report))
    return 1 if any(row.verdict is False for row in rows) else 0


def _open(config: ParityConfig, console: "Console") -> tuple[list["Artefact"], list["Artefact"]]:
    """The artefact, on each provider asked for, and the others; refuses forms of different models."""
    from export.artefacts import ProviderMissing, open_artefact
    from export.model_file.onnx_reader import read_header

    if not config.against:
        raise Refusal("name what to compare with: --against runs/NAME/checkpoint.pt, plain.safetensors, ...")
    if config.providers and config.artefact.suffix != ".onnx":
        raise Refusal(f"--providers are for .onnx files, and {config.artefact} is not one; leave them out")
    forms: list[Artefact] = []
    missing: list[str] = []
    for provider in config.providers or (None,):
        try:
            forms.append(open_artefact(config.artefact, provider=provider, hints=from_flags(config)))
        except ProviderMissing as refusal:
            missing.append(str(refusal))
    if not forms:
        raise Refusal("; ".join(missing))
    for line in missing:
        console.print(line)
    others, spec = [], forms[0].spec
    for path in config.against:
        is_foreign = path.suffix == ".onnx" and read_header(path, read_whole(path)).spec is None
        others.append(open_artefact(path, hints=from_flags(config) if is_foreign else NO_HINTS))
    for other in others:
        if other.spec.image != spec.image or len(other.spec.labels) != len(spec.labels):
            raise Refusal(f"{other.path} is another model than {config.artefact}: {other.spec.name}, not {spec.name}")
    return forms, others


def _image_sets(forms: list["Artefact"], config: ParityConfig, console: "Console") -> dict[str, "np.ndarray"]:
    """Real images where the data set is at hand, random and extreme ones; refuses int8 and fp8 without real ones."""
    from export.compare import TOLERANCES
    from fold.image_sets import extreme_images, random_images, real_images

    image, beside = forms[0].spec.image, config.artefact.parent
    trainings = [form.provenance.get("training", {}) for form in forms]
    training = next((training for training in trainings if "dataset" in training), {})
    real, missing = real_images(image, training, num=config.images, data_dir=config.data_dir, beside=beside)
    image_sets = {"random": random_images(image), "extreme": extreme_images(image)}
    if real is not None:
        return {"real": real, **image_sets}
    if statistical := {form.precision for form in forms if TOLERANCES[form.precision].is_statistical}:
        raise Refusal(f"{' and '.join(statistical)} can only be judged on real images, and there are none: {missing}")
    console.print(f"no real images, parity is on random and extreme ones alone: {missing}")
    return image_sets


if __name__ == "__main__":
    sys.exit(run_command(command, ParityConfig, examples=EXAMPLES))
