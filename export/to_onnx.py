"""python export/to_onnx.py plain.safetensors: write a plain net as ONNX."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import run_command

EXAMPLES = (
    "python export/to_onnx.py plain.safetensors             # writes plain.onnx beside it",
    "python export/to_onnx.py plain.safetensors --out net.onnx --json",
)


@dataclass(frozen=True)
class ToOnnxConfig:
    plain: Annotated[Path, "a plain net of fold/run.py"]
    out: Annotated[Path | None, "file to write (default: the same name with .onnx)"] = None
    json: Annotated[bool, "print the result as JSON on stdout"] = False


def command(config: ToOnnxConfig) -> int:
    """Write a plain net as ONNX: uint8 images in, logits out, its spec in the metadata."""
    import json

    from export.graph import OPSET, to_onnx
    from fold.plain import load_plain
    from train.files import sha256, write_whole

    plain = load_plain(config.plain)
    provenance = {
        **plain.provenance,
        "export": {"plain_sha256": plain.sha256, "precision": "fp32", "opset": OPSET},
    }
    content = to_onnx(plain.net, plain.spec, provenance).SerializeToString()
    out = write_whole(config.out or config.plain.with_suffix(".onnx"), content)
    if config.json:
        print(json.dumps({"out": str(out), "sha256": sha256(content), "bytes": len(content)}))
    else:
        print(f"wrote {out}: {plain.spec.name}, fp32, opset {OPSET}, {len(content) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command, ToOnnxConfig, examples=EXAMPLES))
