"""python export/to_trt.py plain.onnx: build a TensorRT engine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command

EXAMPLES = (
    "python export/to_trt.py plain.onnx                     # writes plain.engine and plain.engine.json beside it",
    "python export/to_trt.py plain.onnx --batch 1 16 256 --out large.engine",
)


@dataclass(frozen=True)
class ToTrtConfig:
    onnx: Annotated[Path, "an ONNX classifier, ours or somebody else's"]
    out: Annotated[Path | None, "file to write (default: the same name with .engine)"] = None
    batch: Annotated[tuple[int, int, int], "smallest, best and largest batch"] = (1, 8, 64)
    json: Annotated[bool, "print the engine's card as JSON on stdout"] = False


def command(config: ToTrtConfig) -> int:
    """Build a TensorRT engine: with tensorrt for this machine's GPU, or ahead of time with tensorrt_rtx."""
    import time

    from export.engine import build_engine
    from export.runtimes.card import card_path
    from train.files import write_whole
    from train.progress import make_console

    console = make_console(json=config.json)
    start = shown = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > (0.5 if console.is_terminal else 10):
            shown = time.monotonic()
            console.print(f"{shown - start:.0f} s  {phase}: {done}/{total}", end="\r" if console.is_terminal else "\n")

    engine = build_engine(config.onnx, batch=config.batch, report=report)
    out = config.out or config.onnx.with_suffix(".engine")
    # The card last: an engine without its own card is refused, never served by mistake.
    write_whole(out, engine.content)
    write_whole(card_path(out), engine.card.to_json().encode())
    card = engine.card
    console.print(
        f"wrote {out}: {card.name}, {card.precision}, {card.builder} {card.builder_version}, batch "
        f"{'/'.join(map(str, card.batch))}, {len(engine.content) / 1e6:.2f} MB in {time.monotonic() - start:.1f} s"
    )
    console.print(f"wrote {card_path(out)}: runs on compute capability {', '.join(card.compute_capabilities)}")
    if config.json:
        print(card.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, ToTrtConfig, examples=EXAMPLES))
