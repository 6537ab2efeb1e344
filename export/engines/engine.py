"""From ONNX to a TensorRT engine: one strongly typed path for `tensorrt` and `tensorrt_rtx`."""

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import sha256
from common.refusal import Refusal
from export.engines.advice import build_advice, parser_advice
from export.graphs.onnx_file import OnnxFile, read_onnx
from export.model_file.engine_card import Builder, EngineCard
from export.model_file.reading import NO_HINTS, ReadingHints
from export.runtimes import gpu
from export.runtimes.tensorrt_engine import INSTALL_TENSORRT, import_library, load_engine, make_logger

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
OPSETS = range(9, 26)  # documented for TensorRT 11; its parser takes any number and guesses
BATCH = (1, 8, 64)  # smallest, best and largest, where the graph leaves it free
MAX_WORKSPACE_MIB = 2**20
# GPUs that are left out by default: Turing has no kernels for a classifier's fp32 matrix product, and no GPU before
# Ada has fp8.
LEFT_OUT = {"7.5"}
WITHOUT_FP8 = {"7.5", "8.0", "8.6"}


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build besides its batch."""

    workspace_mib: int | None = None  # the builder's scratch memory; None is all that the device has
    compute_capabilities: tuple[str, ...] = ()  # "8.9"; () is all from Ampere on that tensorrt_rtx offers
    version_compatible: bool = False
    refittable: bool = False
    timing_cache: bytes | None = None  # of an earlier build; b"" begins one


@dataclass(frozen=True)
class Engine:
    """A serialised engine and its card."""

    content: bytes
    card: EngineCard
    timing_cache: bytes | None  # to hand to the next build, where one was asked for
    layers: str | None  # JSON of the inspector; None without a GPU that can load the engine


def choose_builder() -> Builder:
    """`tensorrt` where a CUDA device is, else `tensorrt_rtx`, which builds ahead of time without one."""
    if importlib.util.find_spec("tensorrt") and gpu.num_devices():
        return "tensorrt"
    if importlib.util.find_spec("tensorrt_rtx"):
        return "tensorrt_rtx"
    raise Refusal(f"no TensorRT here: {INSTALL_TENSORRT} where there is a GPU, or pip install -e '.[rtx]' elsewhere")


def build_engine(
    path: Path,
    *,
    batch: tuple[int, int, int] | None = None,
    hints: ReadingHints = NO_HINTS,
    options: BuildOptions = BuildOptions(),
    report: Progress = lambda *_: None,
) -> Engine:
    """Parse and build the ONNX file `path` for batches of MIN, OPT and MAX images (default: BATCH, or the only one).

    The graph decides the precision. Refuses what `read_onnx` refuses, opsets and options that the library does not
    have, and every node that it objects to, all at once with what to do.
    """
    if batch and not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise Refusal(f"--batch must be 1 <= MIN <= OPT <= MAX, got {' '.join(map(str, batch))}")
    builder_name = choose_builder()
    _refuse_options(builder_name, options)
    file = read_onnx(path, hints)
    batch = _fitting_batch(file, batch)
    trt = import_library(builder_name)
    content, capabilities, cache = _compile(trt, builder_name, file, batch, options, report)
    card = EngineCard(
        name=file.name,
        builder=builder_name,
        builder_version=trt.__version__,
        precision=file.graph.precision,
        batch=batch,
        compute_capabilities=capabilities,
        gpu=gpu.device_name() if builder_name == "tensorrt" else None,
        workspace_mib=options.workspace_mib,
        version_compatible=options.version_compatible,
        refittable=options.refittable,
        onnx_sha256=file.sha256,
        engine_sha256=sha256(content),
        signature=file.signature,
        output_dtype=file.output_dtype,
        spec=file.spec,
        provenance=file.provenance,
        parity=None,
    )
    return Engine(content, card, cache, inspect_layers(trt, content, card))


def _compile(
    trt: Any, builder_name: str, file: OnnxFile, batch: tuple[int, int, int], options: BuildOptions, report: Progress
) -> tuple[bytes, tuple[str, ...], bytes | None]:
    """The engine, the compute capabilities of its GPUs, and the timing cache if one was asked for."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, file)
    config = builder.create_builder_config()
    if file.signature.batch is None:
        profile = builder.create_optimization_profile()
        shapes = ((size, *file.signature.shape[1:]) for size in batch)
        profile.set_shape(file.signature.input_name, *shapes)
        config.add_optimization_profile(profile)
    capabilities = configure(trt, builder_name, config, options, kind=file.graph.precision)
    cache = None if options.timing_cache is None else attach_timing_cache(config, logger, options.timing_cache)
    content = _build(trt, builder, network, config, report)
    if content is None:
        raise Refusal(f"{file.path} cannot be built by {builder_name}: {build_advice(logger.last_error())}")
    return content, capabilities, cache and bytes(cache.serialize())


def attach_timing_cache(config: Any, logger: Any, content: bytes) -> Any:
    """Let a build use the timings of earlier ones, and add to them. The cache must outlive the build.

    Refuses timings of another GPU or version.
    """
    num_messages = len(logger.messages)
    cache = config.create_timing_cache(content)
    taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    # A cache that does not fit is silently replaced by an empty one, with a warning.
    complaints = [text for _, text in logger.messages[num_messages:] if "timing cache" in text]
    if not taken or complaints:
        reason = complaints[-1] if complaints else logger.last_error()
        raise Refusal(f"--timing-cache does not fit this GPU and TensorRT ({reason}); name a new file to begin one")
    return cache


def inspect_layers(trt: Any, content: bytes, card: EngineCard) -> str | None:
    """The engine's layers and the kernels that run them, as JSON; None without a GPU that can load it."""
    if not gpu.num_devices() or gpu.compute_capability() not in card.compute_capabilities:
        return None
    logger = make_logger(trt)
    _runtime, engine = load_engine(trt, logger, content, card, what="the engine that was built")
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)


def _refuse_options(builder_name: str, options: BuildOptions) -> None:
    mib = options.workspace_mib
    if mib is not None and not 1 <= mib <= MAX_WORKSPACE_MIB:
        raise Refusal(f"--workspace is in MiB, from 1 to {MAX_WORKSPACE_MIB}; got {mib}")
    if builder_name == "tensorrt":
        if options.compute_capabilities:
            raise Refusal("--compute-capability is for tensorrt_rtx; tensorrt builds for the GPU of this machine")
        return
    if options.timing_cache is not None:
        raise Refusal("--timing-cache is for tensorrt; tensorrt_rtx builds without timing kernels and keeps no cache")
    if options.version_compatible:
        raise Refusal("--version-compatible is for tensorrt; tensorrt_rtx comes without the lean runtime that it needs")
    if options.refittable and not gpu.num_devices():
        raise Refusal("--refittable needs a GPU: tensorrt_rtx compiles what can be refitted for the GPU at hand")


def _parse(trt: Any, builder: Any, logger: Any, file: OnnxFile) -> Any:
    if file.opset not in OPSETS:
        known = f"{OPSETS[0]} to {OPSETS[-1]}"
        raise Refusal(f"{file.path} has opset {file.opset}; TensorRT knows {known}: export it with one of these")
    # TensorRT 10 needs the flag for what 11 always does and has no flag for.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(file.path))
    advice = parser_advice(file.model, [parser.get_error(index) for index in range(parser.num_errors)])
    if advice or not parsed:
        raise Refusal(f"{file.path} cannot be built by {trt.__name__}: {advice or logger.last_error()}")
    for index in reversed(range(network.num_outputs)):  # the engine is given memory for one
        if (tensor := network.get_output(index)).name != file.signature.output_name:
            network.unmark_output(tensor)
    return network


def _fitting_batch(file: OnnxFile, asked: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """The batch asked for, or by default; refuses another one than a graph's only one."""
    only = file.signature.batch
    if only is None:
        return asked or BATCH
    if asked not in (None, (only, only, only)):
        raise Refusal(
            f"{file.path} takes {only} image{'s' * (only > 1)} at a time, no more and no fewer: leave out --batch, or "
            "export it with a free batch (dynamic_axes, dynamic_shapes)"
        )
    return only, only, only


def configure(trt: Any, builder_name: str, config: Any, options: BuildOptions, *, kind: str) -> tuple[str, ...]:
    """Flags and limits of a build; the compute capabilities of the GPUs that its engine will run on.

    `kind` is the graph's precision.
    """
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits of mantissa would pass for fp32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector has only names
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if builder_name == "tensorrt":
        return (gpu.compute_capability(),)
    offered = {
        f"{name[2:-1]}.{name[-1]}": kind for name, kind in trt.ComputeCapability.__members__.items() if name[:2] == "SM"
    }
    if unknown := [capability for capability in options.compute_capabilities if capability not in offered]:
        raise Refusal(
            f"{builder_name} {trt.__version__} builds for compute capability {', '.join(offered)}, not for "
            f"{', '.join(unknown)}; for such a GPU, build with tensorrt"
        )
    asked = options.compute_capabilities or set(offered) - (WITHOUT_FP8 if kind == "fp8" else LEFT_OUT)
    wanted = tuple(capability for capability in offered if capability in asked)
    if not options.compute_capabilities and gpu.num_devices() and (here := gpu.compute_capability()) not in wanted:
        raise Refusal(
            f"{builder_name} builds for compute capability {', '.join(wanted)}, and the GPU here has {here}: "
            f"{INSTALL_TENSORRT}, or name other GPUs with --compute-capability"
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(offered[capability], index)
    return wanted


def _build(trt: Any, builder: Any, network: Any, config: Any, report: Progress) -> bytes | None:
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
