import numpy as np
import pytest

from common.difference import FLOAT32_TOLERANCE, difference
from export.compare import TOLERANCES, Tolerance, compare

LOGITS = np.array([[1.0, 0.0], [0.0, 1.0]])


def test_a_comparison_fails_on_a_large_error_a_changed_class_and_nan():
    assert compare(("a", LOGITS), ("b", LOGITS))
    assert compare(("a", LOGITS), ("b", LOGITS + 0.9 * FLOAT32_TOLERANCE))
    assert not compare(("a", LOGITS), ("b", LOGITS + 1.1 * FLOAT32_TOLERANCE))
    changed = compare(("a", LOGITS), ("b", LOGITS[:, ::-1]), tolerance=Tolerance(largest=1.0))
    assert changed.difference.relative == 1
    other = compare(("a", LOGITS), ("b", LOGITS[::-1]))
    assert (other.top1_agreement, other.worst_image, bool(other)) == (0, 0, False)
    one_logit = compare(("a", LOGITS), ("b", LOGITS + np.array([[0.1, 0.1], [0.0, 0.2]])))
    assert one_logit.worst_image == 1
    broken = LOGITS.copy()
    broken[1, 0] = np.nan
    result = compare(("a", LOGITS), ("b", broken))
    assert not result
    assert result.worst_image == 1


def test_different_numbers_of_logits_are_never_compared():
    with pytest.raises(ValueError, match=r"a answers \(1, 2\), b \(1, 3\)"):
        compare(("a", np.zeros((1, 2))), ("b", np.zeros((1, 3))))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_error_just_beyond_the_bound_of_a_precision_is_caught(precision):
    tolerance = TOLERANCES[precision]
    assert compare(("a", LOGITS), ("b", LOGITS + 0.99 * tolerance.largest), tolerance=tolerance)
    assert not compare(("a", LOGITS), ("b", LOGITS + 1.01 * tolerance.largest), tolerance=tolerance)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_statistics_allow_outliers_but_neither_a_large_mean_error_nor_many_other_classes(precision):
    tolerance = TOLERANCES[precision]
    rng = np.random.default_rng(0)
    before = rng.normal(size=(1000, 10))
    noise = rng.normal(size=before.shape)
    noise /= np.sqrt((noise**2).mean()) / np.sqrt((before**2).mean())
    clear = np.where(before.argmax(1)[:, None] == np.arange(10), 100.0, before)  # no class is in doubt
    scale = np.sqrt((clear**2).mean()) / np.sqrt((before**2).mean())
    for factor, verdict in ((0.99, True), (1.01, False)):
        after = clear + factor * tolerance.rms * scale * noise
        result = compare(("a", clear), ("b", after), tolerance=tolerance)
        assert (result.top1_agreement, bool(result)) == (1, verdict)
    for num_changed, verdict in ((round(1000 * (1 - tolerance.agreement)), True), (80, False)):
        swapped = before.copy()
        rows = np.arange(num_changed)
        swapped[rows, before[rows].argmax(1)] = before[rows].min(axis=1) - 0.1
        result = compare(("a", before), ("b", swapped), tolerance=Tolerance(rms=9, agreement=tolerance.agreement))
        assert (result.top1_agreement, bool(result)) == (1 - num_changed / 1000, verdict)


def test_precisions_are_ordered_from_the_most_precise_on():
    assert list(TOLERANCES) == ["fp32", "fp16", "bf16", "int8", "fp8"]
    bounds = [tolerance.largest for tolerance in TOLERANCES.values() if not tolerance.is_statistical]
    statistics = [tolerance.rms for tolerance in TOLERANCES.values() if tolerance.is_statistical]
    assert bounds == sorted(bounds)
    assert statistics == sorted(statistics)


def test_a_comparison_states_its_tolerance():
    assert str(TOLERANCES["fp16"]) == "largest 1e-02, top-1 100 %"
    assert str(TOLERANCES["int8"]) == "rms 0.1, top-1 98 %"
    record = compare(("a", LOGITS), ("b", LOGITS), tolerance=TOLERANCES["int8"]).to_dict()
    assert record["tolerance"] == {"rms": 0.1, "agreement": 0.98}
    assert record["within_tolerance"] is True


def test_the_difference_from_nothing_is_none_or_infinite():
    zeros = np.zeros(3)
    assert (difference(zeros, zeros).relative, difference(zeros, zeros).rms) == (0, 0)
    assert (difference(zeros, zeros + 1).relative, difference(zeros, zeros + 1).rms) == (np.inf, np.inf)
    halves = difference(np.array([2.0, 0.0]), np.array([1.0, 0.0]))
    assert (halves.max_abs, halves.relative, halves.rms) == (1, 0.5, 0.5)
