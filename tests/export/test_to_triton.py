"""Model repositories, read back with the description of a model that Triton's own client ships."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc.model_config_pb2 import ModelConfig

from common.cli import run_command
from common.files import sha256
from export import to_triton
from export.engines.engine import build_engine
from export.model_file.engine_card import card_path
from export.runtimes.onnx_session import OnnxSession, ort
from export.to_triton import ONNX_RUNTIME, TritonModel, config_text


def run(*argv):
    return run_command(to_triton.command, to_triton.ToTritonConfig, argv=[str(part) for part in argv])


def read_config(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def write_engine(write_onnx):
    """An engine of tensorrt, as its card says; it is really one of tensorrt_rtx, which needs no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")

    def write(batch=(1, 4, 16), **fields):
        path = write_onnx()[1]
        engine = build_engine(path, batch=batch)
        out = path.with_suffix(".engine")
        out.write_bytes(engine.content)
        fields = {"builder": "tensorrt", "builder_version": "10.13.2.6", **fields}
        card_path(out).write_text(replace(engine.card, **fields).to_json())
        return out

    return write


def test_a_net_of_ours_becomes_a_model_of_onnx_runtime(write_onnx, tmp_path, make_spec):
    _, path = write_onnx()
    assert run(path, "--out", tmp_path / "repository", "--name", "digits", "--max-queue-delay", 250) == 0
    folder = tmp_path / "repository" / "digits"
    assert set(files_in(folder)) == {"config.pbtxt", "labels.txt", "1/model.onnx"}
    assert (folder / "1/model.onnx").read_bytes() == path.read_bytes()
    assert tuple((folder / "labels.txt").read_text().splitlines()) == make_spec().labels
    images = {"data_type": "TYPE_UINT8", "dims": [8, 8, 3]}
    warmup = [
        {"name": f"batch {n}", "batch_size": n, "inputs": {"images": {**images, "zero_data": True}}} for n in (1, 64)
    ]
    assert read_config(folder) == expected(
        name="digits",
        backend="onnxruntime",
        platform="onnxruntime_onnx",
        default_model_filename="model.onnx",
        max_batch_size=64,
        input=[{"name": "images", **images}],
        output=[{"name": "logits", "data_type": "TYPE_FP32", "dims": [10], "label_filename": "labels.txt"}],
        instance_group=[{"kind": "KIND_AUTO", "count": 1}],
        dynamic_batching={"preferred_batch_size": [8, 64], "max_queue_delay_microseconds": 250},
        model_warmup=warmup,
    )


def expected(**fields):
    from google.protobuf import json_format

    return json_format.ParseDict(fields, ModelConfig())


def test_an_engine_becomes_a_model_of_tensorrt_within_its_profile(write_engine, tmp_path, capsys):
    path = write_engine()
    assert run(path, "--out", tmp_path / "repository", "--kind", "gpu") == 0
    assert "TensorRT 10.13.2 in the server, compute capability 8.0, " in capsys.readouterr().out
    folder = tmp_path / "repository" / "plain"
    config = read_config(folder)
    assert (folder / "1/model.plan").read_bytes() == path.read_bytes()
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt",
        "tensorrt_plan",
        "model.plan",
    )
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (16, [4, 16])
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_a_smaller_batch_than_the_engines_may_be_asked_for(write_engine, tmp_path, capsys):
    path = write_engine(version_compatible=True)
    assert run(path, "--out", tmp_path / "r", "--max-batch", 3, "--json") == 0
    output = capsys.readouterr()
    assert "version-compatible=true" in output.err
    record = json.loads(output.out)
    assert record["sha256"] == sha256(path.read_bytes())
    assert (record["out"], record["max_batch"], record["preferred"]) == (str(tmp_path / "r/plain/1/model.plan"), 3, [3])
    config = read_config(tmp_path / "r" / "plain")
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (3, [3])


@pytest.mark.parametrize(
    ("shape", "kind", "data_type"),
    [((4, 6, 5, 3), TensorProto.UINT8, "TYPE_UINT8"), ((4, 3, 6, 5), TensorProto.FLOAT16, "TYPE_FP16")],
)
def test_a_fixed_batch_is_written_into_the_shapes(write_foreign, tmp_path, shape, kind, data_type):
    assert run(write_foreign(shape, kind), "--out", tmp_path / "r", "--kind", "cpu") == 0
    config = read_config(tmp_path / "r" / "foreign")
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    (images,), (logits,), (warmup,) = config.input, config.output, config.model_warmup
    assert (tuple(images.dims), tuple(logits.dims)) == (shape, (4, 4))
    assert (
        images.data_type == ModelConfig.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name[data_type].number
    )
    assert (warmup.name, warmup.batch_size, tuple(warmup.inputs["x"].dims)) == ("batch 4", 1, shape)
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert (tmp_path / "r/foreign/labels.txt").read_text() == "class 0\nclass 1\nclass 2\nclass 3\n"


@pytest.mark.parametrize("name", ['say "images"', "back\\slash", "Größe", "画像", "😀", "tab\t"])
def test_every_name_survives_the_text_format(write_onnx, name):
    from export.graphs.onnx_file import read_onnx

    file = read_onnx(write_onnx()[1])
    model = TritonModel(
        replace(file, signature=replace(file.signature, input_name=name)), ONNX_RUNTIME, {}, 0, 8, 8, ""
    )
    text = config_text("m", model, "auto", 8, [8], 0)
    config = text_format.Parse(text, ModelConfig())
    assert config.input[0].name == name
    assert list(config.model_warmup[0].inputs) == [name]


def test_weights_in_files_of_their_own_come_along(write_onnx, tmp_path, images):
    _, path = write_onnx()
    before = OnnxSession(path)(images())
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert run(path, "--out", tmp_path / "r") == 0
    session = ort.InferenceSession(tmp_path / "r/plain/1/model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"images": images()})[0], before, rtol=1e-5, atol=1e-5)


def test_the_same_model_again_changes_only_what_is_asked(write_onnx, tmp_path):
    _, path = write_onnx()
    assert run(path, "--out", tmp_path / "r") == 0
    first = files_in(tmp_path / "r")
    assert run(path, "--out", tmp_path / "r") == 0
    assert files_in(tmp_path / "r") == first
    assert run(path, "--out", tmp_path / "r", "--max-batch", 4) == 0
    assert read_config(tmp_path / "r/plain").max_batch_size == 4
    assert (tmp_path / "r/plain/1/model.onnx").read_bytes() == path.read_bytes()


def test_another_model_needs_another_version_and_an_equal_configuration(write_onnx, tmp_path, capsys):
    _, path = write_onnx()
    assert run(path, "--out", tmp_path / "r") == 0
    write_onnx(depth=16)
    before = files_in(tmp_path / "r")
    assert run(path, "--out", tmp_path / "r") == 2
    assert "holds another model: model.onnx differs; give a new --version" in capsys.readouterr().err
    assert run(path, "--out", tmp_path / "r", "--version", 2, "--max-batch", 7) == 2
    assert "says 'max_batch_size: 64', not 'max_batch_size: 7'; choose another --name" in capsys.readouterr().err
    assert files_in(tmp_path / "r") == before
    assert run(path, "--out", tmp_path / "r", "--version", 2) == 0
    assert files_in(tmp_path / "r") == {**before, "plain/2/model.onnx": path.read_bytes()}
    (tmp_path / "r/plain/labels.txt").write_text("")
    assert run(path, "--out", tmp_path / "r", "--version", 3) == 2
    assert "labels.txt serves other versions too and says shorter or longer" in capsys.readouterr().err


def test_a_folder_without_versions_is_filled(write_onnx, tmp_path):
    (tmp_path / "r/plain").mkdir(parents=True)
    assert run(write_onnx()[1], "--out", tmp_path / "r") == 0
    assert set(files_in(tmp_path / "r/plain")) == {"config.pbtxt", "labels.txt", "1/model.onnx"}


def test_wrong_arguments_are_refused_in_one_line_and_write_nothing(write_onnx, write_foreign, tmp_path, capsys):
    _, path = write_onnx()
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "file").write_text("")
    fixed, out = write_foreign((4, 6, 5, 3), TensorProto.UINT8), tmp_path / "r"
    for argv, message in (
        ([tmp_path / "missing.onnx"], "No such file"),
        ([tmp_path / "text.onnx"], "is not a valid ONNX file"),
        ([path, "--name", "../up"], "--name may have letters"),
        ([path, "--name", ".hidden"], "--name may have letters"),
        ([path, "--version", 0], "--version counts from 1"),
        ([path, "--max-queue-delay", -1], "--max-queue-delay from 0"),
        ([path, "--max-batch", 0], "--max-batch must be from 1 to any number, got 0"),
        ([fixed, "--max-batch", 8], "takes 4 images at a time, no more and no fewer"),
        ([path, "--kind", "tpu"], "invalid choice"),
        ([path, "--out", tmp_path / "file"], "cannot write"),
    ):
        assert run(*argv, *([] if "--out" in argv else ["--out", out])) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_engines_that_triton_cannot_run_are_refused(write_engine, tmp_path, capsys):
    for batch, fields, argv, message in (
        ((1, 4, 16), {"builder": "tensorrt_rtx"}, [], "Triton runs those of tensorrt alone; give the .onnx"),
        ((1, 4, 16), {"engine_sha256": "0"}, [], "engine_sha256 differs"),
        ((1, 4, 16), {"output_dtype": "int8"}, [], "answers in int8"),
        ((2, 4, 16), {}, [], "takes no batch under 2, and Triton sends single images"),
        ((1, 4, 16), {}, ["--kind", "cpu"], "runs on GPUs alone"),
        ((1, 4, 16), {}, ["--max-batch", 17], "--max-batch must be from 1 to 16, got 17"),
    ):
        assert run(write_engine(batch, **fields), "--out", tmp_path / "r", *argv) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_labels_with_line_breaks_are_refused(write_onnx, tmp_path, capsys):
    _, path = write_onnx()
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "spec")
    entry.value = entry.value.replace("label 0", r"label\n0")
    onnx.save(model, path)
    assert run(path, "--out", tmp_path / "r") == 2
    assert "labels with line breaks" in capsys.readouterr().err


def test_cards_and_metadata_without_bottom_are_refused_in_one_line(write_engine, write_onnx, tmp_path, capsys):
    deep, engine, (_, path) = "[" * 100_000, write_engine(), write_onnx()
    card_path(engine).write_text(deep)
    model = onnx.load(path)
    for entry in model.metadata_props:
        entry.value = deep
    onnx.save(model, path)
    for source in (engine, path):
        assert run(source, "--out", tmp_path / "repository") == 2
        error = capsys.readouterr().err
        assert "is not valid JSON: it is nested deeper than 64" in error
        assert error.count("\n") == 1
        assert len(error) < 500
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_ctrl_c_leaves_nothing_half_written(write_onnx, tmp_path, monkeypatch, capsys, version):
    _, path = write_onnx()
    if version == 2:
        assert run(path, "--out", tmp_path / "r") == 0
    before, write_whole = files_in(tmp_path / "r"), to_triton.write_whole

    def interrupt(target, content):
        if target.name == "model.onnx":
            raise KeyboardInterrupt
        return write_whole(target, content)

    monkeypatch.setattr(to_triton, "write_whole", interrupt)
    assert run(path, "--out", tmp_path / "r", "--version", version) == 130
    assert "nothing was left half-written" in capsys.readouterr().err
    assert files_in(tmp_path / "r") == before


def test_a_disk_that_takes_no_folder_is_said_in_one_line(write_onnx, tmp_path, monkeypatch, capsys):
    def rename(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_triton.os, "rename", rename)
    assert run(write_onnx()[1], "--out", tmp_path / "r") == 2
    assert "No space left on device; nothing was changed" in capsys.readouterr().err
    assert files_in(tmp_path / "r") == {}
