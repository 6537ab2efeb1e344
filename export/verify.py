"""python export/verify.py plain.onnx: every claim that a file records, computed again on this machine."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import read_whole, write_whole
from common.progress import make_console
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from export.artefacts import Artefact
    from export.verification.chain import Chain
    from export.verification.claims import CheckedClaim

EXAMPLES = (
    "python export/verify.py runs/demo/plain.onnx           # with what lies beside it: plain.safetensors, best.pt",
    "python export/verify.py plain-int8.onnx --against elsewhere/plain.safetensors --data-dir photos",
    "python export/verify.py plain.engine --report verified.json",
    "python export/verify.py theirs.onnx                    # what theirs.onnx.json says of it",
)


@dataclass(frozen=True)
class VerifyConfig:
    file: Annotated[Path, "plain.engine, plain.onnx, plain.safetensors or a checkpoint"]
    against: Annotated[tuple[Path, ...], "earlier files, and parity reports, that do not lie beside it"] = ()
    data_dir: Annotated[Path | None, "where the data set lies"] = None
    report: Annotated[Path | None, "write the claims and what they come to here to this JSON file"] = None
    json: Annotated[bool, "print the same as JSON on stdout"] = False


def command(config: VerifyConfig) -> int:
    """Compute every claim that a file records again, and compare; exit status 1 if one differs.

    What cannot be computed here is listed with what is missing, and has not been verified.
    """
    from export.verification.chain import find_chain

    console = make_console(json=config.json)
    chain = find_chain(config.file, config.against)
    rows = list(_rows(chain, config, console))
    if not rows:
        raise Refusal(f"{config.file} records nothing about itself, so that nothing can be verified")
    verdicts = _print(console, chain, rows)
    report = {
        "file": str(chain.path),
        "sha256": chain.digest,
        "sources": {source.what: source.path and str(source.path) for source in chain.sources},
        "same": verdicts["same"] == len(rows),
        "differs": verdicts["differs"] > 0,
        "claims": [asdict(row) for row in rows],
    }
    if config.report:
        write_whole(config.report, (json.dumps(report, indent=1) + "\n").encode())
        console.print(f"wrote {config.report}")
    if config.json:
        print(json.dumps(report))
    return int(report["differs"])


def _rows(chain: "Chain", config: VerifyConfig, console: "Console") -> Iterator["CheckedClaim"]:
    from export.verification.recomputed import check_images, find_images
    from export.verification.unchanged import check_rest, check_unchanged

    if chain.form and chain.form.reading and not chain.card:
        if config.data_dir:
            raise Refusal("somebody else's classifier records no test images: use export/evaluate.py with --data-dir")
        yield from _foreign(chain.form)
        return
    images = find_images(chain, config.data_dir)
    yield from check_unchanged(chain)
    yield from check_images(chain, images, console)
    yield from check_rest(chain)


def _foreign(form: "Artefact") -> Iterator["CheckedClaim"]:
    """What the files beside somebody else's classifier, or its exporter, say of it: little can be computed."""
    from export.model_file.onnx_reader import read_header
    from export.model_file.probe import probe_images
    from export.model_file.reading import find_hints
    from export.verification.claims import judged, shown, unchecked

    hints = find_hints(form.path, read_header(form.path, read_whole(form.path)).metadata)
    scores = form.answer(probe_images(form.spec.image))
    are_shares, say_so = bool(((scores >= 0) & (scores <= 1)).all()), hints.scores == "probabilities"
    for name, source in hints.sources:
        claim, recorded = f"{name}, by {source}", shown(str(getattr(hints, name)))
        if name == "labels":
            num = scores.shape[1]
            yield judged(claim, recorded, f"{num} values per image", is_same=num == len(hints.labels or ()))
        elif name == "output":
            yield judged(claim, recorded, "the graph has it", is_same=True)
        elif name == "scores" and (say_so or not are_shares):
            computed = f"from {scores.min():.3g} to {scores.max():.3g}"
            yield judged(claim, recorded, computed, is_same=are_shares == say_so)
        else:
            yield unchecked(claim, recorded, "the graph does not show it; export/evaluate.py on known images may")


def _print(console: "Console", chain: "Chain", rows: list["CheckedClaim"]) -> dict[str, int]:
    """A table, with the first digits of digests; how many claims have each verdict."""
    from rich.table import Table

    table = Table("claim", "recorded", "computed here, or what is missing", "verdict")
    for row in rows:
        texts = (re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text) for text in (row.recorded, row.computed))
        table.add_row(row.claim, *texts, row.verdict.upper() if row.verdict == "differs" else row.verdict)
    console.print(table)
    verdicts = {
        name: sum(row.verdict == name for row in rows) for name in ("same", "differs", "cannot be checked here")
    }
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    console.print(f"{chain.path}, sha256 {chain.digest}: {len(rows)} claims, {counts}")
    if chain.form and chain.form.reading:
        console.print("it is not a file of this project, and records little that can be computed")
    return verdicts


if __name__ == "__main__":
    sys.exit(run_command(command, VerifyConfig, examples=EXAMPLES))
