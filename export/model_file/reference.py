"""What a model answered to images that it was judged on, as counts in its file: a server compares its own with them."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.refusal import Refusal
from export.model_file.histograms import EDGES, NUM_BINS, PARTS, part

KEY = "reference"  # of an ONNX file's metadata, and of the provenance that every runtime shows
_FORMAT = "diracnet-reference-1"
_MOST = 2**53  # images: what a float64 counts exactly


@dataclass(frozen=True, eq=False)
class Reference:
    """`counts` int64 [K + 2 NUM_BINS] as export/model_file/histograms.py has them, over `what` in words."""

    what: str
    of: str  # digest of the file before the reference was stored in it
    counts: np.ndarray

    @property
    def num_images(self) -> int:
        return int(part(self.counts, "margin").sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "what": self.what,
            "of": self.of,
            "images": self.num_images,
            "edges": list(EDGES),
            **{name: part(self.counts, name).tolist() for name in PARTS},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def read_reference(record: Any, num_classes: int) -> Reference:
    """The inverse of `to_dict`, of a record that anybody may have written; refuses, naming the field that is wrong."""
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise Refusal(f"the reference is not of the format {_FORMAT}")
    if record.get("edges") != list(EDGES):
        raise Refusal("the reference has other bins than this version counts")
    what, of, images = (record.get(name) for name in ("what", "of", "images"))
    if not isinstance(what, str) or not isinstance(of, str):
        raise Refusal("the reference does not say what it was counted on")
    if not _is_count(images) or images == 0:
        raise Refusal(f"the reference is over {str(images)[:20]} images")
    for name in PARTS:
        counts, size = record.get(name), num_classes if name == "classes" else NUM_BINS
        if not isinstance(counts, list) or len(counts) != size or not all(map(_is_count, counts)):
            raise Refusal(f"{name} in the reference is not a list of {size} counts")
        if sum(counts) != images:
            raise Refusal(f"{name} in the reference counts {sum(counts)} images, not {images}")
    return Reference(what, of, np.array([number for name in PARTS for number in record[name]], np.int64))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST
