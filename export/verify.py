"""python export/verify.py plain.onnx: every claim that a file records, computed again on this machine."""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import write_whole
from common.progress import make_console
from common.refusal import Refusal

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
    from export.verification.claims import print_claims
    from export.verification.recomputed import check_images, find_images
    from export.verification.unchanged import check_foreign, check_rest, check_unchanged

    console = make_console(json=config.json)
    chain = find_chain(config.file, config.against)
    foreign = chain.form if chain.form and chain.form.reading else None
    if foreign and not chain.card:
        if config.data_dir:
            raise Refusal("somebody else's classifier records no test images: use export/evaluate.py with --data-dir")
        rows = [*check_foreign(foreign)]
    else:
        images = find_images(chain, config.data_dir)
        rows = [*check_unchanged(chain), *check_images(chain, images, console), *check_rest(chain)]
    if not rows:
        raise Refusal(f"{config.file} records nothing about itself, so that nothing can be verified")
    print_claims(console, rows)
    verdicts = Counter(row.verdict for row in rows)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("same", "differs", "cannot be checked here"))
    console.print(f"{chain.path}, sha256 {chain.digest}: {len(rows)} claims, {counts}")
    if foreign:
        console.print("it is not a file of this project, and records little that can be computed")
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


if __name__ == "__main__":
    sys.exit(run_command(command, VerifyConfig, examples=EXAMPLES))
