"""An engine is served by what its card allows: real builds with tensorrt_rtx, none of them run."""

import json
import sys

import pytest

from common.refusal import Refusal
from export.model_file.engine_card import card_path
from export.runtimes import gpu, tensorrt_engine
from export.runtimes.load import load_runtime

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")


def change(path, **fields):
    record = json.loads(card_path(path).read_text())
    card_path(path).write_text(json.dumps({**record, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "format is not diracnet-engine-2"),
        ({"builder": "os"}, "builder cannot be 'os'"),
        ({"builder_version": "0.1"}, "builder_version is 0.1, here is"),
        ({"builder_version": "abc"}, "builder_version is abc, here is"),
        ({"engine_sha256": "0"}, "engine_sha256 differs"),
        ({"batch": [4, 2, 1]}, r"batch cannot be \[4, 2, 1\]"),
        ({"compute_capabilities": "8.9"}, "compute_capabilities cannot be '8.9'"),
        ({"signature": {}}, "signature is damaged"),
        ({"spec": {}}, "the model's spec is damaged"),
        ({"provenance": None}, "provenance cannot be None"),
        ({"parity": []}, r"parity cannot be \[\]"),
        ({"gpu": 1}, "gpu cannot be 1"),
        ({"workspace_mib": "1"}, "workspace_mib cannot be '1'"),
        ({"version_compatible": None}, "version_compatible cannot be None"),
        ({"refittable": 2}, "refittable cannot be 2"),
        ({"output_dtype": 1}, "output_dtype cannot be 1"),
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
    with pytest.raises(Refusal, match="is not valid JSON"):
        load_runtime(built)
    card_path(built).unlink()
    with pytest.raises(
        Refusal, match=r"plain\.engine has no card: plain\.engine\.json is not beside it; copy it there"
    ):
        load_runtime(built)


def test_an_engine_needs_a_gpu_that_it_was_built_for(built, monkeypatch):
    monkeypatch.setattr(gpu, "num_devices", lambda: 0)
    with pytest.raises(Refusal, match=r"needs an NVIDIA GPU and its driver, and none is found here; serve the \.onnx"):
        load_runtime(built)
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "use", lambda device: None)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "5.2")
    with pytest.raises(Refusal, match=r"compute_capabilities are .*8\.6.*, this GPU's is 5\.2"):
        load_runtime(built)


def test_an_engine_of_tensorrt_is_for_one_model_of_gpu(built, monkeypatch):
    """An A10's engine does not fit a 3090, though both have compute capability 8.6."""
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "use", lambda device: None)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "8.6")
    monkeypatch.setattr(gpu, "device_name", lambda: "NVIDIA GeForce RTX 3090")
    change(built, gpu="NVIDIA A10")
    with pytest.raises(
        Refusal, match=r"gpu is NVIDIA A10, here is NVIDIA GeForce RTX 3090 \(see .*build it again here"
    ):
        load_runtime(built)


def test_a_gpu_that_rtx_has_no_engines_for_is_told_of_tensorrt(built, monkeypatch):
    monkeypatch.setattr(gpu, "num_devices", lambda: 1)
    monkeypatch.setattr(gpu, "use", lambda device: None)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")
    with pytest.raises(Refusal, match=r"this GPU's is 9\.0 .*build it with tensorrt instead: pip install"):
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
