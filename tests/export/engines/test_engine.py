"""Real builds with tensorrt_rtx, which needs no GPU. Running an engine does: see tests/gpu."""

import json
import signal
import threading
import warnings
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper

from common.cli import run_command
from common.files import sha256
from common.refusal import Refusal
from export import to_trt
from export.engines import engine
from export.model_file.engine_card import card_path, layers_path, read_card
from export.model_file.onnx_reader import read_graph
from export.runtimes import gpu, tensorrt_engine
from export.runtimes.load import load_runtime

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")


def run(*argv):
    return run_command(to_trt.command, to_trt.ToTrtConfig, argv=[str(part) for part in argv])


def change(path, **fields):
    record = json.loads(card_path(path).read_text())
    card_path(path).write_text(json.dumps({**record, **fields}))


def test_the_card_says_what_was_built(built, make_spec):
    card = read_card(built)
    assert card.spec == make_spec()
    assert card.engine_sha256 == sha256(built.read_bytes())
    assert card.onnx_sha256 == sha256(built.with_suffix(".onnx").read_bytes())
    assert (card.precision, card.batch, card.name) == ("fp32", (1, 2, 4), "DiracNet-10-0.25")
    assert card.provenance["training"] == {"dataset": "none"}
    assert (card.signature.input_name, card.signature.dtype) == ("images", "uint8")
    assert card.signature.shape == (None, 8, 8, 3)
    assert {len(capability.split(".")) for capability in card.compute_capabilities} == {2}


@pytest.mark.parametrize(
    ("shape", "kind", "batch"),
    [(("N", 3, 6, 5), TensorProto.FLOAT, (1, 8, 64)), ((4, 6, 5, 3), TensorProto.FLOAT, (4, 4, 4))],
)
def test_a_foreign_net_builds_with_generic_labels(write_foreign, shape, kind, batch):
    card = engine.build_engine(write_foreign(shape, kind)).card
    assert (card.name, card.batch, card.provenance) == ("foreign", batch, {})
    assert card.spec.labels == ("class 0", "class 1", "class 2", "class 3")


def test_a_batch_that_the_graph_does_not_take_is_refused(write_foreign):
    path = write_foreign((1, 3, 6, 5))
    with pytest.raises(Refusal, match="takes 1 image at a time, no more and no fewer: leave out --batch"):
        engine.build_engine(path, batch=(1, 16, 256))
    assert engine.build_engine(path, batch=(1, 1, 1)).card.batch == (1, 1, 1)


@pytest.mark.slow
def test_somebody_elses_resnet_builds_with_generic_labels(tmp_path):
    path = tmp_path / "resnet18.onnx"
    net, images = torchvision.models.resnet18(num_classes=7).eval(), torch.zeros(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, and files of it are everywhere
        torch.onnx.export(net, (images,), path, dynamo=False, dynamic_axes={"input": {0: "N"}}, input_names=["input"])
    assert run(path, "--batch", 1, 2, 4) == 0
    card = read_card(tmp_path / "resnet18.engine")
    assert (card.name, card.precision, card.provenance) == ("resnet18", "fp32", {})
    assert (card.signature.dtype, card.signature.shape) == ("float32", (None, 3, 32, 32))
    assert card.spec.labels == tuple(f"class {index}" for index in range(7))


@pytest.mark.slow
def test_an_int8_file_of_onnx_runtimes_quantizer_is_refused_for_its_biases(write_onnx, images):
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"images": images()}])

        def get_next(self):
            return next(self.batches, None)

    _, path = write_onnx()
    int8 = path.with_name("int8.onnx")
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    options = {"op_types_to_quantize": ["Conv"], "activation_type": quantization.QuantType.QInt8}
    quantization.quantize_static(path, int8, Reader(), extra_options=symmetric, **options)
    with pytest.raises(
        Refusal, match=r"conv\.bias_DequantizeLinear' \(int32, .*: its bias is quantized to int32; do: "
    ):
        engine.build_engine(int8, batch=(1, 2, 4))
    quantization.quantize_static(path, int8, Reader(), extra_options={**symmetric, "QuantizeBias": False}, **options)
    assert engine.build_engine(int8, batch=(1, 2, 4)).card.precision == "int8"


def test_wrong_arguments_are_refused_in_one_line_and_leave_the_old_engine(built, tmp_path, capsys):
    before = built.read_bytes()
    capsys.readouterr()
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        ([built.with_suffix(".onnx"), "--batch", 4, 2, 1], "--batch must be 1 <= MIN <= OPT <= MAX"),
        ([tmp_path / "text.onnx", "--out", built], "is not a valid ONNX file"),
        ([tmp_path / "missing.onnx", "--out", built], "No such file or directory"),
        ([built.with_suffix(".onnx"), "--out", built.with_suffix(".onnx")], "--out must end in .engine"),
        ([built.with_suffix(".onnx"), "--workspace", 0], "--workspace is in MiB, from 1 to 1048576; got 0"),
        (
            [built.with_suffix(".onnx"), "--compute-capability", "9.0", "8.9"],
            "12.1, not for 9.0; for such a GPU, build",
        ),
        ([built.with_suffix(".onnx"), "--timing-cache", tmp_path / "t"], "tensorrt_rtx builds without timing kernels"),
        ([built.with_suffix(".onnx"), "--version-compatible"], "comes without the lean runtime"),
        ([built.with_suffix(".onnx"), "--parity", tmp_path / "p"], "No such file or directory"),
    ):
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert built.read_bytes() == before
    assert not (tmp_path / "t").exists()


@pytest.mark.skipif(bool(gpu.num_devices()), reason="this machine has a CUDA device, for which weights can be refitted")
def test_a_refittable_engine_of_rtx_needs_a_gpu(write_onnx, capsys):
    _, path = write_onnx()
    assert run(path, "--refittable") == 2
    assert "--refittable needs a GPU" in capsys.readouterr().err


def test_an_engine_is_built_for_the_gpus_asked_for(write_onnx):
    _, path = write_onnx()
    assert run(path, "--batch", 1, 2, 4, "--compute-capability", "12.0", "8.9", "--workspace", 512) == 0
    card = read_card(path.with_suffix(".engine"))
    assert (card.compute_capabilities, card.workspace_mib) == (("8.9", "12.0"), 512)
    assert (card.version_compatible, card.refittable, card.output_dtype) == (False, False, "float32")


def test_a_second_build_replaces_the_first_and_what_was_known_of_its_layers(built, capsys):
    first = built.read_bytes()
    layers_path(built).write_text("of the first")
    capsys.readouterr()
    assert run(built.with_suffix(".onnx"), "--batch", 1, 1, 2) == 0
    assert read_card(built).engine_sha256 == sha256(built.read_bytes()) != sha256(first)
    out = capsys.readouterr().out
    assert "no plain.engine.layers.json: layers can be read only on a GPU" in out
    assert {path.name for path in built.parent.iterdir()} == {"plain.onnx", "plain.engine", "plain.engine.json"}


def test_layers_are_written_where_a_gpu_can_read_them(built, monkeypatch, capsys):
    """The GPU is played here; tests/gpu reads real layers."""
    trt = tensorrt_engine.import_library("tensorrt_rtx")
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(engine, "choose_builder", lambda: "tensorrt_rtx")
    inspector = SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": [kind.name]}))
    loaded = SimpleNamespace(create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, content: loaded)
    assert run(built.with_suffix(".onnx"), "--batch", 1, 2, 4) == 0
    assert json.loads(layers_path(built).read_text()) == {"Layers": ["JSON"]}
    assert "plain.engine.layers.json\n" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")
    assert engine.inspect_layers(trt, b"", read_card(built)) is None
    monkeypatch.setattr(gpu, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, content: None)
    with pytest.raises(Refusal, match="the engine that was built cannot be loaded"):
        engine.inspect_layers(trt, b"", read_card(built))


def test_rtx_builds_nothing_that_the_gpu_here_cannot_load(built, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(engine, "choose_builder", lambda: "tensorrt_rtx")
    before = built.read_bytes()
    assert run(built.with_suffix(".onnx")) == 2
    error = capsys.readouterr().err
    assert "builds for compute capability 8.0, 8.6, 8.9, 12.0, 12.1, and the GPU here has 9.0: pip install" in error
    assert built.read_bytes() == before
    assert run(built.with_suffix(".onnx"), "--compute-capability", "8.9") == 0  # asked for, for another machine


def test_timings_of_another_machine_are_refused():
    """tensorrt_rtx has the calls of tensorrt, which it declares to be without effect."""
    import tensorrt_rtx as trt

    logger = tensorrt_engine.make_logger(trt)
    config = trt.Builder(logger).create_builder_config()
    with pytest.warns(DeprecationWarning, match="no-ops"):
        cache = engine.attach_timing_cache(config, logger, b"")
    assert bytes(cache.serialize())
    with (
        pytest.warns(DeprecationWarning, match="no-ops"),
        pytest.raises(Refusal, match=r"does not fit this GPU and TensorRT \(.*; name a new file to begin one"),
    ):
        engine.attach_timing_cache(config, logger, b"timings of another machine")


def test_options_of_tensorrt_are_asked_of_it(write_onnx, monkeypatch, capsys):
    """tensorrt itself needs a GPU to be installed; what it is asked for is seen on the configuration of RTX."""
    import tensorrt_rtx as trt

    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")
    config = trt.Builder(tensorrt_engine.make_logger(trt)).create_builder_config()
    options = engine.BuildOptions(version_compatible=True, refittable=True, workspace_mib=64)
    assert engine.configure(trt, "tensorrt", config, options, kind="fp32") == ("9.0",)
    flags = trt.BuilderFlag
    assert [config.get_flag(flag) for flag in (flags.VERSION_COMPATIBLE, flags.REFIT, flags.TF32)] == [
        True,
        True,
        False,
    ]
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    _, path = write_onnx()
    monkeypatch.setattr(engine, "choose_builder", lambda: "tensorrt")
    assert run(path, "--compute-capability", "8.9") == 2
    assert "tensorrt builds for the GPU of this machine" in capsys.readouterr().err


def test_timings_are_read_handed_on_and_written(write_onnx, tmp_path, monkeypatch):
    _, path = write_onnx()
    real, timings, seen = engine.build_engine(path, batch=(1, 2, 4)), tmp_path / "timings", []

    def build(path, *, batch, hints, options, report):
        seen.append(options.timing_cache)
        return replace(real, timing_cache=b"more " + options.timing_cache)

    monkeypatch.setattr(engine, "build_engine", build)
    for expected in (b"more ", b"more more "):
        assert run(path, "--timing-cache", timings) == 0
        assert timings.read_bytes() == expected
    assert seen == [b"", b"more "]


def test_a_parity_report_on_the_same_file_is_embedded(write_onnx, tmp_path, capsys):
    _, path = write_onnx()
    report = {"artefacts": {"plain.onnx": sha256(path.read_bytes())}, "parity": [{"max_abs": 1e-6}]}
    beside, elsewhere = path.with_suffix(".parity.json"), tmp_path / "elsewhere.json"
    beside.write_text(json.dumps(report))
    assert run(path) == 0
    assert read_card(path.with_suffix(".engine")).parity == report
    elsewhere.write_text(json.dumps({**report, "parity": []}))
    assert run(path, "--parity", elsewhere) == 0
    assert read_card(path.with_suffix(".engine")).parity == {**report, "parity": []}
    beside.unlink()
    assert run(path) == 0
    assert read_card(path.with_suffix(".engine")).parity is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"artefacts": ["0"]}', "is not a report of export/parity.py"),
        ('{"artefacts": {"plain.onnx": "0"}}', "is about another file than"),
    ],
)
def test_a_parity_report_that_does_not_fit_is_refused_or_left_out(write_onnx, capsys, text, message):
    _, path = write_onnx()
    beside = path.with_suffix(".parity.json")
    beside.write_text(text)
    assert run(path, "--parity", beside) == 2
    assert message in capsys.readouterr().err
    assert not path.with_suffix(".engine").exists()
    assert run(path) == 0
    assert message in capsys.readouterr().out
    assert read_card(path.with_suffix(".engine")).parity is None


def test_a_version_compatible_engine_is_taken_by_later_libraries_alone(built, monkeypatch):
    trt = tensorrt_engine.import_library("tensorrt_rtx")
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "use", lambda device: None)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "8.9")
    allowed = []
    monkeypatch.setattr(
        trt.Runtime,
        "deserialize_cuda_engine",
        lambda self, content: allowed.append(self.engine_host_code_allowed),
    )
    for version, compatible, message in (
        ("1.0.0.1", True, "cannot be loaded"),
        ("99.0.0.1", True, "builder_version is 99"),
        ("1.0.0.1", False, r"builder_version is 1\.0"),
    ):
        change(built, builder_version=version, version_compatible=compatible)
        with pytest.raises(Refusal, match=message):
            load_runtime(built)
    assert allowed == [True]


def test_the_builder_is_chosen_by_what_is_here(monkeypatch):
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    for installed, chosen in (({"tensorrt", "tensorrt_rtx"}, "tensorrt"), ({"tensorrt_rtx"}, "tensorrt_rtx")):
        monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name, installed=installed: name in installed)
        assert engine.choose_builder() == chosen
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: name == "tensorrt")
    assert engine.choose_builder() == "tensorrt"
    monkeypatch.setattr(gpu, "num_devices", lambda: 0)
    with pytest.raises(Refusal, match=r"pip install -e '\.\[tensorrt\]'.*pip install -e '\.\[rtx\]'"):
        engine.choose_builder()


def test_json_prints_the_card(write_onnx, capsys):
    _, path = write_onnx()
    assert run(path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(card_path(path.with_suffix(".engine")).read_text())


def test_ctrl_c_during_a_build_leaves_what_was_there(built, write_onnx, monkeypatch, capsys):
    """The monitor's refusal to go on ends the build; Ctrl-C is turned into it."""
    before, real = {path: path.read_bytes() for path in (built, card_path(built))}, engine.build_engine
    main, steps = threading.main_thread().ident, []

    def interrupt(phase, done, total):
        steps.append(phase)
        if len(steps) == 1:  # a second one could reach the test runner
            signal.pthread_kill(main, signal.SIGINT)

    _, path = write_onnx(depth=34)
    monkeypatch.setattr(engine, "build_engine", lambda path, **fields: real(path, **{**fields, "report": interrupt}))
    assert run(path) == 130
    assert "interrupted: nothing was left half-written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in built.parent.iterdir()} == {"plain.onnx", "plain.engine", "plain.engine.json"}


def test_an_engine_interrupted_before_its_card_is_not_served(built, monkeypatch):
    write_whole = to_trt.write_whole

    def interrupt(path, content):
        if path == card_path(built):
            raise KeyboardInterrupt
        return write_whole(path, content)

    monkeypatch.setattr(to_trt, "write_whole", interrupt)
    assert run(built.with_suffix(".onnx"), "--batch", 1, 1, 2) == 130
    with pytest.raises(Refusal, match="does not fit its card: engine_sha256 differs"):
        load_runtime(built)


def test_precision_is_that_of_the_graph(write_onnx):
    _, path = write_onnx()
    model = onnx.load(path)
    assert precision(model) == "fp32"
    model.graph.initializer[0].data_type = TensorProto.FLOAT16
    assert precision(model) == "fp16"
    model.graph.initializer[1].data_type = TensorProto.BFLOAT16
    assert precision(model) == "bf16"
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s"], ["d"]))
    assert precision(model) == "int8"
    model.graph.initializer[1].data_type = TensorProto.FLOAT8E4M3FN
    assert precision(model) == "fp8"


def precision(model):
    return read_graph("plain.onnx", model.SerializeToString()).precision
