"""Every kind of artefact as the same thing: images in, logits out, and the outputs of its layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from common.files import read_whole
from common.refusal import Refusal
from export.compare import TOLERANCES, Answer
from export.eight_bits.calibrate import first_overflow, observer
from export.model_file.engine_card import read_card
from export.model_file.onnx_reader import read_graph
from export.model_file.reading import NO_HINTS, ReadingHints
from export.runtimes.cascade import Cascade, read_forms
from export.runtimes.load import load_runtime
from export.runtimes.mnn_module import is_installed
from export.runtimes.onnx_session import OnnxSession, loadable_providers, ort
from export.runtimes.runtime import Model

LayerOutputs = Callable[[np.ndarray], dict[str, np.ndarray]]  # images → outputs [N, ...] by the plain net's names
Provider = Literal["cpu", "cuda", "tensorrt", "mnn", "torch"]  # ONNX Runtime's, or MNN or PyTorch in its place
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def _no_layers(images: np.ndarray) -> dict[str, np.ndarray]:
    raise Refusal("MNN and PyTorch show no layers; leave --layers and --plot out")


@dataclass(frozen=True, kw_only=True)
class Artefact(Model):
    """One artefact made callable, with what its file says of itself."""

    title: str  # its path, and the provider if several were requested
    path: Path
    precision: str  # a key of TOLERANCES
    answer: Answer
    layers: LayerOutputs = _no_layers
    # images → the first node that overflows in float16, if it computes in more than its graph says
    overflow: Callable[[np.ndarray], str | None] = lambda images: None
    file_name: str  # for reports; a cascade names both of its files
    source: Any = None  # the Checkpoint or Plain that it was read from

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCES:
            raise Refusal(f"{self.path} computes in {self.precision}; known are {', '.join(TOLERANCES)}")


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
        case ".pt" | ".safetensors":
            return _open_torch(path)
        case ".onnx":
            return _open_onnx(path, provider, hints)
        case ".engine":
            return _open_engine(path)
    raise Refusal(f"{path} is not an artefact of this project: name a .pt, .safetensors, .onnx or .engine file")


class ProviderMissing(Refusal):
    """An execution provider of ONNX Runtime, or MNN, does not load on this machine."""


def _make(model: Model, path: Path, precision: str, answer: Answer, **more: Any) -> Artefact:
    more = {"title": str(path), "file_name": path.name, **more}
    return Artefact(**vars(model), path=path, precision=precision, answer=answer, **more)


def _open_torch(path: Path) -> Artefact:
    import torch

    from fold.graph import GraphNet
    from fold.plain import load_plain, skeleton
    from fold.proof import layer_outputs, weighted_layers
    from train.checkpoint import load_checkpoint, load_net

    if path.suffix == ".pt":
        file = load_checkpoint(path)
        net, record = load_net(file), {"training": file.training_record()}
    else:
        file = load_plain(path)
        net, record = file.net, file.provenance
    model = Model(file.spec.name, file.sha256, file.spec, record)

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(images)).numpy()

    @torch.no_grad()
    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(net, GraphNet):
            outputs, names = net.values(torch.from_numpy(images)), {name: name for name in _layer_names(model)}
        else:  # the output of a convolution is that of the batch normalisation after it, which the fold takes in
            outputs = layer_outputs(net, torch.from_numpy(images))
            names = {node.origin: node.name for node in weighted_layers(skeleton(file.spec))}
        return {names[origin]: output.numpy() for origin, output in outputs if origin in names}

    return _make(model, path, "fp32", answer, layers=layers, source=file)


def _open_onnx(path: Path, provider: Provider | None, hints: ReadingHints) -> Artefact:
    if provider == "mnn" and not is_installed():
        raise ProviderMissing("mnn is not compared: MNN is not installed here")
    if provider in PROVIDERS and PROVIDERS[provider] not in loadable_providers():
        raise ProviderMissing(f"{provider} is not compared: ONNX Runtime's {PROVIDERS[provider]} does not load here")
    content = read_whole(path)
    kind = read_graph(path, content).precision
    title = f"{path} on {provider}" if provider else str(path)
    if provider == "mnn" or provider == "torch":
        runtime = load_runtime(path, name=provider)
        return _make(runtime.model, path, kind, runtime, title=title)
    # The optimiser moves fp8 pairs over nodes that then answer wrongly (export/eight_bits/quantize.py).
    optimize = kind != "fp8"
    session = OnnxSession(path, providers=(PROVIDERS[provider],) if provider else None, optimize=optimize, hints=hints)

    def overflow(images: np.ndarray) -> str | None:
        if kind != "fp16" or session.provider != PROVIDERS["cpu"]:
            return None
        return first_overflow(onnx.load_model_from_string(content), session.signature.to_input(images), path.parent)

    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        return _onnx_layers(path, _layer_names(session.model), images, session.provider, optimize=optimize)

    return _make(session.model, path, kind, session, title=title, overflow=overflow, layers=layers)


def _open_cascade(paths: tuple[Path, Path], hints: ReadingHints) -> Artefact:
    files = read_forms(paths)
    quick, exact = (OnnxSession(path, shares_cores=True, hints=hints) for path in (files.quick, files.exact))
    cascade = Cascade(quick, exact, files.evidence)
    names = {"title": f"{files.quick} and {files.exact}", "file_name": f"{files.quick.name} and {files.exact.name}"}
    return _make(cascade.model, files.quick, "int8", cascade, **names)


def _open_engine(path: Path) -> Artefact:
    runtime, card = load_runtime(path), read_card(path)

    def layers(images: np.ndarray) -> dict[str, np.ndarray]:
        source = path.with_suffix(".onnx")
        form = open_artefact(source)
        if form.digest != card.onnx_sha256:
            raise Refusal(f"{path}: only its ONNX shows its layers, and {source} is another file; export again")
        return form.layers(images)

    return _make(runtime.model, path, card.precision, runtime, layers=layers)


def _layer_names(model: Model) -> list[str]:
    """The layers with weights of a plain net; of a user's own, those that the proof of its fold names."""
    from fold.plain import skeleton
    from fold.proof import weighted_layers

    if model.spec.net:
        return list(dict.fromkeys(row["what"] for row in model.provenance.get("fold", {}).get("layers", [])))
    return [node.name for node in weighted_layers(skeleton(model.spec))]


def _onnx_layers(
    path: Path, layers: list[str], images: np.ndarray, provider: str, *, optimize: bool
) -> dict[str, np.ndarray]:
    """The tensors named like layers, made outputs of the graph: a runtime no longer fuses across them."""
    model = onnx.load(path)
    # The classifier's output is called logits; its node has the layer's name.
    tensors = {node.name: node.output[0] for node in model.graph.node}
    tensors |= {output: output for node in model.graph.node for output in node.output}
    names = [name for name in layers if name in tensors]
    how = {} if optimize else {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_DISABLE_ALL}
    values = observer(model, [tensors[name] for name in names], provider=provider, **how)(images)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: _dequantize(name, values[tensors[name]], constants) for name in names}


def _dequantize(name: str, value: np.ndarray, constants: dict[str, np.ndarray]) -> np.ndarray:
    """A layer's output as floats [N, C, ...]; in an integer graph it is uint8 with channels last."""
    if value.dtype != np.uint8:
        return value.astype(np.float32)
    scale, zero = constants[f"{name}.scale"], constants[f"{name}.zero"]
    return np.moveaxis(scale * (value.astype(np.float32) - zero), -1, 1)
