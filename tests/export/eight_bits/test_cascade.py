"""Eight bits answer where they cannot be wrong, float32 where they can: the mathematics, the files, what is refused."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cascades import EVIDENCE, change, record, write_forms

from common.interval import at_most
from common.refusal import Refusal
from export.eight_bits.escalation import MOST, images_to_choose_by, largest_error, measure, mixed
from export.runtimes.cascade import Cascade, gaps, in_doubt, read_forms
from export.runtimes.onnx_session import OnnxSession
from export.runtimes.runtime import Model
from train.data.datasets import Dataset, Split


class Table:
    """A runtime that looks its logits up: an image's one pixel is its row."""

    platform = description = library = "table"

    def __init__(self, logits):
        self.logits, self.batches = np.asarray(logits, np.float32), []
        spec = SimpleNamespace(labels=tuple(map(str, range(self.logits.shape[1]))))
        self.model = Model("net", "d" * 64, spec, {})

    def __call__(self, images):
        self.batches.append(len(images))
        answers = self.logits[images[:, 0, 0, 0]]
        answers.flags.writeable = False  # a library's own memory
        return answers


def rows(num):
    return np.arange(num, dtype=np.uint8).reshape(-1, 1, 1, 1)


def cascade_of(quick, exact, threshold):
    evidence = type(EVIDENCE)(threshold, 1, 1, 0, 0, 0, 1.0)
    return Cascade(Table(quick), Table(exact), evidence)


def logits_that_err(error, num=200, num_classes=5):
    """(float32's, eight bits'): close leads, and differences within `error` of each other; on a grid of 1/16, exact."""
    rng = np.random.default_rng(0)
    exact = rng.integers(-16, 17, (num, num_classes)) / 16
    return exact, exact + rng.integers(0, round(16 * error) + 1, exact.shape) / 16


def second_writing(quick, exact, threshold):
    """Plain loops over Python's numbers: (logits, rows that go on)."""
    answers, gone_on = [], []
    for row, (first, second) in enumerate(zip(quick.tolist(), exact.tolist(), strict=True)):
        ordered = sorted(first)
        sure = len(ordered) == 1 or ordered[-1] - ordered[-2] > threshold
        gone_on += [] if sure else [row]
        answers.append(first if sure else second)
    return np.array(answers), gone_on


@pytest.mark.parametrize("num_classes", [1, 2, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
def test_each_row_is_that_of_the_form_that_a_second_writing_says(threshold, num_classes):
    exact, quick = logits_that_err(1, num_classes=num_classes)
    expected, gone_on = second_writing(quick, exact, threshold)
    cascade = cascade_of(quick, exact, threshold)
    np.testing.assert_array_equal(cascade(rows(200)), expected)
    assert (cascade.num_images, cascade.num_escalated) == (200, len(gone_on))
    assert cascade.exact.batches == ([len(gone_on)] if gone_on else [])
    assert bool(gone_on) == (num_classes > 1)


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_no_class_changes_where_eight_bits_err_by_no_more_than_the_threshold(num_classes):
    exact, quick = logits_that_err(0.5, num_classes=num_classes)
    quick = np.concatenate([quick, quick - 7])  # what all classes share is no error
    exact = np.concatenate([exact, exact])
    errors = [row.max() - row.min() for row in quick - exact]
    threshold = largest_error(exact, quick)
    assert threshold <= max(errors) <= 0.5
    assert num_classes == 1 or (quick.argmax(1) != exact.argmax(1)).any()
    answers = cascade_of(quick[:200], exact[:200], threshold)(rows(200))
    np.testing.assert_array_equal(answers.argmax(1), exact[:200].argmax(1))
    _, gone_on = second_writing(quick, exact, threshold)
    assert num_classes == 1 or 0 < len(gone_on) < 400


def test_the_largest_error_is_that_in_favour_of_the_class_that_eight_bits_give():
    exact = np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    quick = np.array([[1.25, 0.0, 0.25], [5.0, 2.0, -9.0]])
    expected = max(  # by hand: (1.25 - 1) - (0.25 - 0.5) and (5 - 0) - (-9 - 0)
        (quick[row, best] - exact[row, best]) - (quick[row, other] - exact[row, other])
        for row, best in ((0, 0), (1, 0))
        for other in range(3)
    )
    assert largest_error(exact, quick) == expected == 14
    assert largest_error(exact[:1], quick[:1]) == 0.5
    assert largest_error(quick, quick) == 0


def test_a_lead_of_the_threshold_itself_goes_on_as_it_may_be_a_tie():
    quick, exact = np.array([[0.0, 0.5]]), np.array([[0.25, 0.25]])
    assert largest_error(exact, quick) == 0.5
    assert in_doubt(quick, 0.5).all()
    assert not in_doubt(quick, np.nextafter(0.5, 0)).any()
    assert cascade_of(quick, exact, 0.5)(rows(1)).argmax() == exact.argmax() != quick.argmax()


def test_ties_and_what_is_no_number_go_on():
    inf, nan = np.inf, np.nan
    doubtful = [[1, 1, 0], [nan, 9, 0], [9, 0, nan], [nan, nan, nan], [inf, inf, 0], [inf, 0, 0], [9, 0, -inf]]
    assert in_doubt(np.array(doubtful, np.float32), 0.0).all()
    assert in_doubt(np.array([[nan], [inf], [3]]), 0.0).tolist() == [True, True, False]  # one class
    exact = np.arange(21, dtype=np.float32).reshape(7, 3)
    np.testing.assert_array_equal(cascade_of(doubtful, exact, 0.0)(rows(7)), exact)


def test_a_gap_is_exact_where_float32_would_round_it_away():
    logits = np.array([[2.0**24, 0.5, -(2.0**24)]], np.float32)
    assert gaps(logits) == 2.0**24 - 0.5  # float32 would give 2^24
    assert in_doubt(logits, 2.0**24 - 0.25).all()


def test_an_empty_batch_and_a_single_image():
    quick, exact = np.array([[0.0, 1.0], [0.0, 9.0]]), np.array([[3.0, 0.0], [3.0, 0.0]])
    cascade = cascade_of(quick, exact, 2.0)
    assert cascade(rows(0)).shape == (0, 2)
    assert cascade(rows(1)).tolist() == [[3, 0]]
    assert cascade(rows(2)[1:]).tolist() == [[0, 9]]
    assert (cascade.num_images, cascade.num_escalated, cascade.exact.batches) == (2, 1, [1])
    assert (cascade.num_last, cascade.num_escalated_last) == (1, 0)
    assert cascade.quick.logits.tolist() == quick.tolist()  # the rows went into a copy
    assert cascade.counted == "1 of 2 images (50.0 %) went on to fp32"


def test_the_evidence_is_what_a_count_by_hand_finds():
    exact, quick = logits_that_err(0.5)
    chosen_by, test = (exact[:100], quick[:100]), (exact[100:], quick[100:])
    test[1][0], test[0][0] = [0, 9, 0, 0, 0], [9, 0, 0, 0, 0]  # an error that no image to choose by shows
    evidence = measure(chosen_by, test)
    answers, gone_on = second_writing(test[1], test[0], evidence.threshold)
    assert evidence.threshold == largest_error(*chosen_by)
    assert (evidence.num_chosen_by, evidence.num_test, evidence.num_escalated) == (100, 100, len(gone_on))
    changed = [sum(found.argmax(1) != test[0].argmax(1)) for found in (answers, test[1])]
    assert [evidence.num_changed, evidence.num_changed_alone] == changed
    assert changed[0] == 1 < changed[1]
    assert evidence.changed_at_most == at_most(1, 100)
    assert evidence.to_dict()["share_escalated"] == len(gone_on) / 100
    with pytest.raises(Refusal, match="gives logits that are not finite"):
        measure((exact, quick * np.nan), test)


@pytest.mark.parametrize(("hits", "num"), [(0, 1), (0, 359), (1, 40), (3, 10), (10, 11), (32, 10_000)])
def test_the_bound_is_where_so_few_hits_have_a_chance_of_five_percent(hits, num):
    bound = at_most(hits, num)
    part, whole = bound.as_integer_ratio()
    ways = sum(math.comb(num, k) * part**k * (whole - part) ** (num - k) for k in range(hits + 1))
    assert ways / whole**num == pytest.approx(0.05, abs=1e-9)
    assert hits / num < bound < 1


def test_the_bound_of_no_hit_is_the_rule_of_three_and_of_all_hits_one():
    assert at_most(0, 10_000) == pytest.approx(3 / 10_000, rel=2e-3)
    assert at_most(7, 7) == 1


def dataset(num_train, num_validation):
    def part(start, num):
        images = np.arange(start, start + num, dtype=np.int64).reshape(-1, 1, 1, 1)
        return Split(images, np.zeros(num, np.int64))

    validation = part(10**6, num_validation) if num_validation is not None else None
    return Dataset(None, part(0, num_train), part(10**7, 9), validation)


@pytest.mark.parametrize(
    ("num_train", "num_validation", "kept"),
    [(60, None, 50), (60, 0, 50), (60, 20, 70), (30, 5, 25), (9_000, 100, MOST), (9_000, 7_000, MOST)],
)
def test_no_image_that_set_a_range_or_tests_chooses_the_threshold(num_train, num_validation, kept):
    whole = dataset(num_train, num_validation)
    images = np.concatenate([np.ravel(part.images) for part in images_to_choose_by(whole, 10)])
    assert len(images) == len(set(images.tolist())) == kept
    assert not set(images.tolist()) & set(mixed(whole.train)[:10].tolist())
    assert images.max() < 10**7
    assert sum(images >= 10**6) == min(num_validation or 0, MOST)


def test_training_images_that_chose_a_form_come_last(monkeypatch):
    monkeypatch.setattr("export.eight_bits.escalation.MOST", 32)
    whole = dataset(60, 2)
    _, training = images_to_choose_by(whole, 10)
    assert set(np.ravel(training.images).tolist()) == set(mixed(whole.train)[30:].tolist())


@pytest.fixture(scope="module")
def written(tmp_path_factory, make_net, make_spec, images):
    """(plain.onnx, plain-int8.onnx) with a gap that about half of the images are below."""
    paths = write_forms(tmp_path_factory.mktemp("forms"), make_net(), make_spec(), images(24))
    record(paths[1], threshold=float(np.median(gaps(OnnxSession(paths[1])(images(24))))))
    return paths


@pytest.fixture
def forms(written, tmp_path):
    """Copies that a test may change."""
    return tuple(Path(shutil.copy(path, tmp_path)) for path in written)


def test_two_files_are_one_runtime_in_either_order(forms, images):
    exact, quick = map(OnnxSession, forms)
    for order in (forms, forms[::-1]):
        found = read_forms(order)
        assert (found.exact, found.quick) == forms
        cascade = Cascade(OnnxSession(found.quick), OnnxSession(found.exact), found.evidence)
        answers, doubtful = cascade(images(24)), in_doubt(quick(images(24)), found.evidence.threshold)
        assert 0 < doubtful.sum() < 24
        np.testing.assert_array_equal(answers[~doubtful], quick(images(24))[~doubtful])
        np.testing.assert_allclose(answers[doubtful], exact(images(24))[doubtful], rtol=1e-4, atol=1e-4)
        assert quick.model.digest[:12] in str(found)


def test_it_says_of_itself_what_both_say(forms):
    exact, quick = map(OnnxSession, forms)
    model = Cascade(quick, exact, read_forms(forms).evidence).model
    assert (model.name, model.spec) == (exact.model.name, exact.model.spec)
    assert [form["digest"] for form in model.provenance["cascade"]["forms"]] == [quick.model.digest, exact.model.digest]
    assert [form["precision"] for form in model.provenance["cascade"]["forms"]] == ["int8", "fp32"]
    assert model.num_bytes == sum(path.stat().st_size for path in forms)
    assert model.digest not in (quick.model.digest, exact.model.digest)
    assert model.digest != Cascade(exact, quick, EVIDENCE).model.digest
    digests = {model.digest}
    for form in (exact, quick):  # one file is another, then both are
        form.model = replace(form.model, digest="0" * 64)
        digests.add(Cascade(quick, exact, EVIDENCE).model.digest)
    assert len(digests) == 3
    assert model.provenance["cascade"]["share_escalated"] == 0.25


def test_its_probe_is_that_of_the_form_that_answers(forms):
    exact, quick = map(OnnxSession, forms)
    recorded = [np.array(form.model.provenance["export"]["probe"]["logits"]) for form in (quick, exact)]
    for threshold, expected in ((0.0, recorded[0]), (1e9, recorded[1])):
        evidence = type(EVIDENCE)(threshold, 1, 1, 0, 0, 0, 1.0)
        probe = Cascade(quick, exact, evidence).model.provenance["export"]["probe"]
        np.testing.assert_array_equal(probe["logits"], expected)
    quick.model.provenance["export"]["probe"] = {"seed": 0, "logits": [["x"]]}
    assert "probe" not in Cascade(quick, exact, EVIDENCE).model.provenance["export"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": math.nan}, "threshold nan"),
        ({"threshold": math.inf}, "threshold inf"),
        ({"threshold": -0.5}, "threshold -0.5"),
        ({"threshold": 10**400}, "too large"),
        ({"threshold": "0.5"}, "threshold cannot be '0.5'"),
        ({"threshold": None}, "threshold cannot be None"),
        ({"threshold": True}, "threshold cannot be True"),
        ({"threshold": [0.5]}, r"threshold cannot be \[0.5\]"),
        ({"num_test": 0}, "counts"),
        ({"num_chosen_by": 0}, "counts"),
        ({"num_changed": -1}, "counts"),
        ({"num_changed": 0.5}, r"num_changed cannot be 0.5 \(expected: a whole number\)"),
        ({"num_escalated": 10**9}, "of 200 test images"),
        ({"changed_at_most": 2}, "changed_at_most 2"),
        ({"changed_at_most": math.nan}, "changed_at_most nan"),
    ],
)
def test_a_damaged_record_is_refused_with_the_command_that_mends_it(forms, changes, said):
    record(forms[1], **changes)
    with pytest.raises(Refusal, match=said) as refusal:
        read_forms(forms)
    assert f"measure it with python export/cascade.py {forms[0]} {forms[1]}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600 + 5 * len(str(forms[0]))


def test_records_that_are_no_objects_or_lack_a_field_are_refused(forms):
    for bad in ([], "text", 3, {"threshold": 0.5}):
        change(forms[1], lambda export, bad=bad: {**export, "cascade": bad})
        with pytest.raises(Refusal, match=r"the record of the cascade in .* is damaged"):
            read_forms(forms)
    change(forms[1], lambda export: {name: value for name, value in export.items() if name != "cascade"})
    with pytest.raises(Refusal, match="does not record the gap above which its classes are fp32's; measure it with"):
        read_forms(forms)


def test_a_huge_threshold_is_sound_and_all_images_go_on(forms, images):
    record(forms[1], threshold=1e300, num_escalated=EVIDENCE.num_test)
    found = read_forms(forms)
    cascade = Cascade(OnnxSession(found.quick), OnnxSession(found.exact), found.evidence)
    cascade(images(4))
    assert cascade.num_escalated == 4


def test_what_are_not_two_forms_of_one_net_is_refused(forms, tmp_path, make_net, make_spec, images):
    exact, quick = forms
    (tmp_path / "other").mkdir()
    other, _ = write_forms(tmp_path / "other", make_net(seed=1), make_spec(), images(24), plain_sha256="b" * 64)
    wide, _ = write_forms(tmp_path / "other", make_net(num_labels=3), make_spec(num_labels=3), images(24))
    unnamed = tmp_path / "unnamed.onnx"
    unnamed.write_bytes(exact.read_bytes())
    change(unnamed, lambda export: {**export, "plain_sha256": None})
    engine = tmp_path / "plain.engine"
    for paths, message in (
        ((quick,), r"a cascade takes two files, .* got 1"),
        ((exact, quick, exact), "got 3"),
        ((exact, exact), r"plain\.onnx is fp32; export both"),
        ((exact, unnamed), r"plain\.onnx is fp32 and .*unnamed\.onnx is fp32; export both"),
        ((quick, engine), r"plain\.engine is not an \.onnx file"),
        ((quick, wide), "are not of one net, by the spec and the plain net's digest"),
        ((quick, unnamed), "are not of one net"),
    ):
        with pytest.raises(Refusal, match=message):
            read_forms(paths)
    other, _ = write_forms(tmp_path / "other", make_net(seed=1), make_spec(), images(24), plain_sha256="b" * 64)
    with pytest.raises(Refusal, match="are not of one net"):
        read_forms((quick, other))
    change(quick, lambda export: {**export, "plain_sha256": None})  # neither file says of which net it is
    with pytest.raises(Refusal, match="are not of one net"):
        read_forms((quick, unnamed))


def test_a_file_that_this_processor_would_answer_otherwise_is_refused(forms, monkeypatch):
    monkeypatch.setattr("export.runtimes.saturation.saturates", lambda: True)
    assert read_forms(forms)  # no sum of this file can saturate
    monkeypatch.setattr("export.runtimes.saturation.may_saturate", lambda path, content: ["conv"])
    with pytest.raises(Refusal, match=r"may be answered wrongly here.* does not hold here"):
        read_forms(forms)
