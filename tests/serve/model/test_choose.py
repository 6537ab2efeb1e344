"""Which form and runtime serve: by clocks that only the runtimes themselves advance."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest

from common.refusal import Refusal
from export.graphs.graph import to_onnx
from export.model_file.probe import probe_images, record_probe
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from serve.config import ServeConfig
from serve.model.choose import choose, conditions_of, record_path, why_unfit

GOOD = {"float32_accuracy": 0.95, "accuracy": 0.949, "top1_agreement": 0.99}


@pytest.fixture
def write(tmp_path, make_net, make_spec):
    """`write(name, seed=0, **export)`: a file of the same spec, and what its export recorded."""

    def write(name, *, seed=0, depth=10, **export):
        record = {"export": {"precision": "fp32", "plain_sha256": "a" * 64, **export}}
        model = to_onnx(fold(make_net(seed=seed, depth=depth)), make_spec(depth=depth), record)
        (tmp_path / name).write_bytes(model.SerializeToString())
        return tmp_path / name

    return write


@pytest.fixture
def forms(write):
    return write("plain.onnx"), write("plain-int8.onnx", precision="int8", test=GOOD)


class Machine:
    """Runtimes that answer honestly, and a clock that shows what their answers cost."""

    def __init__(self, ms):
        self.ms, self.loaded, self.now, self.options = ms, [], 0.0, None

    def clock(self):
        return self.now

    def load(self, path, *, name, **options):
        self.loaded.append((path.name, name))
        self.options = options
        session, machine = OnnxSession(path), self

        class Timed:
            model, description = session.model, name

            def __call__(self, images):
                first, each = machine.ms[path.name, name]
                machine.now += (first + each * len(images)) / 1000
                return session(images)

        return Timed()

    def choose(self, *paths, runtime="auto", devices=(), num_threads=2, max_batch=8):
        self.loaded = []
        config = ServeConfig(paths, runtime, devices=devices, model_threads=num_threads, max_batch=max_batch)
        config, reason = choose(config, load=self.load, clock=self.clock)
        return SimpleNamespace(path=config.models[0], runtime=config.runtime_name, reason=reason)


@pytest.fixture
def machine():
    """At a batch of 1 and of 8, in ms: 2 and 16, 3.9 and 4.6, 1.2 and 4: geometric means 5.7, 4.2 and 2.2."""
    return Machine(
        {
            ("plain.onnx", "onnxruntime"): (0, 2),
            ("plain.onnx", "mnn"): (3.8, 0.1),
            ("plain-int8.onnx", "onnxruntime"): (0.8, 0.4),
        }
    )


def test_the_least_geometric_mean_serves_and_its_reason_is_said(machine, forms):
    choice = machine.choose(*forms)
    assert (choice.path, choice.runtime) == (forms[1], "onnxruntime")
    assert choice.reason == (f"plain-int8.onnx on onnxruntime is 1.9x the next of 3, kept in {record_path(forms[0])}")
    assert machine.options == {"device": None, "num_threads": 2}
    assert machine.choose(forms[0]).runtime == "mnn"
    machine.ms["plain.onnx", "mnn"] = (8, 0.1)
    assert machine.choose(forms[0], max_batch=2).runtime == "onnxruntime"


def test_a_kept_choice_is_taken_without_loading_anything(machine, forms):
    first, second = machine.choose(*forms), machine.choose(*forms)
    assert machine.loaded == []
    assert (second.path, second.runtime) == (first.path, first.runtime)
    assert second.reason.endswith(f"is 1.9x the next of 3, as {record_path(forms[0])} says")


@pytest.mark.slow
def test_whatever_can_change_the_choice_is_measured_again(machine, forms, write, monkeypatch):
    machine.choose(*forms)
    for change in ({"num_threads": 1}, {"max_batch": 4}, {"runtime": "onnxruntime"}):
        machine.choose(*forms, **change)
        assert machine.loaded, change
    for name, value in (
        ("processor", lambda: "another"),
        ("versions", lambda *names: {"onnxruntime": "1.0"}),
        ("num_cores", lambda: 99),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"serve.model.choose.{name}", value)
            machine.choose(*forms)
        assert machine.loaded, name
    machine.choose(*forms)
    write("plain.onnx", seed=1)
    machine.choose(*forms)
    assert machine.loaded
    machine.choose(*forms)
    assert not machine.loaded


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "",
        lambda record: "{",
        lambda record: "[]",
        lambda record: "{}",
        lambda record: "null",
        lambda record: json.dumps({**record, "format": "other"}),
        lambda record: json.dumps({**record, "chosen": ["0" * 64, "onnxruntime"]}),
        lambda record: json.dumps({**record, "chosen": 3}),
    ],
)
def test_a_damaged_record_is_measured_again_and_replaced(machine, forms, damage):
    choice = machine.choose(*forms)
    path = record_path(forms[0])
    whole = path.read_text()
    path.write_text(damage(json.loads(whole)))
    assert machine.choose(*forms) == choice
    assert path.read_text() == whole


def test_a_folder_that_takes_no_file_costs_only_the_measurement(machine, forms, monkeypatch):
    def refuse(path, content):
        raise Refusal(f"cannot write {path}: Read-only file system; nothing was changed")

    monkeypatch.setattr("serve.model.choose.write_whole", refuse)
    for _ in range(2):
        choice = machine.choose(*forms)
        assert (choice.path, len(machine.loaded)) == (forms[1], 3)
        assert "not kept: cannot write" in choice.reason


def test_one_candidate_is_neither_loaded_nor_measured(machine, forms, monkeypatch):
    assert machine.choose(forms[1]).runtime == "onnxruntime"
    assert machine.choose(*forms, runtime="mnn").path == forms[0]
    assert machine.choose(forms[0], runtime="onnxruntime").path == forms[0]
    assert machine.choose(forms[0], devices=(0,)).runtime == "onnxruntime"
    assert machine.choose(forms[0].with_name("missing.engine")).runtime is None
    monkeypatch.setattr("export.runtimes.mnn_module.find_spec", lambda name: None)
    assert machine.choose(forms[0]).runtime == "onnxruntime"
    assert machine.loaded == []
    assert not record_path(forms[0]).exists()


def test_pytorch_is_tried_only_where_it_is_named(machine, forms):
    machine.choose(*forms)
    assert "torch" not in {name for _, name in machine.loaded}
    machine.ms |= {("plain.onnx", "torch"): (0, 1), ("plain-int8.onnx", "torch"): (0, 2)}
    choice = machine.choose(*forms, runtime="torch", devices=(0,))
    assert (choice.path, choice.runtime) == (forms[0], "torch")
    assert {name for _, name in machine.loaded} == {"torch"}


def test_a_candidate_that_answers_its_probe_wrongly_is_left_out(machine, forms, write, caplog):
    answers = OnnxSession(forms[0])(probe_images(OnnxSession(forms[0]).model.spec.image))
    wrong = write("plain-int8.onnx", precision="int8", test=GOOD, probe=record_probe(2 * answers))
    choice = machine.choose(forms[0], wrong)
    assert (choice.path, choice.runtime) == (forms[0], "mnn")
    assert "plain-int8.onnx on onnxruntime is not chosen: DiracNet-10-0.25 answers its probe images" in caplog.text
    wrong_too = write("plain.onnx", probe=record_probe(2 * answers))
    with pytest.raises(Refusal, match="away from what its file recorded"):
        machine.choose(wrong_too, wrong)


def test_the_only_one_that_passes_needs_no_measuring(machine, forms, write):
    answers = OnnxSession(forms[0])(probe_images(OnnxSession(forms[0]).model.spec.image))
    wrong = write("plain-int8.onnx", precision="int8", test=GOOD, probe=record_probe(2 * answers))
    choice = machine.choose(forms[0], wrong, runtime="onnxruntime")
    assert choice.path == forms[0]
    assert choice.reason.startswith("plain.onnx on onnxruntime alone passes")


@pytest.mark.parametrize(
    ("precision", "test", "reason"),
    [
        ("fp32", None, None),
        ("fp16", None, None),
        ("int8", GOOD, None),
        ("int8", {**GOOD, "accuracy": 0.946}, "loses more than 0.3 points of test accuracy"),
        ("int8", {**GOOD, "top1_agreement": 0.97}, "keeps the class of only 97.0 % of the test images"),
        ("int8", {**GOOD, "accuracy": math.nan}, "loses more than 0.3 points of test accuracy"),
        ("int8", {**GOOD, "top1_agreement": math.nan}, "keeps the class of only nan % of the test images"),
        ("int8", {"accuracy": 0.95}, "the record of its export is damaged (KeyError('float32_accuracy'))"),
        ("int8", [0.95], "the record of its export is damaged (TypeError("),
        ([8], GOOD, "the record of its export is damaged (TypeError("),
        ("fp8", None, "does not record what fp8 costs"),
    ],
)
def test_eight_bits_are_chosen_only_with_a_record_of_what_they_cost(precision, test, reason):
    found = why_unfit({"precision": precision} | ({"test": test} if test else {}))
    assert found is None if reason is None else reason in found


def test_an_unfit_form_is_left_out_and_serves_where_it_is_named_alone(machine, forms, write, caplog):
    costly = write("costly.onnx", precision="int8")
    assert machine.choose(forms[0], costly).path == forms[0]
    assert "costly.onnx is not chosen: its file does not record what int8 costs on test images" in caplog.text
    assert machine.choose(costly).path == costly
    with pytest.raises(Refusal, match=r"neither of plain-int8\.onnx and costly\.onnx can be chosen for mnn"):
        machine.choose(forms[1], costly, runtime="mnn")


def test_files_of_different_nets_are_refused_by_the_field_that_differs(machine, forms, write, tmp_path):
    with pytest.raises(Refusal, match=r"deeper\.onnx belongs to a different net than .*: depth is 16, not 10"):
        machine.choose(forms[0], write("deeper.onnx", depth=16))
    with pytest.raises(Refusal, match=r"plain_sha256 is b+, not a+; export both from one plain\.safetensors"):
        machine.choose(forms[0], write("other.onnx", plain_sha256="b" * 64))
    assert machine.choose(forms[1], write("plain.onnx", plain_sha256=None)).path == forms[1]
    foreign = tmp_path / "foreign.onnx"
    model = onnx.load(forms[0])
    del model.metadata_props[:]
    onnx.save(model, foreign)
    with pytest.raises(Refusal, match="does not say what net it is of; serve it alone"):
        machine.choose(forms[0], foreign)
    assert machine.choose(foreign).runtime == "onnxruntime"
    with pytest.raises(Refusal, match=r"is not an \.onnx file, and only those can be chosen from"):
        machine.choose(forms[0], tmp_path / "plain.engine")


def test_conditions_hold_what_is_of_this_machine():
    config = ServeConfig(max_batch=8)
    conditions = conditions_of(config, [])
    assert conditions["processor"]
    assert "numpy" in conditions["versions"]
    assert conditions_of(config, []) == conditions != conditions_of(replace(config, max_batch=9), [])
