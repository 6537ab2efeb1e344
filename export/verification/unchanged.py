"""Claims that need no data set: digests, records handed on, weights, and what can be read off a graph."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from common.difference import difference
from common.files import read_whole
from common.refusal import Refusal
from export.compare import TOLERANCES
from export.engines.engine import precision
from export.graphs.graph import FLOATS, to_onnx
from export.model_file.onnx_reader import digest_of
from export.model_file.probe import probe_images
from export.runtimes.saturation import may_saturate
from export.verification.chain import Chain
from export.verification.claims import MADE_HOW, CheckedClaim, compared, judged, shown, unchecked
from fold.graph import GraphNet
from fold.lower import distinct_lowerings, lower
from fold.plain import PlainNet, fold_net, load_plain
from fold.proof import TOLERANCES as FOLD_TOLERANCES
from train.checkpoint import load_checkpoint, load_net
from train.families import count_parameters

FLOAT32_ROUNDING = 2.0**-24  # of a number to the nearest one of float32, as a share of it


def check_unchanged(chain: Chain) -> Iterator[CheckedClaim]:
    """All such claims of a file, those of the nearest source first."""
    if chain.card:
        yield from _of_card(chain)
    yield from (source.row() for source in chain.sources)
    yield from _in_reports(chain)
    yield from _handed_on(chain)
    yield from chain.claims.damaged
    yield from _of_graph(chain)
    yield from _probe(chain)
    yield from _of_fold(chain)


def check_rest(chain: Chain) -> Iterator[CheckedClaim]:
    """What is recorded and is no claim about the file as it is: a row for each stage."""
    for section, why in MADE_HOW.items():
        if names := [name for of, name, _ in chain.claims.rest if of == section]:
            yield unchecked(f"{section}: {shown(', '.join(names))}", f"{len(names)} entries", why)
    for section in chain.provenance.keys() - MADE_HOW.keys():
        yield unchecked(shown(section), "another record", "nothing computes it again")


def _of_card(chain: Chain) -> Iterator[CheckedClaim]:
    card = chain.card
    assert card
    found = digest_of(chain.path, read_whole(chain.path))
    yield compared("sha256 of the engine", card.engine_sha256, found)
    runs_on = f"{card.builder} {card.builder_version}, compute capability {', '.join(card.compute_capabilities)}"
    if chain.form:
        yield judged("library and GPU", shown(runs_on), "the engine loads here", is_same=True)
    else:
        yield unchecked("library and GPU", shown(runs_on), shown(chain.why_not, 160))
    if source := chain.exported:
        yield compared("precision in the card", card.precision, source.precision)


def _in_reports(chain: Chain) -> Iterator[CheckedClaim]:
    """A report of export/parity.py names files by path and digest: those of this name must be this file."""
    for where, report in chain.reports:
        if where == "the card":
            path, digest = chain.card and chain.path.with_suffix(".onnx"), chain.card and chain.card.onnx_sha256
        else:
            path, digest = chain.path, chain.digest
        named = {name: value for name, value in report["artefacts"].items() if path and Path(name).name == path.name}
        recorded = list(report["artefacts"].values()) if digest in report["artefacts"].values() else [*named.values()]
        if recorded and digest:
            here = digest if digest in recorded else recorded[0]
            yield judged(f"sha256 in {where}", shown(here), digest, is_same=digest in recorded)


def _handed_on(chain: Chain) -> Iterator[CheckedClaim]:
    """What a file says of its sources is what they say themselves: their spec, training, fold and export."""
    for what, form in chain.forms.items():
        sections = [name for name in MADE_HOW if name in form.provenance]
        pairs = {name: (chain.provenance.get(name), form.provenance[name]) for name in sections}
        wrong = [shown(fault) for name, pair in pairs.items() for fault in _unlike(name, *pair)]
        wrong += ["spec"] if form.spec != chain.spec else []
        found = f"another {', '.join(wrong[:3])} in {form.path.name}" if wrong else f"as {form.path.name} says"
        yield judged(f"record of {', '.join(['spec', *sections])}", f"that of {what}", found, is_same=not wrong)


def _unlike(section: str, recorded: Any, there: Any) -> list[str]:
    """The entries that are not as the source says them; it may say more."""
    if not isinstance(recorded, dict) or not isinstance(there, dict):
        return [] if recorded == there else [section]
    before = json.loads(json.dumps(there))  # tuples are lists where a record was written
    return [f"{section}.{name}" for name, value in recorded.items() if name not in before or before[name] != value]


def _of_graph(chain: Chain) -> Iterator[CheckedClaim]:
    claims, form = chain.claims, chain.exported
    if form is None:
        for name in ("precision", "opset", "lowering", "cannot_saturate"):
            if (value := getattr(claims, name)) is not None:
                yield unchecked(f"export: {name}", str(value), chain.missing("the ONNX file"))
        return
    content = read_whole(form.path)
    model = onnx.load_model_from_string(content)
    if claims.precision:
        yield compared("precision", claims.precision, precision(model))
    if claims.opset is not None:
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        yield compared("opset", claims.opset, opset)
    if claims.cannot_saturate is not None:
        nodes = may_saturate(form.path, content)
        text = {True: "cannot", False: "can"}
        found = f"can, first {shown(nodes[0])}" if nodes else "cannot: no two weights of a filter exceed 128"
        yield judged(
            "eight-bit sums saturate",
            text[claims.cannot_saturate],
            found,
            is_same=claims.cannot_saturate != bool(nodes),
        )
    if claims.lowering:
        yield _weights(chain, model)


def _weights(chain: Chain, model: onnx.ModelProto) -> CheckedClaim:
    """The graph and its weights beside those that are written of the plain file now."""
    claim, recorded = "lowering, and every weight", f"{chain.claims.lowering} of plain.safetensors"
    kind = precision(model)  # whatever the record says
    if kind not in FLOATS:
        return unchecked(claim, recorded, f"{kind} is not written again; see the answers below")
    plain = chain.forms.get("plain.safetensors")
    if plain is None:
        return unchecked(claim, recorded, chain.missing("plain.safetensors"))
    net = load_plain(plain.path).net
    for name in dict.fromkeys([chain.claims.lowering or "", *distinct_lowerings(net)]):
        try:
            again = to_onnx(lower(net, name), chain.spec, {}, precision=kind)
        except Refusal:  # a lowering that this net does not have
            continue
        if _nodes(again) == _nodes(model):
            other = _other_weights(again, model)
            found = f"another {shown(other)}" if other else f"{name}, {len(model.graph.initializer)} tensors alike"
            return judged(claim, recorded, found, is_same=not other and name == chain.claims.lowering)
    return unchecked(claim, recorded, "this version writes no such graph; see the answers below")


def _nodes(model: onnx.ModelProto) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in model.graph.node]


def _other_weights(again: onnx.ModelProto, model: onnx.ModelProto) -> str | None:
    """The first tensor of `model` that is not bit for bit the one of `again`."""
    expected = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in again.graph.initializer}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        same = expected.get(tensor.name)
        if same is None or array.dtype != same.dtype or not np.array_equal(array, same):
            return tensor.name
    return None


def _probe(chain: Chain) -> Iterator[CheckedClaim]:
    """What the file answers to noise, beside what it answered when it was written."""
    if chain.claims.probe is None:
        return
    seed, logits = chain.claims.probe
    onnx_file = chain.exported if chain.card else None
    for form in (form for form in (chain.form, onnx_file) if form):
        tolerance = TOLERANCES[form.precision]
        found = difference(logits, form.answer(probe_images(form.spec.image, seed)))
        figure = f"rms {found.rms:.1e}" if tolerance.is_statistical else f"{found.relative:.1e}"
        yield judged(
            f"answers of {form.path.name} to the probe images",
            f"{logits.shape[0]}x{logits.shape[1]} logits, within {tolerance}",
            f"{figure} away",
            is_same=tolerance.covers(found),
        )
    if chain.form is None:
        yield unchecked("answers of the engine to the probe images", "4 images", shown(chain.why_not, 160))


def _of_fold(chain: Chain) -> Iterator[CheckedClaim]:
    """Numbers before the fold, and the weights after it."""
    claims = chain.claims
    plain = chain.form if chain.path.suffix == ".safetensors" else chain.forms.get("plain.safetensors")
    checkpoint = chain.forms.get("the checkpoint")
    net = load_plain(plain.path).net if plain else None
    before = load_net(load_checkpoint(checkpoint.path)) if checkpoint and claims.checkpoint_sha256 else None
    if claims.convolutions is not None:
        claim = "convolutions after the fold"
        if isinstance(net, GraphNet):
            yield compared(claim, claims.convolutions, net.graph.count("conv"))
        else:
            yield unchecked(claim, str(claims.convolutions), chain.missing("plain.safetensors"))
    if claims.checkpoint_sha256 is None:
        return
    if claims.dirac_parameters is not None:
        claim = "parameters before the fold"
        if before is None:
            yield unchecked(claim, str(claims.dirac_parameters), chain.missing("the checkpoint"))
        else:
            yield compared(claim, claims.dirac_parameters, count_parameters(before))
    claim, recorded = "weights of plain.safetensors", "those of the fold"
    if before is None or net is None:
        missing = "the checkpoint" if before is None else "plain.safetensors"
        yield unchecked(claim, recorded, chain.missing(missing))
        return
    found = _other_numbers(fold_net(before), net)
    yield judged(claim, recorded, f"another {found}" if found else "all within the fold's 1e-9", is_same=not found)


def _other_numbers(again: PlainNet, net: PlainNet) -> str | None:
    """The first tensor of `net`, in float32, that is not the fold's, in float64, rounded."""
    expected, found = again.state_dict(), net.state_dict()
    if expected.keys() != found.keys():
        return f"set of tensors: {shown(sorted(expected.keys() ^ found.keys())[0])}"
    for name, tensor in found.items():
        before, after = expected[name].double(), tensor.double()
        if before.shape != after.shape:
            return shown(name)
        limit = FLOAT32_ROUNDING * before.abs() + FOLD_TOLERANCES["float64"] * before.abs().max()
        if not bool(((before - after).abs() <= limit).all()):
            return shown(name)
    return None
