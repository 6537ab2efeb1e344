"""Changes to the metadata of a finished model: its reference, its record. Its graph and weights stay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole, write_whole
from export.model_file.engine_card import card_path, read_card
from export.model_file.onnx_reader import digest_of, read_header, with_metadata
from export.model_file.reference import KEY, Reference, count
from export.runtimes.runtime import best


def store_reference(path: Path, probabilities: np.ndarray, *, what: str) -> list[str]:
    """Count the answers, probabilities [N, K], and keep the counts in the model; lines that say what was written.

    The file's other bytes stay as they are, so that the graph does. An ONNX file has another digest afterwards; that
    of an engine is of the engine and stays, as the reference is in its card.
    """
    order = best(probabilities, 2)
    counts = count(order, np.take_along_axis(probabilities, order, axis=1), probabilities.shape[1])
    if path.suffix == ".engine":
        card = read_card(path)
        record = Reference(what, card.engine_sha256, counts).to_dict()
        write_whole(card_path(path), replace(card, provenance={**card.provenance, KEY: record}).to_json().encode())
        return [f"wrote the reference of {len(order):,} images into {card_path(path)}"]
    content = read_whole(path)
    bare = digest_of(path, with_metadata(path, content, {KEY: None}))
    changed = with_metadata(path, content, {KEY: json.dumps(Reference(what, bare, counts).to_dict())})
    lines = [f"wrote the reference of {len(order):,} images into {path}: its digest is now {digest_of(path, changed)}"]
    if changed == content:
        return lines
    before = digest_of(path, content).encode()
    write_whole(path, changed)
    # A report of parity, the card of an engine.
    beside = sorted(file for file in path.parent.glob(f"{path.stem}*.json") if file.is_file())
    if names := [file.name for file in beside if before in read_whole(file)]:
        lines.append(f"these name the earlier digest, make them again where they are needed: {', '.join(names)}")
    return lines


def rewrite_metadata(path: Path, provenance: dict[str, Any], *, temperature: float | None = None) -> bytes:
    """An ONNX file with another provenance and, if given, another temperature in its spec.

    A new temperature removes a stored reference, which counts probabilities of the old one.
    """
    content = read_whole(path)
    entries = {"provenance": json.dumps({name: part for name, part in provenance.items() if name != KEY})}
    if temperature is None:
        return with_metadata(path, content, entries)
    spec = json.loads(read_header(path, content).metadata["spec"]) | {"temperature": temperature}
    return with_metadata(path, content, {"spec": json.dumps(spec), **entries, KEY: None})
