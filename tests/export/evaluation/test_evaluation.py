"""The figures of an evaluation against another writing of them, and what their intervals promise."""

import numpy as np
import pytest
import reference
from scipy.stats import binom
from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

from export.evaluation.figures import confusion_figure, draw, figure_text, mistakes_figure, reliability_figure
from export.evaluation.report import describe_calibration
from export.evaluation.scores import NUM_BINS, calibrate, confusion, evaluate, score_class

LABELS = tuple(f"label {index}" for index in range(7))


def answers(num=400, num_classes=7, seed=0):
    """Probabilities [N, K] that are often right, and targets; the last class is never the truth."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes - 1, num)
    scores = rng.normal(size=(num, num_classes))
    scores[np.arange(num), targets] += 1
    powers = np.exp(scores)
    return powers / powers.sum(1, keepdims=True), targets


def test_rows_are_truths_and_columns_are_answers():
    counts = confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_precision_recall_f1_and_top_5_are_those_of_scikit_learn():
    probabilities, targets = answers()
    found = evaluate(probabilities, targets, LABELS)
    called = probabilities.argmax(1)
    precision, recall, f1, num = precision_recall_fscore_support(targets, called, labels=range(7), zero_division=np.nan)
    for row, *expected in zip(found.classes, precision, recall, f1, num, strict=True):
        values = [np.nan if value is None else value for value in (row.precision.value, row.recall.value, row.f1.value)]
        assert values == pytest.approx(expected[:3], nan_ok=True)
        assert (row.images, row.answered) == (expected[3], (called == LABELS.index(row.label)).sum())
    assert found.classes[6].recall.value is None
    assert found.classes[6].precision.value == 0
    assert found.top1.value == pytest.approx((called == targets).mean())
    assert found.top5.value == pytest.approx(top_k_accuracy_score(targets, probabilities, k=5, labels=range(7)))
    assert found.mean_recall == pytest.approx(recall[:6].mean())
    assert found.mean_f1 == pytest.approx(f1[:6].mean())
    assert evaluate(probabilities[:, :5], targets % 5, LABELS[:5]).top5 is None  # of five classes it says nothing


def test_a_class_that_is_never_there_and_never_called_has_no_figures():
    nobody = score_class("nobody", 0, 0, 0)
    assert (nobody.precision.value, nobody.recall.value, nobody.f1.value) == (None, None, None)
    assert (nobody.recall.interval, nobody.f1.interval) == ((0.0, 1.0), (0.0, 1.0))


def test_the_interval_of_f1_holds_the_true_one_as_often_as_it_says():
    rng = np.random.default_rng(1)
    shares = np.array([0.5, 0.1, 0.2, 0.2])  # of all images: right, called it and not, of it and missed, neither
    truth = 2 * 0.5 / (2 * 0.5 + 0.1 + 0.2)
    held = 0
    for hits, wrong, missed, _ in rng.multinomial(80, shares, size=4000):
        low, high = score_class("x", hits + missed, hits + wrong, hits).f1.interval
        held += low <= truth <= high
    assert 0.93 < held / 4000 < 0.97  # 0.95; four standard deviations are 0.014


def test_the_most_frequent_mistakes_come_first_and_right_answers_are_none():
    found = evaluate(np.eye(3)[[0, 1, 1, 1, 2, 0]], np.array([0, 0, 0, 1, 1, 2]), ("a", "b", "c"))
    assert found.confusions(9) == [("a", "b", 2), ("b", "c", 1), ("c", "a", 1)]
    assert found.confusions(1) == [("a", "b", 2)]


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(2)
    confidence = rng.random(500)
    right = rng.random(500) < confidence**2
    found = calibrate(confidence, right)
    error = 0.0
    for index in range(NUM_BINS):
        inside = (confidence > index / NUM_BINS) & (confidence <= (index + 1) / NUM_BINS)
        error += abs(right[inside].sum() - confidence[inside].sum()) / 500
        part = found.bins[index]
        assert (part.right.hits, part.right.num) == (right[inside].sum(), inside.sum())
        assert part.confidence == pytest.approx(confidence[inside].mean())
    assert found.error == pytest.approx(error)
    assert found.error > found.perfect_95
    assert found.confidence == pytest.approx(confidence.mean())
    edges = calibrate(np.array([0.0, 1 / 15, 1.0]), np.array([True, False, True])).bins
    assert [part.right.num for part in edges] == [2, *[0] * 13, 1]
    assert edges[1].confidence is None


def test_what_chance_makes_up_is_the_binomials_mean_and_its_end_for_95_percent():
    """All answers in one bin: the error is how far the share of hits is from the probability that all of them have."""
    said = calibrate(np.full(2000, 0.9), np.ones(2000, bool))
    law, hits = binom(2000, 0.9), np.arange(2001)
    errors = np.abs(hits / 2000 - 0.9)
    assert said.perfect == pytest.approx(law.pmf(hits) @ errors, rel=0.1)  # 500 draws know it to 3.4 %
    assert law.pmf(hits)[errors < said.perfect_95].sum() == pytest.approx(0.95, abs=0.03)  # to 0.01


@pytest.mark.slow
def test_a_model_without_calibration_error_shows_what_is_said_of_such_a_one():
    rng = np.random.default_rng(3)
    confidence = rng.random(300) ** 0.3
    errors = [calibrate(confidence, rng.random(300) < confidence).error for _ in range(60)]
    said = calibrate(confidence, np.ones(300, bool))
    assert np.mean(errors) == pytest.approx(said.perfect, abs=4 * np.std(errors) / 60**0.5)
    assert np.mean(np.array(errors) < said.perfect_95) > 0.85  # 0.95; four standard deviations are 0.11


@pytest.mark.parametrize(
    ("confidence", "share", "words"),
    [
        (0.9, 0.5, "the model is surer than it is right"),
        (0.5, 0.9, "the model is right more often than it is sure"),
        (0.7, 0.7, "so many images show no error beyond chance"),
    ],
)
def test_the_direction_of_the_error_is_said_in_words(confidence, share, words):
    num = 400
    probabilities = np.tile([confidence, 1 - confidence - 1e-9, 1e-9], (num, 1))
    targets = np.where(np.arange(num) < share * num, 0, 2)
    if confidence == 0.5:
        probabilities[:, 1] -= 0.1
    assert words in describe_calibration(evaluate(probabilities, targets, ("a", "b", "c")))[1]


def test_what_there_would_be_without_the_temperature_is_told_from_the_probabilities():
    rng = np.random.default_rng(4)
    logits, targets = 3 * rng.normal(size=(500, 7)), rng.integers(0, 7, 500)
    hot = evaluate(reference.softmax(logits, 0.4), targets, LABELS, temperature=0.4)
    plain = evaluate(reference.softmax(logits), targets, LABELS)
    for name in ("error", "confidence", "perfect", "perfect_95"):
        found, expected = (getattr(part, name) for part in (hot.without_temperature, plain.calibration))
        assert found == pytest.approx(expected, rel=1e-12), name
    assert [part.right for part in hot.without_temperature.bins] == [part.right for part in plain.calibration.bins]
    assert plain.without_temperature is None
    assert hot.calibration.confidence > plain.calibration.confidence
    words = " ".join(describe_calibration(hot))
    assert f"({100 * plain.calibration.error:.2f} % without the temperature of 0.4)" in words
    assert "without" not in " ".join(describe_calibration(plain))


@pytest.mark.slow
def test_the_matrix_shows_counts_where_there_are_few_classes():
    found = evaluate(np.eye(3)[[0, 1, 1, 1, 2, 0]], np.array([0, 0, 0, 1, 1, 2]), ("a", "b", "c"))
    axes = confusion_figure(found, "three").axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert (shown[0, 0], shown[1, 0], shown[2, 0]) == ("1", "2", "")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    probabilities, targets = answers(num=50, num_classes=130)
    many = confusion_figure(evaluate(probabilities, targets, tuple(map(str, range(130)))), "many").axes[0]
    assert len(many.texts) == 0
    assert [label.get_text() for label in many.get_yticklabels()][:3] == ["0", "3", "6"]


@pytest.mark.slow
def test_every_label_can_be_drawn(recwarn):
    labels = ("猫", "$x_", "a" * 99, "\udcff")
    assert [figure_text(label) for label in labels] == ["猫", r"\$x_", "a" * 23 + "…", "?"]
    found = evaluate(np.eye(4), np.arange(4), labels)
    for figure in (
        confusion_figure(found, "x"),
        reliability_figure(found, "x"),
        mistakes_figure([np.zeros((8, 8, 1), np.uint8), np.zeros((4, 9, 3), np.uint8)], list(labels[:1]) * 2, "x"),
        mistakes_figure([], [], "no answer is wrong"),
    ):
        assert draw(figure).startswith(b"\x89PNG")
    assert not recwarn.list
