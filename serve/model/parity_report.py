"""What the referee found: the report of export/parity.py beside a model, where it is of this very file."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.files import read_whole
from export.runtimes.runtime import Model

_SHOWN = ("images", "num_images", "relative", "top1_agreement", "within_tolerance")  # to clients: no paths
_log = logging.getLogger(__name__)


def with_report(model: Model, path: Path) -> Model:
    """`model` with the comparisons of plain.json beside `path` plain.onnx as its provenance's `parity`.

    A file of that name which does not name the model's digest is another model's, or no report: it is left aside.
    """
    report = path.with_suffix(".json")
    if not report.exists():
        return model
    try:
        document = read_json(read_whole(report))
        is_of_model = model.digest in document["artefacts"].values()
        parity: list[dict[str, Any]] = [{name: row[name] for name in _SHOWN} for row in document["parity"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is left aside: it is no report of export/parity.py (%r)", report.name, error)
        return model
    if not is_of_model:
        _log.warning("%s is left aside: it is of another model than %s", report.name, path.name)
        return model
    return replace(model, provenance={**model.provenance, "parity": parity})
