import numpy as np
import pytest
import reference

from export.runtimes.runtime import best, probabilities, without_temperature


def test_logits_of_any_size_become_probabilities():
    found = probabilities(np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32))
    assert found.dtype == np.float64
    assert found[0] == pytest.approx([1 / (1 + np.exp(-1)), 1 - 1 / (1 + np.exp(-1)), 0], abs=1e-15)
    assert found.sum(axis=1) == pytest.approx([1, 1], abs=1e-15)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0, 100.0])
def test_logits_are_divided_by_the_temperature_and_it_can_be_taken_out_again(temperature):
    logits = (3 * np.random.default_rng(0).normal(size=(50, 6))).astype(np.float32)
    found = probabilities(logits, temperature=temperature)
    np.testing.assert_allclose(found, reference.softmax(logits, temperature), rtol=1e-12, atol=1e-300)
    assert (best(found, 1) == best(logits, 1)).all()
    lost = 6 * np.exp(-745 * temperature)  # exp(-745) is the smallest number: what lies below it is gone
    expected = reference.softmax(logits)
    np.testing.assert_allclose(without_temperature(found, temperature), expected, rtol=1e-12, atol=lost)


def test_a_temperature_is_taken_out_of_the_small_probabilities_of_many_classes():
    """At 100 and with 2,000 classes each is near 1 / 2,000, whose 100th power is no number any more."""
    logits = (3 * np.random.default_rng(0).normal(size=(5, 2000))).astype(np.float32)
    found = without_temperature(probabilities(logits, temperature=100), 100)
    np.testing.assert_allclose(found, reference.softmax(logits), rtol=1e-11)


def test_probabilities_stay_what_they_are():
    given = np.array([[0.5, 0.25, 0.75]], np.float32)  # of a sigmoid: they need not sum to 1
    assert probabilities(given, are_probabilities=True).tolist() == given.tolist()


def test_of_equal_values_the_lower_index_is_first():
    values = np.array([[0.2, 0.5, 0.5, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert best(values, 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert best(values, 9).shape == (2, 4)
