"""The files of one road that are at hand: an earlier one is found by the digest that a later one records."""

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

# What lies beside a model under a name of its own, and how the files of a kind end.
CHECKPOINTS = ("best.pt", "checkpoint.pt")
SUFFIXES = {"the ONNX file": ".onnx", "plain.safetensors": ".safetensors", "the checkpoint": ".pt"}


@dataclass(frozen=True)
class Source:
    """An earlier file: the digest that is recorded of it, and what lies here."""

    what: str  # a key of SUFFIXES, or the record's own name
    recorded: str
    path: Path | None  # what has this digest
    others: tuple[tuple[Path, str], ...]  # what should have it by its name, and has another

    def row(self) -> CheckedClaim:
        claim = f"sha256 of {self.what}"
        if self.path:
            return judged(claim, self.recorded, self.recorded, is_same=True)
        if self.others:
            path, digest = self.others[0]
            return judged(claim, self.recorded, f"{digest} of {path}", is_same=False)
        return unchecked(claim, self.recorded, f"no file here has it: name {self.what} with --against")


@dataclass(frozen=True)
class Chain:
    """A file, what it claims, and the files that it was made of, as far as they are at hand."""

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
    reports: tuple[tuple[str, dict[str, Any]], ...]  # of export/parity.py: where it stands, what it says

    @property
    def exported(self) -> Artefact | None:
        """The ONNX file: this one, or an engine's where it is at hand."""
        return self.form if self.path.suffix == ".onnx" else self.forms.get("the ONNX file")

    @property
    def nearest(self) -> Artefact | None:
        """The first file of the road, from this one back, that runs here."""
        return self.form or next(iter(self.forms.values()), None)

    def missing(self, what: str) -> str:
        return f"needs {what}" if any(source.what == what for source in self.sources) else f"no record names {what}"


def find_chain(path: Path, against: Sequence[Path]) -> Chain:
    """Opens `path` and finds its sources beside it, beside those in `against`, and among these.

    Refuses what cannot be opened, and a file of `against` that is of no use here.
    """
    card, form, why_not = None, None, ""
    if path.suffix == ".engine":
        card = read_card(path)
        form, why_not = _open_engine(path)
    else:
        form = open_artefact(path)
    spec, provenance = (card.spec, card.provenance) if card else (form.spec, form.provenance)  # type: ignore[union-attr]
    claims = read_claims(provenance, len(spec.labels))
    sources = tuple(_sources(path, card, claims, against))
    forms = {source.what: open_artefact(source.path) for source in sources if source.path and source.what in SUFFIXES}
    found = (*(source.path for source in sources if source.path), path)
    reports = tuple(_reports(found, card, against))
    _refuse_strangers(against, sources, [name for name, _ in reports])
    digest = digest_of(path, read_whole(path))
    return Chain(path, digest, spec, provenance, claims, card, form, why_not, sources, forms, reports)


def _open_engine(path: Path) -> tuple[Artefact | None, str]:
    try:
        return open_artefact(path), ""
    except Refusal as refusal:
        return None, str(refusal).replace(str(path), path.name)


def _sources(path: Path, card: EngineCard | None, claims: Claims, against: Sequence[Path]) -> Iterator[Source]:
    recorded = {
        "the ONNX file": card.onnx_sha256 if card else None,
        "plain.safetensors": claims.plain_sha256,
        "the checkpoint": claims.checkpoint_sha256,
    }
    digests = {file: _digest(file) for file in against}
    others = [file for file in against if digests[file] in claims.others_sha256.values()]
    places = [path, *against]
    for what, digest in recorded.items():
        if digest:
            source = _find(what, digest, places, [file for file in against if file not in others])
            places += [source.path] if source.path else []
            yield source
    for what, digest in claims.others_sha256.items():
        found = next((file for file, other in digests.items() if other == digest), None)
        yield Source(what.removesuffix("_sha256"), digest, found, ())


def _find(what: str, digest: str, places: Sequence[Path], against: Sequence[Path]) -> Source:
    """A file of the kind `what` with this digest: one of `against`, or one that lies beside one of `places`."""
    suffix = SUFFIXES[what]
    named = [file for file in against if file.suffix == suffix]
    beside = [file for folder in dict.fromkeys(place.parent for place in places) for file in _files(folder, suffix)]
    digests = {file: _digest(file) for file in dict.fromkeys([*named, *beside]) if file != places[0]}
    found = next((file for file, other in digests.items() if other == digest), None)
    expected = [file for file in digests if file in named or _is_meant(file, places[0])]
    return Source(what, digest, found, tuple((file, digests[file]) for file in expected))


def _digest(file: Path) -> str:
    """Of a file that may be anything."""
    content = read_whole(file)
    try:
        return digest_of(file, content)
    except Refusal:
        return sha256(content)


def _files(folder: Path, suffix: str) -> list[Path]:
    if suffix == ".pt":  # of a run there may be many, each as large as all other files
        return [file for name in CHECKPOINTS if (file := folder / name).is_file()]
    return sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())


def _is_meant(file: Path, subject: Path) -> bool:
    """Whether by its name `subject` was made of it: plain.safetensors for plain-int8.onnx, a run's best.pt."""
    return file.parent == subject.parent and (file.suffix == ".pt" or subject.stem.startswith(file.stem))


def _reports(found: Sequence[Path], card: EngineCard | None, against: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Those that export/parity.py wrote about the ONNX file, or the plain one: in the card, named, or beside."""
    if card and card.parity:
        if not _is_report(card.parity):
            raise Refusal("the parity in the engine's card is damaged; build the engine again with export/to_trt.py")
        yield "the card", card.parity
    beside = [path.with_suffix(end) for path in found if path.suffix != ".pt" for end in (".json", ".parity.json")]
    named = [path for path in against if path.suffix == ".json"]
    for path in dict.fromkeys([*named, *(file for file in beside if file.is_file())]):
        if report := _report(path):
            yield str(path), report
        elif path in named:
            raise Refusal(f"{path} is not a report of export/parity.py; leave it out")


def _report(path: Path) -> dict[str, Any] | None:
    """None where a file of that name is another program's."""
    try:
        report = read_json(read_whole(path))
    except ValueError:
        return None
    return report if _is_report(report) else None


def _is_report(report: Any) -> bool:
    is_ours = isinstance(report, dict) and isinstance(report.get("artefacts"), dict)
    return is_ours and isinstance(report.get("parity"), list)


def _refuse_strangers(against: Sequence[Path], sources: Sequence[Source], reports: Sequence[str]) -> None:
    """A file that was named and that no claim is about would seem to have been checked."""
    used = {str(file) for source in sources for file, _ in source.others} | {str(source.path) for source in sources}
    if strangers := [str(file) for file in against if str(file) not in used | set(reports)]:
        raise Refusal(f"no claim is about {', '.join(strangers)}: leave it out, or name the file that was read")
