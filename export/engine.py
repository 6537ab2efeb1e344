"""From ONNX to a TensorRT engine: one strongly typed path for `tensorrt` and `tensorrt_rtx`."""

import importlib.util
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from export.runtimes import gpu
from export.runtimes.card import EngineCard
from export.runtimes.signature import Signature, generic_spec
from export.runtimes.tensorrt_engine import import_library, make_logger
from train.files import read_whole, sha256
from train.refusal import Refusal
from train.spec import Spec

Report = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True)
class Engine:
    """A serialised engine and what it says of itself."""

    content: bytes
    card: EngineCard


def choose_builder() -> str:
    """`tensorrt` where a CUDA device is, else `tensorrt_rtx`, which builds ahead of time without one."""
    if importlib.util.find_spec("tensorrt") and gpu.num_devices():
        return "tensorrt"
    if importlib.util.find_spec("tensorrt_rtx"):
        return "tensorrt_rtx"
    raise Refusal(
        "no TensorRT here: pip install -e '.[tensorrt]' on a machine with an NVIDIA GPU, "
        "or pip install -e '.[rtx]' to build ahead of time without one"
    )


def build_engine(path: Path, *, batch: tuple[int, int, int], report: Report = lambda *_: None) -> Engine:
    """Parse and build the ONNX file `path` for batches of MIN, OPT and MAX images.

    Precision is that of the graph. Refuses a file that is no ONNX, all parser errors at once, inputs
    that are no images, and a batch that a fixed one contradicts.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise Refusal(f"--batch must be MIN <= OPT <= MAX from 1 on, got {' '.join(map(str, batch))}")
    content = read_whole(path)
    model = _read_onnx(path, content)
    builder_name = choose_builder()
    trt = import_library(builder_name)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, path)
    signature = _signature(trt, network, path)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits of mantissa would pass for fp32
    batch = _add_profile(builder, config, network, signature, batch)
    capabilities = _target_devices(trt, builder_name, config)
    engine = _build(trt, builder, network, config, report)
    if engine is None:
        raise Refusal(f"{path}: {builder_name} cannot build it: {logger.last_error()}")
    name, spec, provenance = _identity(path, model, network, signature)
    card = EngineCard(
        name=name,
        builder=builder_name,  # type: ignore[arg-type]
        builder_version=trt.__version__,
        precision=precision(model),
        batch=batch,
        compute_capabilities=capabilities,
        onnx_sha256=sha256(content),
        engine_sha256=sha256(engine),
        signature=signature,
        spec=spec,
        provenance=provenance,
    )
    return Engine(engine, card)


def precision(model: onnx.ModelProto) -> str:
    """fp32, fp16, bf16, fp8 or int8: what the convolutions of a graph compute in."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return "fp8" if onnx.TensorProto.FLOAT8E4M3FN in kinds else "int8"
    if onnx.TensorProto.BFLOAT16 in kinds:
        return "bf16"
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"


def _read_onnx(path: Path, content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(str(path))  # by path: weights may lie in files beside it
    except Exception as error:  # protobuf and the checker raise hierarchies of their own
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{path} is no valid ONNX file: {reason}") from error
    return model


def _parse(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    # TensorRT 10 needs the flag for what 11 always does; where it is gone, so is the choice.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        shown = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise Refusal(f"{path} cannot be parsed by {trt.__name__}: {shown or logger.last_error()}")
    return network


def _signature(trt: Any, network: Any, path: Path) -> Signature:
    if network.num_inputs != 1 or network.num_outputs < 1:
        raise Refusal(f"{path} has {network.num_inputs} inputs and {network.num_outputs} outputs, not one of each")
    tensor = network.get_input(0)
    dtype = {trt.uint8: "uint8", trt.float32: "float32", trt.float16: "float16"}.get(tensor.dtype, str(tensor.dtype))
    shape = tuple(None if size < 0 else int(size) for size in tensor.shape)
    try:
        return Signature(tensor.name, network.get_output(0).name, dtype, shape)  # type: ignore[arg-type]
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from refusal


def _add_profile(
    builder: Any, config: Any, network: Any, signature: Signature, batch: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The optimisation profile of a free batch; the batch that results."""
    if signature.batch is not None:
        return (signature.batch,) * 3
    profile = builder.create_optimization_profile()
    profile.set_shape(signature.input_name, *((size, *signature.shape[1:]) for size in batch))
    config.add_optimization_profile(profile)
    return batch


def _target_devices(trt: Any, builder_name: str, config: Any) -> tuple[str, ...]:
    """Compute capabilities that the engine will run on: this GPU's, or all from Ampere on that RTX offers."""
    if builder_name == "tensorrt":
        return (gpu.compute_capability(),)
    members = trt.ComputeCapability.__members__.items()
    # Turing (SM75) has no kernels for a classifier's fp32 matrix product, so a build for it fails.
    offered = [kind for name, kind in members if name.startswith("SM") and name != "SM75"]
    config.num_compute_capabilities = len(offered)
    for index, kind in enumerate(offered):
        config.set_compute_capability(kind, index)
    return tuple(f"{digits[:-1]}.{digits[-1]}" for digits in (kind.name.removeprefix("SM") for kind in offered))


def _build(trt: Any, builder: Any, network: Any, config: Any, report: Report) -> bytes | None:
    """Build in a thread, so that Ctrl-C reaches this one and the monitor can stop the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.is_cancelled = False
            self.num_steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.num_steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, self.num_steps.get(phase_name, step + 1))
            return not self.is_cancelled

        def phase_finish(self, phase_name: str) -> None:
            self.num_steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        try:
            memory = building.result()
        except KeyboardInterrupt:
            monitor.is_cancelled = True
            raise
    return None if memory is None else bytes(memory)


def _identity(
    path: Path, model: onnx.ModelProto, network: Any, signature: Signature
) -> tuple[str, Spec, dict[str, Any]]:
    """Name, spec and provenance from the metadata, or generic ones."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "spec" in metadata:
        spec = Spec.from_json(metadata["spec"])
        return spec.name, spec, json.loads(metadata.get("provenance", "{}"))
    num_classes = network.get_output(0).shape[-1]
    if num_classes < 2:
        raise Refusal(f"{path} gives {num_classes} values per image; a classifier gives one per class")
    return path.stem, generic_spec(signature, num_classes=num_classes), {}
