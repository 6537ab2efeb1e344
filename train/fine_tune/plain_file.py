"""A plain.safetensors as it is read: the weights by name, and its header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from common.files import read_whole, sha256
from common.refusal import Refusal
from common.spec import Spec

FORMAT = "diracnet-plain-1"  # the spec says what the layers are
GRAPH_FORMAT = "diracnet-graph-1"  # the graph is in the header


@dataclass(frozen=True)
class PlainFile:
    """A whole plain file with finite weights; whether they fit its spec is not looked at."""

    path: Path
    weights: dict[str, Tensor]
    spec: Spec
    metadata: Mapping[str, str]
    sha256: str


def read_plain_file(path: Path) -> PlainFile:
    """Refuses a file that is not a whole plain file of this project, or holds NaN or Inf."""
    content = read_whole(path)
    try:
        weights = load(content)
    except SafetensorError as error:
        raise Refusal(f"{path} is not a valid safetensors file, or is cut short: {error}") from error
    metadata = _metadata(content)
    if metadata.get("format") not in (FORMAT, GRAPH_FORMAT):
        raise Refusal(f"{path} is not a {FORMAT} file; make one with fold/run.py")
    spec = Spec.from_json(metadata.get("spec", ""))
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise Refusal(f"{path} holds NaN or infinite values in {', '.join(bad)}: the training diverged")
    return PlainFile(path, weights, spec, metadata, sha256(content))


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `load` has read: JSON after its length in eight bytes."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__") or {}
