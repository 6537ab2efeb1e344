"""Real builds with tensorrt_rtx, which needs no GPU. Running an engine does: see tests/gpu."""

import json
import signal
import sys
import threading

import onnx
import pytest
from onnx import TensorProto, helper

from export import engine, to_trt
from export.runtimes import gpu, tensorrt_engine
from export.runtimes.card import card_path, read_card
from export.runtimes.load import load_runtime
from train.cli import run_command
from train.files import sha256
from train.refusal import Refusal

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")


def run(*argv):
    return run_command(to_trt.command, to_trt.ToTrtConfig, argv=[str(part) for part in argv])


@pytest.fixture
def built(write_onnx):
    _, path = write_onnx()
    assert run(path, "--batch", 1, 2, 4) == 0
    return path.with_suffix(".engine")


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
    card = engine.build_engine(write_foreign(shape, kind), batch=(1, 8, 64)).card
    assert (card.name, card.batch, card.provenance) == ("foreign", batch, {})
    assert card.spec.labels == ("class 0", "class 1", "class 2", "class 3")


def test_every_node_that_the_parser_refuses_is_named(tmp_path):
    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("Reshape", ["a", "sizes"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor("sizes", TensorProto.INT64, [2], [-1, 3])],
    )
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    with pytest.raises(Refusal, match="cannot be parsed by tensorrt_rtx: Det first: "):
        engine.build_engine(path, batch=(1, 8, 64))


def test_wrong_arguments_are_refused_in_one_line_and_leave_the_old_engine(built, tmp_path, capsys):
    before = built.read_bytes()
    capsys.readouterr()
    (tmp_path / "text.onnx").write_text("hello")
    for argv, message in (
        ([built.with_suffix(".onnx"), "--batch", 4, 2, 1], "--batch must be MIN <= OPT <= MAX"),
        ([tmp_path / "text.onnx", "--out", built], "is no valid ONNX file"),
        ([tmp_path / "missing.onnx", "--out", built], "No such file or directory"),
    ):
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert built.read_bytes() == before


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


def test_a_build_can_be_cancelled(write_onnx):
    """The monitor's refusal to go on ends the build; Ctrl-C is turned into it."""
    _, path = write_onnx(depth=34)
    main = threading.main_thread().ident

    def interrupt(phase, done, total):
        signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        engine.build_engine(path, batch=(1, 2, 4), report=interrupt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "format is not diracnet-engine-1"),
        ({"builder": "os"}, "builder cannot be 'os'"),
        ({"builder_version": "0.1"}, "builder_version is 0.1, here is"),
        ({"engine_sha256": "0"}, "engine_sha256 differs"),
        ({"batch": [4, 2, 1]}, r"batch cannot be \[4, 2, 1\]"),
        ({"compute_capabilities": "8.9"}, "compute_capabilities cannot be '8.9'"),
        ({"signature": {}}, "signature is damaged"),
        ({"spec": {}}, "the model's spec is damaged"),
        ({"provenance": None}, "provenance cannot be None"),
    ],
)
def test_an_engine_whose_card_does_not_fit_is_refused_by_field(built, fields, message):
    change(built, **fields)
    with pytest.raises(Refusal, match=message):
        load_runtime(built)


def test_an_engine_without_a_whole_card_is_refused(built):
    record = json.loads(card_path(built).read_text())
    del record["spec"], record["batch"]
    card_path(built).write_text(json.dumps(record))
    with pytest.raises(Refusal, match="lacks batch, spec"):
        load_runtime(built)
    card_path(built).write_text("{")
    with pytest.raises(Refusal, match="is no JSON"):
        load_runtime(built)
    card_path(built).unlink()
    with pytest.raises(Refusal, match=r"plain\.engine\.json: No such file"):
        load_runtime(built)


def test_an_engine_needs_a_gpu_that_it_was_built_for(built, monkeypatch):
    monkeypatch.setattr(gpu, "num_devices", lambda: 0)
    with pytest.raises(Refusal, match=r"needs an NVIDIA GPU and its driver, and none is found here; serve the \.onnx"):
        load_runtime(built)
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "5.2")
    with pytest.raises(Refusal, match=r"compute_capabilities are .*8\.6.*, this GPU's is 5\.2"):
        load_runtime(built)


def test_an_engine_of_a_library_that_is_missing_says_what_to_install(built, monkeypatch):
    change(built, builder="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Refusal, match=r"tensorrt is not installed here: pip install -e '\.\[tensorrt\]'"):
        load_runtime(built)


def test_library_warnings_are_kept_not_printed(capfd):
    import tensorrt_rtx as trt

    logger = tensorrt_engine.make_logger(trt)
    assert logger.last_error() == "the library does not say why"
    logger.log(trt.ILogger.WARNING, "careful")
    logger.log(trt.ILogger.ERROR, "broken")
    logger.log(trt.ILogger.INFO, "chatter")
    assert [text for _, text in logger.messages] == ["careful", "broken"]
    assert logger.last_error() == "broken"
    assert capfd.readouterr() == ("", "")


def test_precision_is_that_of_the_graph(write_onnx):
    _, path = write_onnx()
    model = onnx.load(path)
    assert engine.precision(model) == "fp32"
    model.graph.initializer[0].data_type = TensorProto.FLOAT16
    assert engine.precision(model) == "fp16"
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s"], ["d"]))
    assert engine.precision(model) == "int8"
