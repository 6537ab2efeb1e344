"""A file and the files that it was made of: each is found by the digest that a later one records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.files import read_whole, sha256
from common.refusal import Refusal
from common.spec import Spec
from export.artefacts import Artefact, open_artefact
from export.model_file.engine_card import EngineCard, read_card
from export.model_file.onnx_reader import digest_of
from export.verification.claims import CheckedClaim, Claims, judged, read_claims, unchecked

# Where a source may lie: a run may have many checkpoints, each as large as all other files together.
PATTERNS = {
    "the ONNX file": ("*.onnx",),
    "plain.safetensors": ("*.safetensors",),
    "the checkpoint": ("best.pt", "checkpoint.pt"),
}
# What else a file may be made of: the plain net of --init, the authors' file, the weights of an own net.
OTHERS = ("training.init_sha256", "training.authors_sha256", "fold.weights_sha256")


@dataclass(frozen=True)
class Source:
    """An earlier file: its recorded digest, and what lies here."""

    what: str  # a key of PATTERNS, or the record's own name
    recorded: str
    path: Path | None  # the file with this digest
    others: tuple[tuple[Path, str], ...] = ()  # files of another digest that should have this one, by their names

    def check(self) -> CheckedClaim:
        claim = f"sha256 of {self.what}"
        if self.path:
            return judged(claim, self.recorded, self.recorded, is_same=True)
        if self.others:
            path, digest = self.others[0]
            return judged(claim, self.recorded, f"{digest} of {path}", is_same=False)
        return unchecked(claim, self.recorded, f"no file here has it: name {self.what} with --against")


@dataclass(frozen=True)
class Chain:
    """A file, its claims, and the files that it was made of, as far as they are at hand."""

    path: Path
    digest: str
    spec: Spec
    provenance: dict[str, Any]
    claims: Claims
    card: EngineCard | None  # of an engine
    form: Artefact | None  # the file made callable; None for an engine that does not run here
    why_not: str  # it does not run
    sources: tuple[Source, ...]  # the nearest first
    forms: dict[str, Artefact]  # the sources at hand, made callable, by `Source.what`
    reports: dict[str, dict[str, Any]]  # of export/parity.py: where a report is → its content

    @property
    def exported(self) -> Artefact | None:
        """The ONNX file: this one, or an engine's if it is at hand."""
        return self.form if self.path.suffix == ".onnx" else self.forms.get("the ONNX file")

    @property
    def nearest(self) -> Artefact | None:
        """The first file of the chain, from this one back, that runs here."""
        return self.form or next(iter(self.forms.values()), None)

    def missing(self, what: str) -> str:
        return f"needs {what}" if any(source.what == what for source in self.sources) else f"no record names {what}"


def find_chain(path: Path, against: Sequence[Path]) -> Chain:
    """Opens `path` and finds its sources beside it, beside those in `against`, and among these.

    Refuses what cannot be opened, and a file of `against` that is of no use here.
    """
    card = read_card(path) if path.suffix == ".engine" else None
    form, why_not = None, ""
    try:
        form = open_artefact(path)
    except Refusal as refusal:
        if card is None:
            raise
        why_not = str(refusal).replace(str(path), path.name)
    spec, provenance = (card.spec, card.provenance) if card else (form.spec, form.provenance)  # type: ignore[union-attr]
    claims = read_claims(provenance, len(spec.labels))
    sources = tuple(_sources(path, card, claims, against))
    forms = {source.what: open_artefact(source.path) for source in sources if source.path and source.what in PATTERNS}
    reports = dict(_reports([*(source.path for source in sources if source.path), path], card, against))
    # A file that was named and that no claim is about would seem to have been checked.
    used = {*reports, *(str(file) for source in sources for file in (source.path, *dict(source.others)))}
    if strangers := [str(file) for file in against if str(file) not in used]:
        raise Refusal(f"no claim is about {', '.join(strangers)}: leave it out, or name the file that was read")
    digest = digest_of(path, read_whole(path))
    return Chain(path, digest, spec, provenance, claims, card, form, why_not, sources, forms, reports)


def _sources(path: Path, card: EngineCard | None, claims: Claims, against: Sequence[Path]) -> Iterator[Source]:
    read_too = {name: digest for name in OTHERS if (digest := claims.get(name))}
    digests = {file: _digest(file) for file in against}
    named = [file for file in against if digests[file] not in read_too.values()]
    places = [path, *against]
    recorded = (card and card.onnx_sha256, claims.get("export.plain_sha256"), claims.get("fold.checkpoint_sha256"))
    for (what, patterns), digest in zip(PATTERNS.items(), recorded, strict=True):
        if not digest:
            continue
        folders, suffix = dict.fromkeys(place.parent for place in places), Path(patterns[0]).suffix
        beside = [file for folder in folders for name in patterns for file in sorted(folder.glob(name))]
        files = [file for file in (*named, *beside) if file.suffix == suffix and file != path and file.is_file()]
        digests |= {file: _digest(file) for file in files if file not in digests}
        found = next((file for file in files if digests[file] == digest), None)
        others = [(file, digests[file]) for file in dict.fromkeys(files) if file in named or _is_meant(file, path)]
        yield Source(what, digest, found, tuple(others))
        places += [found] if found else []
    for name, digest in read_too.items():
        found = next((file for file in against if digests[file] == digest), None)
        yield Source(name.removesuffix("_sha256"), digest, found)


def _digest(file: Path) -> str:
    """Of a file that may be anything."""
    content = read_whole(file)
    try:
        return digest_of(file, content)
    except Refusal:
        return sha256(content)


def _is_meant(file: Path, subject: Path) -> bool:
    """Whether by its name `subject` was made of it: plain.safetensors for plain-int8.onnx, a run's best.pt."""
    return file.parent == subject.parent and (file.suffix == ".pt" or subject.stem.startswith(file.stem))


def _reports(found: Sequence[Path], card: EngineCard | None, against: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Those that export/parity.py wrote about the ONNX file or the plain one: in the card, named, or beside it."""
    if card and card.parity:
        if not _is_report(card.parity):
            raise Refusal("the parity in the engine's card is damaged; build the engine again with export/to_trt.py")
        yield "the card", card.parity
    beside = [path.with_suffix(end) for path in found if path.suffix != ".pt" for end in (".json", ".parity.json")]
    named = [path for path in against if path.suffix == ".json"]
    for path in dict.fromkeys([*named, *(file for file in beside if file.is_file())]):
        try:
            report = read_json(read_whole(path))
        except ValueError:
            report = None
        if _is_report(report):
            yield str(path), report
        elif path in named:
            raise Refusal(f"{path} is not a report of export/parity.py; leave it out")


def _is_report(report: Any) -> bool:
    is_ours = isinstance(report, dict) and isinstance(report.get("artefacts"), dict)
    return is_ours and isinstance(report.get("parity"), list)
