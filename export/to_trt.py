"""python export/to_trt.py plain.onnx: build a TensorRT engine."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.refusal import Refusal
from export.model_file.reading import ReadingFlags, from_flags

EXAMPLES = (
    "python export/to_trt.py plain.onnx                     # writes plain.engine and plain.engine.json beside it",
    "python export/to_trt.py plain.onnx --batch 1 16 256 --out large.engine",
    "python export/to_trt.py plain.onnx --compute-capability 8.9 12.0      # tensorrt_rtx, for two kinds of GPU",
    "python export/to_trt.py plain.onnx --timing-cache timings --workspace 2048        # tensorrt, on its GPU",
)


@dataclass(frozen=True)
class ToTrtConfig(ReadingFlags):
    onnx: Annotated[Path, "an ONNX classifier, ours or somebody else's"]
    out: Annotated[Path | None, "file to write (default: the same name with .engine)"] = None
    batch: Annotated[
        tuple[int, int, int] | None, "smallest, best and largest batch (default: 1 8 64, or the graph's only one)"
    ] = None
    compute_capability: Annotated[tuple[str, ...], "tensorrt_rtx: GPUs to build for, e.g. 8.9 (default: 8.0 on)"] = ()
    workspace: Annotated[int | None, "scratch memory of the builder in MiB (default: all of the GPU's)"] = None
    timing_cache: Annotated[Path | None, "tensorrt: file with kernel timings, read if there and written"] = None
    version_compatible: Annotated[bool, "tensorrt: let later versions run the engine too"] = False
    refittable: Annotated[bool, "let the engine's weights be exchanged"] = False
    parity: Annotated[Path | None, "report of export/parity.py for the card (default: plain.parity.json)"] = None
    json: Annotated[bool, "print the engine's card as JSON on stdout"] = False


def command(config: ToTrtConfig) -> int:
    """Build a TensorRT engine: with tensorrt for this machine's GPU, or ahead of time with tensorrt_rtx."""
    import time

    from common.progress import make_console
    from export.engines.engine import build_engine

    console = make_console(json=config.json)
    start = shown = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > (0.5 if console.is_terminal else 10):
            shown = time.monotonic()
            console.print(f"{shown - start:.0f} s  {phase}: {done}/{total}", end="\r" if console.is_terminal else "\n")

    out = config.out or config.onnx.with_suffix(".engine")
    if out.suffix != ".engine":
        raise Refusal(f"--out must end in .engine, by which the server knows one; got {out}")
    parity = _parity(config, console)
    engine = build_engine(
        config.onnx, batch=config.batch, hints=from_flags(config), options=_options(config), report=report
    )
    engine = replace(engine, card=replace(engine.card, parity=parity))
    card = engine.card
    _write(engine, out, config.timing_cache, console)
    console.print(
        f"wrote {out}: {card.name}, {card.precision}, {card.builder} {card.builder_version}, batch "
        f"{'/'.join(map(str, card.batch))}, {len(engine.content) / 1e6:.2f} MB in {time.monotonic() - start:.1f} s"
    )
    if card.signature.reading:
        console.print(f"{card.name} is not a file of this project; {card.signature.reading}")
    if config.json:
        print(card.to_json())
    return 0


def _options(config: ToTrtConfig) -> Any:
    from common.files import read_whole
    from export.engines.engine import BuildOptions

    path = config.timing_cache
    return BuildOptions(
        workspace_mib=config.workspace,
        compute_capabilities=config.compute_capability,
        version_compatible=config.version_compatible,
        refittable=config.refittable,
        timing_cache=None if path is None else read_whole(path) if path.exists() else b"",
    )


def _parity(config: ToTrtConfig, console: Any) -> dict[str, Any] | None:
    """The parity report on this ONNX file: the one asked for must fit, one that lies beside it may."""
    if config.parity:
        return _read_parity(config.parity, config.onnx)
    beside = config.onnx.with_suffix(".parity.json")
    try:
        return _read_parity(beside, config.onnx) if beside.exists() else None
    except Refusal as refusal:
        console.print(f"the card carries no parity: {refusal}")
        return None


def _read_parity(path: Path, onnx: Path) -> dict[str, Any]:
    from common.documents import read_object
    from common.files import read_whole
    from export.model_file.onnx_reader import digest_of

    record = read_object(read_whole(path), str(path), todo="run export/parity.py again")
    if not isinstance(record.get("artefacts"), dict):
        raise Refusal(f"{path} is not a report of export/parity.py: it names no artefacts")
    if digest_of(onnx, read_whole(onnx)) not in record["artefacts"].values():
        raise Refusal(f"{path} is about another file than {onnx}; run export/parity.py on this one")
    return record


def _write(engine: Any, out: Path, timing_cache: Path | None, console: Any) -> None:
    """The engine and what belongs to it."""
    from common.files import write_whole
    from export.model_file.engine_card import card_path, layers_path

    if timing_cache is not None:
        write_whole(timing_cache, engine.timing_cache)
    # The card last: an engine without its own card is refused, never served by mistake.
    write_whole(out, engine.content)
    layers = layers_path(out)
    if engine.layers is None:
        layers.unlink(missing_ok=True)  # of an earlier engine
        console.print(f"no {layers.name}: layers can be read only on a GPU that the engine is for")
    else:
        write_whole(layers, engine.layers.encode())
        console.print(f"wrote {layers}")
    write_whole(card_path(out), engine.card.to_json().encode())
    capabilities = ", ".join(engine.card.compute_capabilities)
    console.print(f"wrote {card_path(out)}: runs on compute capability {capabilities}")


if __name__ == "__main__":
    sys.exit(run_command(command, ToTrtConfig, examples=EXAMPLES))
