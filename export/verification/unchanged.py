"""Claims that need no data set: digests, records handed on, weights, and what a graph shows."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx.helper import get_attribute_value
from torch import Tensor

from common.difference import TOLERANCES as FOLD_TOLERANCES
from common.difference import difference
from common.files import read_whole
from common.refusal import Refusal
from export.artefacts import Artefact
from export.compare import TOLERANCES
from export.graphs.graph import FLOATS, to_onnx
from export.model_file.onnx_reader import digest_of, read_header
from export.model_file.probe import probe_images
from export.model_file.reading import find_hints
from export.runtimes.saturation import may_saturate
from export.verification.chain import Chain
from export.verification.claims import MADE_HOW, CheckedClaim, compared, judged, shown, unchecked
from fold.graph import fold
from fold.lower import distinct_lowerings, lower
from fold.plain import stored_tensors
from train.checkpoint import load_net
from train.families import count_parameters

# Attributes that a graph need not state; files of earlier versions do.
ASSUMED = {("Flatten", "axis"): 1, ("MaxPool", "dilations"): [1, 1]}
FLOAT32_ROUNDING = 2.0**-24  # of a number to the nearest one of float32, as a share of it


def check_unchanged(chain: Chain) -> Iterator[CheckedClaim]:
    """All such claims of a file, those of the nearest source first."""
    yield from _of_card(chain)
    yield from (source.check() for source in chain.sources)
    yield from _in_reports(chain)
    yield from _handed_on(chain)
    yield from chain.claims.damaged
    yield from _of_graph(chain)
    yield from _probe(chain)
    yield from _of_fold(chain)


def check_rest(chain: Chain) -> Iterator[CheckedClaim]:
    """A row for each stage, for the recorded entries that are not claims about the file itself."""
    for section, names in chain.claims.rest.items():
        yield unchecked(f"{section}: {shown(', '.join(names))}", f"{len(names)} entries", MADE_HOW[section])
    for section in chain.provenance.keys() - MADE_HOW.keys():
        yield unchecked(shown(section), "another record", "nothing computes it again")


def check_foreign(form: Artefact) -> Iterator[CheckedClaim]:
    """What the files beside somebody else's classifier, or its exporter, say of it: little can be computed."""
    hints = find_hints(form.path, read_header(form.path, read_whole(form.path)).metadata)
    scores = form.answer(probe_images(form.spec.image))
    are_shares, say_so = bool(((scores >= 0) & (scores <= 1)).all()), hints.scores == "probabilities"
    for name, source in sorted(hints.sources.items()):
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


def _of_card(chain: Chain) -> Iterator[CheckedClaim]:
    if (card := chain.card) is None:
        return
    yield compared("sha256 of the engine", card.engine_sha256, digest_of(chain.path, read_whole(chain.path)))
    runs_on = shown(f"{card.builder} {card.builder_version}, compute capability {', '.join(card.compute_capabilities)}")
    found = "the engine loads here" if chain.form else None
    yield judged("library and GPU", runs_on, found, is_same=True, missing=shown(chain.why_not, 160))
    if source := chain.exported:
        yield compared("precision in the card", card.precision, source.precision)


def _in_reports(chain: Chain) -> Iterator[CheckedClaim]:
    """A report of export/parity.py names files by path and digest: those with this file's name must be this file."""
    for where, report in chain.reports.items():
        name, digest = chain.path.name, chain.digest
        if chain.card and where == "the card":
            name, digest = chain.path.with_suffix(".onnx").name, chain.card.onnx_sha256
        digests = report["artefacts"].values()
        named = [value for path, value in report["artefacts"].items() if path.rpartition("/")[2] == name]
        if digest in digests or named:
            here = digest if digest in digests else named[0]
            yield judged(f"sha256 in {where}", shown(here), digest, is_same=here == digest)


def _handed_on(chain: Chain) -> Iterator[CheckedClaim]:
    """The file's record of its sources equals their own: spec, training, fold and export."""
    for what, form in chain.forms.items():
        sections = [name for name in MADE_HOW if name in form.provenance]
        wrong = [fault for name in sections for fault in _unlike(name, chain.provenance.get(name), form.provenance)]
        wrong += ["spec"] if form.spec != chain.spec else []
        found = f"another {', '.join(wrong[:3])} in {form.path.name}" if wrong else f"as {form.path.name} says"
        yield judged(f"record of {', '.join(['spec', *sections])}", f"that of {what}", found, is_same=not wrong)


def _unlike(section: str, recorded: Any, provenance: dict[str, Any]) -> list[str]:
    """The entries that are not as the source's provenance says them; it may say more."""
    there = json.loads(json.dumps(provenance[section]))  # as JSON, in which tuples are lists
    if not isinstance(recorded, dict) or not isinstance(there, dict):
        return [] if recorded == there else [section]
    return [shown(f"{section}.{key}") for key, value in recorded.items() if key not in there or there[key] != value]


def _of_graph(chain: Chain) -> Iterator[CheckedClaim]:
    form, missing = chain.exported, chain.missing("the ONNX file")
    content = read_whole(form.path) if form else b""
    model = onnx.load_model_from_string(content) if form else None
    opset = model and next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    for name, found in (("precision", form and form.precision), ("opset", opset)):
        if (recorded := chain.claims.get(f"export.{name}")) is not None:
            yield compared(name, recorded, found, missing)
    if (recorded := chain.claims.get("export.cannot_saturate")) is not None:
        claim, said = "eight-bit sums saturate", "cannot" if recorded else "can"
        nodes = may_saturate(form.path, content) if form else []
        found = f"can, first {shown(nodes[0])}" if nodes else "cannot: no two weights of a filter exceed 128"
        yield judged(claim, said, found if form else None, is_same=recorded != bool(nodes), missing=missing)
    if chain.claims.get("export.lowering"):
        yield _weights(chain, model)


def _weights(chain: Chain, model: onnx.ModelProto | None) -> CheckedClaim:
    """The graph and its weights, compared with those that are written from the plain file now."""
    form, lowering = chain.exported, chain.claims.get("export.lowering")
    claim, recorded = "lowering, and every weight", f"{lowering} of plain.safetensors"
    if form is None or model is None:
        return unchecked(claim, recorded, chain.missing("the ONNX file"))
    if form.precision not in FLOATS:
        return unchecked(claim, recorded, f"{form.precision} is not written again; see the answers below")
    plain = chain.forms.get("plain.safetensors")
    if plain is None:
        return unchecked(claim, recorded, chain.missing("plain.safetensors"))
    net = plain.source.net
    for name in dict.fromkeys([lowering, *distinct_lowerings(net)]):
        try:
            again = to_onnx(lower(net, name), chain.spec, {}, precision=form.precision)
        except Refusal:  # a lowering that this net does not have
            continue
        if _nodes(again) == _nodes(model):
            other = _other_weights(again, model)
            found = f"another {shown(other)}" if other else f"{name}, {len(model.graph.initializer)} tensors alike"
            return judged(claim, recorded, found, is_same=not other and name == lowering)
    return unchecked(claim, recorded, "this version writes no such graph; see the answers below")


def _nodes(model: onnx.ModelProto) -> list[bytes]:
    """Without attributes that say what ONNX assumes."""
    bare: list[bytes] = []
    for node in model.graph.node:
        said = [part for part in node.attribute if ASSUMED.get((node.op_type, part.name)) != get_attribute_value(part)]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.attribute[:]
        copy.attribute.extend(said)
        bare.append(copy.SerializeToString(deterministic=True))
    return bare


def _other_weights(again: onnx.ModelProto, model: onnx.ModelProto) -> str | None:
    """The first tensor of `model` that is not bit for bit the one of `again`."""
    expected = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in again.graph.initializer}
    for tensor in model.graph.initializer:
        array, same = onnx.numpy_helper.to_array(tensor), expected.get(tensor.name)
        if same is None or array.dtype != same.dtype or not np.array_equal(array, same):
            return tensor.name
    return None


def _probe(chain: Chain) -> Iterator[CheckedClaim]:
    """The file's answers to noise, compared with those when it was written."""
    if (probe := chain.claims.get("export.probe")) is None:
        return
    seed, logits = probe
    for form in filter(None, (chain.form, chain.exported if chain.card else None)):
        tolerance = TOLERANCES[form.precision]
        found = difference(logits, form.answer(probe_images(form.spec.image, seed)))
        yield judged(
            f"answers of {form.path.name} to the probe images",
            f"{logits.shape[0]}x{logits.shape[1]} logits, within {tolerance}",
            f"{tolerance.shown(found)} away",
            is_same=tolerance.covers(found),
        )
    if chain.form is None:
        yield unchecked("answers of the engine to the probe images", "4 images", shown(chain.why_not, 160))


def _of_fold(chain: Chain) -> Iterator[CheckedClaim]:
    """Counts before and after the fold, and the weights after it."""
    claims, checkpoint = chain.claims, chain.forms.get("the checkpoint")
    plain = chain.form if chain.path.suffix == ".safetensors" else chain.forms.get("plain.safetensors")
    net = plain.source.net if plain else None
    no_net, no_checkpoint = chain.missing("plain.safetensors"), chain.missing("the checkpoint")
    if (recorded := claims.get("fold.convolutions")) is not None:
        found = net.graph.count("conv") if net else None
        yield compared("convolutions after the fold", recorded, found, no_net)
    if claims.get("fold.checkpoint_sha256") is None:
        return
    before = load_net(checkpoint.source) if checkpoint else None
    if (recorded := claims.get("fold.dirac_parameters")) is not None:
        yield compared("parameters before the fold", recorded, before and count_parameters(before), no_checkpoint)
    claim, said = "weights of plain.safetensors", "those of the fold"
    if before is None or net is None:
        yield unchecked(claim, said, no_checkpoint if before is None else no_net)
        return
    again, found = (stored_tensors(plain.graph, chain.spec) for plain in (fold(before), net))
    other = _other_numbers(again, found)
    yield judged(claim, said, f"another {other}" if other else "all within the fold's 1e-9", is_same=not other)


def _other_numbers(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """The first tensor of `found`, in float32, that is not the fold's, in float64, rounded."""
    if expected.keys() != found.keys():
        return f"set of tensors: {shown(sorted(expected.keys() ^ found.keys())[0])}"
    for name, tensor in found.items():
        before, after = expected[name].double(), tensor.double()
        limit = FLOAT32_ROUNDING * before.abs() + FOLD_TOLERANCES["float64"] * before.abs().max()
        if before.shape != after.shape or not bool(((before - after).abs() <= limit).all()):
            return shown(name)
    return None
