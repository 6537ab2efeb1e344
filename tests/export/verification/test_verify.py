import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from own_nets import ThisMorning

from common.cli import run_command
from common.files import sha256
from common.spec import Spec
from export import to_onnx as to_onnx_command
from export import to_trt, verify
from export.graphs.graph import set_provenance
from export.model_file.engine_card import card_path
from export.model_file.onnx_reader import read_header, with_metadata
from fold import run as fold
from fold.plain import load_plain, save_plain
from fold.user_net import Made
from train.checkpoint import Checkpoint, save_checkpoint
from train.data import datasets
from train.trainer import evaluate

WEIGHTS, FOLDED = "lowering, and every weight", "weights of plain.safetensors"
PLAIN_DIGEST, CHECKPOINT_DIGEST = "sha256 of plain.safetensors", "sha256 of the checkpoint"


def convert(*argv):
    command, config = to_onnx_command.command, to_onnx_command.ToOnnxConfig
    assert run_command(command, config, argv=[str(part) for part in argv]) == 0


def write_run(folder, make_net, seed=0):
    """A small net of digits with all that the road makes of it; it is not trained, and its accuracy is what it is."""
    folder.mkdir()
    info = datasets.info_of("digits")
    fields = {"width": 0.25, "channels": 1, "size": 8}
    net = make_net(seed=seed, **fields)
    spec = Spec("cifar", 10, 0.25, "ncrelu", info.image, info.labels)
    net.normalize.load_state_dict(type(net.normalize)(info.image.mean, info.image.std).state_dict())
    digits = datasets.divide(datasets.load("digits"), 0.1, seed=0)
    config = {"command": "python train/run.py", "dataset": "digits", "seed": 0, "validation": 0.1, "lr": 0.1}
    config["split"] = datasets.record(digits)[0]
    accuracy = evaluate(net, digits.test).accuracy
    state = Checkpoint.fresh(spec, net.state_dict(), config, test_accuracy=accuracy)
    save_checkpoint(folder / "checkpoint.pt", state)
    argv = [str(folder / "checkpoint.pt"), "--images", "20"]
    assert run_command(fold.command, fold.FoldConfig, argv=argv) == 0
    convert(folder / "plain.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_net):
    home = tmp_path_factory.mktemp("runs")
    return [write_run(home / str(seed), make_net, seed) for seed in (0, 1)]


@pytest.fixture
def road(runs, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(runs[0], tmp_path / "road")


@pytest.fixture
def run(tmp_path, capsys):
    """`run(file, ...)` is the exit status, and for each claim its row."""

    def run(*argv):
        capsys.readouterr()
        argv = [str(part) for part in (*argv, "--json")]
        status = run_command(verify.command, verify.VerifyConfig, argv=argv)
        text = capsys.readouterr()
        if status == 2:
            return status, text.err
        return status, {row["claim"]: row for row in json.loads(text.out)["claims"]}

    return run


def with_verdict(rows, verdict):
    return [claim for claim, row in rows.items() if row["verdict"] == verdict]


def provenance_of(path):
    return read_header(path, path.read_bytes()).provenance


def say(path, change):
    """Let an ONNX file record what `change` makes of its provenance."""
    model, provenance = onnx.load(path), provenance_of(path)
    change(provenance)
    set_provenance(model, provenance)
    onnx.save(model, path)


def bend(path, name="group1.block0.conv.bias", *, by=1e-6):
    """Change one weight of an ONNX file; by so little that no class changes, unless it is said by how much."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain.onnx", "plain.safetensors", "checkpoint.pt"])
def test_an_honest_file_is_the_same(road, run, name):
    status, rows = run(road / name)
    assert status == 0
    assert with_verdict(rows, "cannot be checked here") == ["training: command, lr, epochs_done"]
    expected = {
        "plain.onnx": {PLAIN_DIGEST, WEIGHTS, "answers of plain.onnx to the probe images"},
        "plain.safetensors": {CHECKPOINT_DIGEST, FOLDED, "fold: logits, float64, real images"},
        "checkpoint.pt": {"test accuracy", "images of training, validation and test"},
    }
    assert expected[name] <= {*with_verdict(rows, "same")}
    assert rows["test accuracy"]["recorded"] == rows["test accuracy"]["computed"][: len("10.00 %")].strip()


@pytest.mark.slow
def test_what_is_missing_is_never_passed(road, run, tmp_path):
    alone = tmp_path / "alone" / "plain.onnx"
    alone.parent.mkdir()
    shutil.copy(road / "plain.onnx", alone)
    status, rows = run(alone, "--report", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (status, report["same"], report["differs"]) == (0, False, False)
    missing = with_verdict(rows, "cannot be checked here")
    assert {PLAIN_DIGEST, CHECKPOINT_DIGEST, WEIGHTS, FOLDED, "fold: logits, float64, random images"} <= {*missing}
    assert "name plain.safetensors with --against" in rows[PLAIN_DIGEST]["computed"]
    status, rows = run(alone, "--against", road / "plain.safetensors")
    assert status == 0
    assert "fold: logits, float64, random images" in with_verdict(rows, "same"), "its checkpoint lies beside it"


@pytest.mark.slow
def test_one_weight_is_found(road, run):
    bend(road / "plain.onnx")
    status, rows = run(road / "plain.onnx")
    assert status == 1
    assert with_verdict(rows, "differs") == [WEIGHTS]
    assert rows[WEIGHTS]["computed"] == "another group1.block0.conv.bias"
    bend(road / "plain.onnx", by=1.0)  # no report claims how near the answers are, and they must be near all the same
    found = with_verdict(run(road / "plain.onnx")[1], "differs")
    for kind in ("real", "random", "extreme"):
        assert [claim for claim in found if claim.startswith("plain.onnx answers as ") and f" {kind} images" in claim]


@pytest.mark.slow
def test_labels_in_another_order_are_found(road, run):
    path = road / "plain.onnx"
    spec = json.loads(read_header(path, path.read_bytes()).metadata["spec"])
    spec["labels"].reverse()
    path.write_bytes(with_metadata(path, path.read_bytes(), {"spec": json.dumps(spec)}))
    row = run(path)[1]["record of spec, training, fold"]
    assert (row["verdict"], row["computed"]) == ("differs", "another spec in plain.safetensors")


@pytest.mark.slow
def test_attributes_that_onnx_assumes_may_be_stated(road, run):
    model = onnx.load(road / "plain.onnx")
    for node in model.graph.node:
        stated = {"Flatten": {"axis": 1}, "MaxPool": {"dilations": [1, 1]}}.get(node.op_type, {})
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in stated.items())
    onnx.save(model, road / "plain.onnx")
    assert WEIGHTS in with_verdict(run(road / "plain.onnx")[1], "same")


@pytest.mark.slow
def test_one_weight_before_the_export_is_found(road, run):
    plain = load_plain(road / "plain.safetensors")
    plain.net.graph["group1.block0.conv"].tensors["bias"][0] += 1e-6
    save_plain(road / "plain.safetensors", plain.net, plain.spec, plain.provenance)
    status, rows = run(road / "plain.safetensors")
    assert (status, with_verdict(rows, "differs")) == (1, [FOLDED])
    assert rows[FOLDED]["computed"] == "another group1.block0.conv.bias"
    status, rows = run(road / "plain.onnx")
    assert (status, with_verdict(rows, "differs")) == (1, [PLAIN_DIGEST])
    assert WEIGHTS in with_verdict(rows, "cannot be checked here"), "a file of another digest proves nothing"


FIGURES = {
    "test accuracy": lambda record: record["training"].update(test_accuracy=0.99),
    "images of training, validation and test": lambda record: record["training"]["split"].update(sha256="0" * 64),
    "fold: logits, float64, random images": lambda record: record["fold"]["logits"][0].update(relative=1e-3),
    "fold: logits, float32, real images": lambda record: record["fold"]["logits"][3].update(top1_changes=1),
    "fold: 8 layers, float64, random images": lambda record: record["fold"]["layers"][1].update(relative=1e-3),
    "parameters before the fold": lambda record: record["fold"].update(dirac_parameters=7),
    "precision": lambda record: record["export"].update(precision="bf16"),
    "opset": lambda record: record["export"].update(opset=13),
    WEIGHTS: lambda record: record["export"].update(lowering="split"),
    PLAIN_DIGEST: lambda record: record["export"].update(plain_sha256="0" * 64),
    CHECKPOINT_DIGEST: lambda record: record["fold"].update(checkpoint_sha256="0" * 64),
    "record of spec, training, fold": lambda record: record["training"].update(of_which_nobody_knows=1),
    "answers of plain.onnx to the probe images": lambda record: record["export"]["probe"]["logits"][3].reverse(),
}


@pytest.mark.slow
@pytest.mark.parametrize("claim", FIGURES)
def test_one_figure_is_found(road, run, claim):
    say(road / "plain.onnx", FIGURES[claim])
    status, rows = run(road / "plain.onnx")
    handed_on = {"record of spec, training, fold", "record of spec, training"}
    assert status == 1
    found = {*with_verdict(rows, "differs")}
    assert claim in found
    assert found - {claim} <= handed_on, "the sources say otherwise, and nothing else is touched"


@pytest.mark.slow
def test_files_and_probes_of_another_model_are_found(road, runs, run):
    say(
        road / "plain.onnx",
        lambda record: record["export"].update(probe=provenance_of(runs[1] / "plain.onnx")["export"]["probe"]),
    )
    status, rows = run(road / "plain.onnx")
    assert (status, with_verdict(rows, "differs")) == (1, ["answers of plain.onnx to the probe images"])
    for name, claim in (("checkpoint.pt", CHECKPOINT_DIGEST), ("plain.safetensors", PLAIN_DIGEST)):
        shutil.copytree(runs[0], road, dirs_exist_ok=True)
        shutil.copy(runs[1] / name, road)
        status, rows = run(road / "plain.onnx")
        assert (status, with_verdict(rows, "differs")) == (1, [claim])
        assert str(road / name) in rows[claim]["computed"]


@pytest.mark.slow
def test_a_report_of_parity_is_computed_again(road, run):
    from export import parity

    report = road / "plain.parity.json"
    argv = [road / "plain.onnx", "--against", road / "plain.safetensors", "--images", 20, "--report", report]
    assert run_command(parity.command, parity.ParityConfig, argv=[str(part) for part in argv]) == 0
    status, rows = run(road / "plain.onnx")
    claim = "plain.onnx answers as plain.safetensors, 20 real images"
    assert status == 0
    assert "100.00 % of 20" in rows[claim]["recorded"]
    honest = report.read_text()
    for name, lie in (("relative", 0.5), ("within_tolerance", False)):
        said = json.loads(honest)
        said["parity"][0][name] = lie
        report.write_text(json.dumps(said))
        assert with_verdict(run(road / "plain.onnx")[1], "differs") == [claim]
    said["parity"][0]["relative"] = "small"
    report.write_text(json.dumps(said))
    assert with_verdict(run(road / "plain.onnx")[1], "differs") == [f"a comparison in {report}"]
    bend(road / "plain.onnx")
    assert f"sha256 in {report}" in with_verdict(run(road / "plain.onnx")[1], "differs")


@pytest.mark.slow
def test_eight_bits_are_judged_again(road, run):
    argv = ["--precision", "int8", "--lowering", "concat", "--calibration-images", 40, "--allow-drop"]
    convert(road / "plain.safetensors", *argv, "--out", road / "plain-int8.onnx")
    path, honest = road / "plain-int8.onnx", (road / "plain-int8.onnx").read_bytes()
    status, rows = run(path)
    assert status == 0, with_verdict(rows, "differs")
    claim = "int8 on test images: {}".format
    assert {claim("accuracy"), claim("top1 agreement"), claim("lost high"), "eight-bit sums saturate"} <= {
        *with_verdict(rows, "same")
    }
    assert {"cascade: escalated", "cascade: changed", "cascade: changed alone"} <= {*with_verdict(rows, "same")}
    say(path, lambda record: record["export"]["cascade"].update(num_escalated=0, threshold=1e3))
    assert "cascade: escalated" in with_verdict(run(path)[1], "differs")
    path.write_bytes(honest)
    for name in ("accuracy", "top1_agreement", "num_images"):
        say(
            path,
            lambda record, name=name: record["export"]["test"].update(
                {name: record["export"]["test"][name] / 2 if name != "num_images" else 7}
            ),
        )
        assert with_verdict(run(path)[1], "differs") == [claim(name.replace("_", " "))]
        path.write_bytes(honest)
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8)
    weights = onnx.numpy_helper.to_array(tensor).copy()
    weights.reshape(len(weights), -1)[0, :2] = 127
    tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    onnx.save(model, path)
    assert "eight-bit sums saturate" in with_verdict(run(path)[1], "differs")


DAMAGE = (3, None, [], "nonsense", {"sha256": 5}, [[1, 2]], -1, 1e400, True, [{"what": "logits"}])


@pytest.mark.slow
def test_no_record_ends_in_a_traceback(road, run):
    """Anything may stand in the metadata; what is not a claim of its kind differs."""
    path = road / "plain.onnx"
    honest = path.read_bytes()
    alone = road.parent / "alone.onnx"
    for section, names in {
        "training": ("dataset", "split", "seed", "validation", "test_accuracy"),
        "fold": ("logits", "layers", "checkpoint_sha256", "dirac_parameters"),
        "export": ("probe", "lowering", "opset", "precision", "plain_sha256", "test", "cannot_saturate"),
    }.items():
        for place, name in enumerate(names):
            alone.write_bytes(honest)
            damage = DAMAGE[place % len(DAMAGE)]
            say(alone, lambda record, section=section, name=name, damage=damage: record[section].update({name: damage}))
            status, rows = run(alone)
            assert status in (0, 1), rows
            if status == 1:
                assert f"{section}.{name}" in with_verdict(rows, "differs") or rows
    alone.write_bytes(honest)
    say(alone, lambda record: record["training"].update({"\x1b[31mred": "\x1b[31m"}))
    assert not any("\x1b" in claim for claim in run(alone)[1])


@pytest.mark.parametrize("value", DAMAGE)
def test_a_record_of_the_wrong_kind_is_no_claim(value):
    from export.verification.claims import read_claims

    fields = ("split", "test_accuracy", "checkpoint_sha256", "logits", "probe", "lowering", "opset", "cannot_saturate")
    homes = {"split": "training", "test_accuracy": "training", "checkpoint_sha256": "fold", "logits": "fold"}
    fine = {"test_accuracy": (None,), "opset": (3,), "cannot_saturate": (True,), "logits": ([],)}
    for name in fields:
        claims = read_claims({homes.get(name, "export"): {name: value}}, 10)
        is_fine = any(value is good or (value == good and type(value) is type(good)) for good in fine.get(name, ()))
        assert bool(claims.damaged) != is_fine, (name, value)
        assert not claims.damaged or claims.damaged[0].verdict == "differs"


@pytest.mark.slow
def test_a_graph_of_ones_own_net_is_read(tmp_path, run):
    from fold.sources import from_made

    torch.manual_seed(0)
    made = Made(
        ThisMorning().eval(), "nets.py:make", {"made_by": "nets.py:make"}, (32, 32), (0.5,) * 3, (0.2,) * 3, None, ()
    )
    source = from_made(made)
    path = tmp_path / "plain.safetensors"
    save_plain(path, source.plain.float(), source.spec, source.provenance)
    status, rows = run(path)
    assert (status, rows["convolutions after the fold"]["verdict"]) == (0, "same")
    source.provenance["fold"]["weights_sha256"] = None  # as fold/run.py records a net that was given no weights
    save_plain(path, source.plain.float(), source.spec, source.provenance)
    status, rows = run(path)
    assert (status, with_verdict(rows, "differs")) == (0, [])
    assert any(claim.startswith("fold: made_by") for claim in with_verdict(rows, "cannot be checked here"))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"as they were given")
    source.provenance["fold"]["weights_sha256"] = sha256(weights.read_bytes())
    save_plain(path, source.plain, source.spec, source.provenance)
    assert run(path)[1]["sha256 of fold.weights"]["verdict"] == "cannot be checked here"
    assert run(path, "--against", weights)[1]["sha256 of fold.weights"]["verdict"] == "same"
    source.provenance["fold"]["convolutions"][1] += 1
    save_plain(path, source.plain, source.spec, source.provenance)
    assert with_verdict(run(path)[1], "differs") == ["convolutions after the fold"]


@pytest.mark.slow
def test_an_engine_without_a_gpu_has_its_card_and_digests(road, run):
    argv = [str(road / "plain.onnx"), "--batch", "1", "2", "4"]
    assert run_command(to_trt.command, to_trt.ToTrtConfig, argv=argv) == 0
    built = road / "plain.engine"
    status, rows = run(built)
    assert status == 0
    assert {"sha256 of the engine", "sha256 of the ONNX file"} <= {*with_verdict(rows, "same")}
    assert {"library and GPU", "the engine answers as its ONNX file"} <= {*with_verdict(rows, "cannot be checked here")}
    card = json.loads(card_path(built).read_text())
    card_path(built).write_text(json.dumps({**card, "precision": "int8"}))
    assert with_verdict(run(built)[1], "differs") == ["precision in the card"]
    card_path(built).write_text(json.dumps(card))
    built.write_bytes(built.read_bytes()[:-1] + b"x")
    assert with_verdict(run(built)[1], "differs") == ["sha256 of the engine"]
    built.with_suffix(".onnx").write_bytes(built.with_suffix(".onnx").read_bytes() + b"\x7a\x00")
    assert "sha256 of the ONNX file" in with_verdict(run(built)[1], "differs")


def test_somebody_elses_net_has_few_claims(write_foreign, run):
    path = write_foreign(matrix=np.ones((3, 4)) * 9)
    status, message = run(path)
    assert (status, "records nothing about itself" in message) == (2, True)
    path.with_name("foreign.onnx.json").write_text(json.dumps({"mean": [0, 0, 0], "labels": list("abcd")}))
    status, rows = run(path)
    assert (status, {row["verdict"] for row in rows.values()}) == (0, {"same", "cannot be checked here"})
    path.with_name("foreign.onnx.json").write_text(json.dumps({"scores": "probabilities"}))
    status, rows = run(path)
    assert (status, with_verdict(rows, "differs")) == (1, ["scores, by foreign.onnx.json"])


@pytest.mark.slow
def test_mistakes_are_refused(road, runs, run, tmp_path):
    stranger = tmp_path / "stranger.npy"
    stranger.write_bytes(b"")
    for argv, message in (
        ([road / "nothing.onnx"], "cannot read"),
        ([road / "plain.onnx", "--against", stranger], "no claim is about"),
        ([road / "plain.onnx", "--data-dir", tmp_path], "leave out --data-dir"),
        ([stranger], "is not an artefact of this project"),
    ):
        status, found = run(*argv)
        assert (status, message in found) == (2, True), found
