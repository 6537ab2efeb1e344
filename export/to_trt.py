"""python export/to_trt.py plain.onnx: build a TensorRT engine."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, write_whole
from common.progress import make_console
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

if TYPE_CHECKING:
    from rich.console import Console

    from export.engines.engine import Engine

EXAMPLES = (
    "python export/to_trt.py plain.onnx                     # writes plain.engine and plain.engine.json beside it",
    "python export/to_trt.py plain.onnx --batch 1 16 256 --out large.engine",
    "python export/to_trt.py plain.onnx --compute-capability 8.9 12.0      # tensorrt_rtx, for two kinds of GPU",
    "python export/to_trt.py plain.onnx --timing-cache timings --workspace 2048        # tensorrt, on its GPU",
)


@dataclass(frozen=True)
class ToTrtConfig(ReadingFlags):
    onnx: Annotated[Path, "an ONNX classifier, of this project or not"]
    out: Annotated[Path | None, "file to write (default: the same name with .engine)"] = None
    batch: Annotated[tuple[int, int, int] | None, "smallest, best and largest (default: 1 8 64, or the graph's)"] = None
    compute_capability: Annotated[tuple[str, ...], "tensorrt_rtx: GPUs to build for, e.g. 8.9 (default: 8.0 on)"] = ()
    workspace: Annotated[int | None, "scratch memory of the builder in MiB (default: all of the GPU's)"] = None
    timing_cache: Annotated[Path | None, "tensorrt: file with kernel timings, read if there and written"] = None
    version_compatible: Annotated[bool, "tensorrt: let later versions run the engine too"] = False
    refittable: Annotated[bool, "let the engine's weights be exchanged"] = False
    parity: Annotated[Path | None, "report of export/parity.py for the card (default: plain.parity.json)"] = None
    json: Annotated[bool, "print the engine's card as JSON on stdout"] = False


def command(config: ToTrtConfig) -> int:
    """Build a TensorRT engine: with tensorrt for this machine's GPU, or ahead of time with tensorrt_rtx."""
    from export.engines.engine import BuildOptions, build_engine

    console = make_console(json=config.json)
    start = shown = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > (0.5 if console.is_terminal else 10):
            shown = time.monotonic()
            console.print(f"{shown - start:.0f} s  {phase}: {done}/{total}", end="\r" if console.is_terminal else "\n")

    out, cache = config.out or config.onnx.with_suffix(".engine"), config.timing_cache
    if out.suffix != ".engine":
        raise Refusal(f"--out must end in .engine, by which the server knows one; got {out}")
    parity = _parity(config, console)
    options = BuildOptions(
        workspace_mib=config.workspace,
        compute_capabilities=config.compute_capability,
        version_compatible=config.version_compatible,
        refittable=config.refittable,
        timing_cache=None if cache is None else read_whole(cache) if cache.exists() else b"",
    )
    engine = build_engine(config.onnx, batch=config.batch, hints=from_flags(config), options=options, report=report)
    if cache and engine.timing_cache is not None:
        write_whole(cache, engine.timing_cache)
    card = replace(engine.card, parity=parity)
    _write(replace(engine, card=card), out, console)
    console.print(
        f"wrote {out}: {card.name}, {card.precision}, {card.builder} {card.builder_version}, batch "
        f"{'/'.join(map(str, card.batch))}, {len(engine.content) / 1e6:.2f} MB in {time.monotonic() - start:.1f} s"
    )
    if card.signature.reading:
        console.print(f"{card.name} is not a file of this project; {card.signature.reading}")
    if config.json:
        print(card.to_json())
    return 0


def _parity(config: ToTrtConfig, console: "Console") -> dict[str, Any] | None:
    """The parity report on this ONNX file: one that is named must fit, one that lies beside it may."""
    from common.documents import read_object
    from export.model_file.onnx_reader import digest_of

    path = config.parity or config.onnx.with_suffix(".parity.json")
    if not config.parity and not path.exists():
        return None
    try:
        record = read_object(read_whole(path), str(path), todo="run export/parity.py again")
        if not isinstance(record.get("artefacts"), dict):
            raise Refusal(f"{path} is not a report of export/parity.py: it names no artefacts")
        if digest_of(config.onnx, read_whole(config.onnx)) not in record["artefacts"].values():
            raise Refusal(f"{path} is about another file than {config.onnx}; run export/parity.py on this one")
        return record
    except Refusal as refusal:
        if config.parity:
            raise
        console.print(f"the card carries no parity: {refusal}")
        return None


def _write(engine: "Engine", out: Path, console: "Console") -> None:
    from export.model_file.engine_card import card_path, layers_path

    # The card last: an engine without its own card is refused, never served by mistake.
    write_whole(out, engine.content)
    layers = layers_path(out)
    if engine.layers is None:
        layers.unlink(missing_ok=True)  # of an earlier engine
        console.print(f"no {layers.name}: layers can be read only on a GPU that the engine is for")
    else:
        console.print(f"wrote {write_whole(layers, engine.layers.encode())}")
    write_whole(card_path(out), engine.card.to_json().encode())
    capabilities = ", ".join(engine.card.compute_capabilities)
    console.print(f"wrote {card_path(out)}: runs on compute capability {capabilities}")


if __name__ == "__main__":
    sys.exit(run_command(command, ToTrtConfig, examples=EXAMPLES))
