"""Every kind of artefact as the same thing: images in, logits out, and the outputs of its layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.files import read_whole
from common.refusal import Refusal
from common.spec import Spec
from export.compare import TOLERANCES, Answer
from export.model_file.reading import NO_HINTS, ReadingHints
from export.model_file.signature import Reading
from export.runtimes.cascade import Cascade, read_forms
from export.runtimes.runtime import Runtime

LayerOutputs = Callable[[np.ndarray], dict[str, np.ndarray]]  # images → outputs [N, ...] by the plain net's names
Provider = Literal["cpu", "cuda", "tensorrt", "mnn", "torch"]  # ONNX Runtime's, or MNN or PyTorch in its place
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True)
class Artefact:
    """One artefact made callable."""

    name: str  # its path, and the provider where several were asked for
    path: Path
    digest: str  # sha256 of the file
    precision: str  # a key of TOLERANCES
    spec: Spec
    provenance: dict[str, Any]
    answer: Answer
    layers: LayerOutputs
    # images → the first node that overflows in float16, where it computes in more than its graph says
    overflow: Callable[[np.ndarray], str | None] = lambda images: None
    reading: Reading | None = None  # of somebody else's net
    exact: Path | None = None  # of a cascade: the file that answers where `path` is in doubt

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCES:
            raise Refusal(f"{self.path} computes in {self.precision}; known are {', '.join(TOLERANCES)}")

    @property
    def lowering(self) -> str:
        return self.provenance.get("export", {}).get("lowering", "concat")

    @property
    def model_name(self) -> str:
        """As the server calls it."""
        return self.path.stem if self.spec.family == "unknown" else self.spec.name

    @property
    def file_name(self) -> str:
        return " and ".join(path.name for path in (self.path, self.exact) if path)

    @property
    def gives_probabilities(self) -> bool:
        return self.reading is not None and self.reading.scores == "probabilities"


def open_artefact(
    path: Path, *, provider: Provider | None = None, hints: ReadingHints = NO_HINTS, cascade: Path | None = None
) -> Artefact:
    """A checkpoint, plain net, ONNX or engine; an ONNX on the best provider that loads, or on `provider`.

    `hints` are its user's, for somebody else's ONNX; `cascade` is the other file of a cascade.
    Refuses other files, hints for a file that needs none, and a provider that does not load.
    """
    if hints.sources and path.suffix != ".onnx":
        raise Refusal(f"{path} says itself how it is read; leave {hints.flags} out")
    if cascade:
        return _open_cascade((path, cascade), hints)
    match path.suffix:
        case ".pt":
            return _open_checkpoint(path)
        case ".safetensors":
            return _open_plain(path)
        case ".onnx" if provider in ("mnn", "torch"):
            return _open_other(path, provider)
        case ".onnx":
            return _open_onnx(path, provider, hints)
        case ".engine":
            return _open_engine(path)
    raise Refusal(f"{path} is not an artefact of this project: name a .pt, .safetensors, .onnx or .engine file")


def open_providers(
    path: Path, providers: tuple[Provider, ...], *, hints: ReadingHints = NO_HINTS
) -> tuple[list[Artefact], list[str]]:
    """An ONNX file on each of `providers` that loads, and a line for each that does not."""
    forms, missing = [], []
    for provider in providers:
        try:
            forms.append(open_artefact(path, provider=provider, hints=hints))
        except ProviderMissing as refusal:
            missing.append(str(refusal))
    if not forms:
        raise Refusal("; ".join(missing))
    return forms, missing


class ProviderMissing(Refusal):
    """An execution provider of ONNX Runtime, or MNN, does not load on this machine."""


def _open_checkpoint(path: Path) -> Artefact:
    from train.checkpoint import load_checkpoint, load_net

    checkpoint = load_checkpoint(path)
    record = {"training": checkpoint.training_record()}
    return _from_torch(path, load_net(checkpoint), checkpoint.spec, digest=checkpoint.sha256, provenance=record)


def _open_plain(path: Path) -> Artefact:
    from fold.plain import load_plain

    plain = load_plain(path)
    return _from_torch(path, plain.net, plain.spec, digest=plain.sha256, provenance=plain.provenance)


def _from_torch(path: Path, net: Any, spec: Spec, *, digest: str, provenance: dict[str, Any]) -> Artefact:
    import torch

    from fold.proof import layer_outputs

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images)).numpy()

    @torch.no_grad()
    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = layer_outputs(net, torch.from_numpy(images), _layer_names(spec, provenance))
        return {name: output.numpy() for name, output in outputs}

    return Artefact(str(path), path, digest, "fp32", spec, provenance, answer, layers)


def _from_runtime(
    runtime: Runtime, path: Path, precision: str, layers: LayerOutputs, *, name: str = "", **more: Any
) -> Artefact:
    model = runtime.model
    return Artefact(
        name or str(path),
        path,
        model.digest,
        precision,
        model.spec,
        model.provenance,
        runtime,
        layers,
        reading=model.reading,
        **more,
    )


def _without_layers(why: str) -> LayerOutputs:
    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        raise Refusal(why)

    return layers


def _open_onnx(path: Path, provider: Provider | None, hints: ReadingHints) -> Artefact:
    import onnx
    from google.protobuf.message import DecodeError

    from export.engines.engine import precision
    from export.graphs.observing import first_overflow
    from export.runtimes.onnx_session import OnnxSession, loadable_providers

    if provider and PROVIDERS[provider] not in loadable_providers():
        raise ProviderMissing(f"{provider} is not compared: ONNX Runtime's {PROVIDERS[provider]} does not load here")
    try:
        model = onnx.load_model_from_string(read_whole(path))
        kind = precision(model)
    except DecodeError as error:
        raise Refusal(f"{path} is not a valid ONNX file: {error}; export it again") from error
    # The optimiser moves fp8 pairs over nodes that then answer wrongly (export/eight_bits/quantize.py).
    optimize = kind != "fp8"
    session = OnnxSession(path, providers=(PROVIDERS[provider],) if provider else None, optimize=optimize, hints=hints)
    if provider and session.provider != PROVIDERS[provider]:
        raise ProviderMissing(f"{provider} is not compared: ONNX Runtime fell back to {session.provider}")

    def overflow(images: np.ndarray) -> str | None:
        if kind != "fp16" or session.provider != PROVIDERS["cpu"]:
            return None
        return first_overflow(model, session.to_input(images), path.parent)

    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        names = _layer_names(session.model.spec, session.model.provenance)
        return _onnx_layers(path, names, images, session.provider, optimize=optimize)

    name = f"{path} on {provider}" if provider else ""
    return _from_runtime(session, path, kind, layers, name=name, overflow=overflow)


def _open_cascade(paths: tuple[Path, Path], hints: ReadingHints) -> Artefact:
    from export.runtimes.onnx_session import OnnxSession

    files = read_forms(paths)
    quick, exact = (OnnxSession(path, shares_cores=True, hints=hints) for path in (files.quick, files.exact))
    name = f"{files.quick} and {files.exact}"
    layers = _without_layers(f"{name}: a cascade shows no layers; name one of them")
    cascade = Cascade(quick, exact, files.evidence)
    return _from_runtime(cascade, files.quick, "int8", layers, name=name, exact=files.exact)


def _open_other(path: Path, provider: Literal["mnn", "torch"]) -> Artefact:
    """With a runtime other than ONNX Runtime."""
    import onnx

    from export.engines.engine import precision
    from export.runtimes.load import load_runtime
    from export.runtimes.mnn_module import is_installed

    if provider == "mnn" and not is_installed():
        raise ProviderMissing("mnn is not compared: MNN is not installed here")
    runtime = load_runtime(path, name=provider)
    kind = precision(onnx.load_model_from_string(read_whole(path)))
    library = {"mnn": "MNN", "torch": "PyTorch"}[provider]
    layers = _without_layers(f"{path}: {library} shows no layers; leave --layers and --plot out")
    return _from_runtime(runtime, path, kind, layers, name=f"{path} on {provider}")


def _open_engine(path: Path) -> Artefact:
    from export.model_file.engine_card import read_card
    from export.runtimes.tensorrt_engine import TensorRTEngine

    runtime, card = TensorRTEngine(path), read_card(path)

    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        source = path.with_suffix(".onnx")
        form = open_artefact(source)
        if form.digest != card.onnx_sha256:
            raise Refusal(
                f"{path}: its layers can only be seen in its ONNX, and {source} is another file; export again"
            )
        return form.layers(images)

    return _from_runtime(runtime, path, card.precision, layers)


def _layer_names(spec: Spec, provenance: dict[str, Any]) -> list[str]:
    """The layers with weights of a plain net; of one that its user made, those that the proof of its fold names."""
    from fold.plain import skeleton
    from fold.proof import weighted_layers

    if spec.net:
        return list(dict.fromkeys(row["what"] for row in provenance.get("fold", {}).get("layers", [])))
    return weighted_layers(skeleton(spec))


def _onnx_layers(
    path: Path, layers: list[str], images: np.ndarray, provider: str, *, optimize: bool
) -> dict[str, np.ndarray]:
    """The tensors named like layers, made outputs of the graph: a runtime no longer fuses across them."""
    import onnx

    from export.runtimes.offline import ort

    model = onnx.load(path)
    # The classifier's output is called logits; its node has the layer's name.
    tensors = {node.name: node.output[0] for node in model.graph.node}
    tensors |= {output: output for node in model.graph.node for output in node.output}
    names = [name for name in layers if name in tensors]
    outputs = {output.name for output in model.graph.output}
    for name in names:
        if tensors[name] not in outputs:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensors[name]))
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    values = session.run([tensors[name] for name in names], {model.graph.input[0].name: images})
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: _dequantize(name, np.asarray(value), constants) for name, value in zip(names, values, strict=True)}


def _dequantize(name: str, value: np.ndarray, constants: dict[str, np.ndarray]) -> np.ndarray:
    """A layer's output as floats [N, C, ...]; in an integer graph it is uint8 with channels last."""
    if value.dtype != np.uint8:
        return value.astype(np.float32)
    scale, zero = constants[f"{name}.scale"], constants[f"{name}.zero"]
    return np.moveaxis(scale * (value.astype(np.float32) - zero), -1, 1)
