"""The fitted temperature against another way to find it, what its error promises, and where there is none."""

import numpy as np
import pytest
import reference
from scipy.optimize import brentq

from common.spec import MAX_TEMPERATURE, MIN_TEMPERATURE
from train.temperature import MIN_IMAGES, MIN_WRONG, Fit, fit_temperature


def answers(num=400, num_classes=5, temperature=2.0, seed=0):
    """Logits [N, K] and targets that are drawn with the probabilities softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = (4 * rng.normal(size=(num, num_classes))).astype(np.float32)
    cumulative = reference.softmax(logits, temperature).cumsum(axis=1)
    return logits, (rng.random((num, 1)) > cumulative).sum(axis=1).clip(max=num_classes - 1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_it_is_where_the_derivative_of_the_cross_entropy_is_zero(temperature):
    logits, targets = answers(temperature=temperature)
    found = fit_temperature(logits, targets)
    exact = logits.astype(np.float64)
    expected = brentq(
        lambda at: reference.excess(exact, targets, at), MIN_TEMPERATURE, MAX_TEMPERATURE, xtol=1e-14, rtol=1e-14
    )
    assert found.temperature == pytest.approx(expected, rel=1e-12)
    for at, value in ((1.0, found.cross_entropy_before), (found.temperature, found.cross_entropy)):
        of_truth = reference.softmax(exact, at)[np.arange(len(targets)), targets]
        assert value == pytest.approx(-np.log(of_truth).mean(), rel=1e-12)
    assert found.cross_entropy <= found.cross_entropy_before


def test_what_all_classes_have_in_common_changes_nothing_and_a_factor_is_that_of_the_temperature():
    logits, targets = (part.astype(np.float64) if part.dtype.kind == "f" else part for part in answers())
    found = fit_temperature(logits, targets).temperature
    shifts = np.random.default_rng(1).normal(size=(len(logits), 1))
    assert fit_temperature(logits + 1000 * shifts, targets).temperature == pytest.approx(found, rel=1e-9)
    assert fit_temperature(3 * logits, targets).temperature == pytest.approx(3 * found, rel=1e-12)


@pytest.mark.slow
def test_the_standard_error_is_how_far_fits_to_so_many_images_scatter():
    fits = [fit_temperature(*answers(num=600, seed=seed)) for seed in range(300)]
    scatter = np.std([fit.temperature for fit in fits])
    # A deviation of 300 values is known to 1 / sqrt(600), 4 %; three times that.
    assert np.mean([fit.standard_error for fit in fits]) == pytest.approx(scatter, rel=0.13)
    assert np.mean([fit.temperature for fit in fits]) == pytest.approx(2.0, abs=4 * scatter / np.sqrt(300) + 0.02)


@pytest.mark.parametrize(
    ("num", "num_wrong", "why"),
    [
        (0, 0, "0 images are held out, and 100 are needed"),
        (MIN_IMAGES - 1, 30, "99 images are held out, and 100 are needed"),
        (MIN_IMAGES, 0, "0 of 100 held-out images are answered wrongly, and 10 are needed"),
        (500, MIN_WRONG - 1, "9 of 500 held-out images are answered wrongly, and 10 are needed"),
    ],
)
def test_of_too_few_images_or_mistakes_it_stays_1_and_says_why(num, num_wrong, why):
    targets = np.arange(num) % 3
    logits = np.eye(3, dtype=np.float32)[(targets + (np.arange(num) < num_wrong)) % 3]
    found = fit_temperature(logits, targets)
    assert (found.temperature, found.images, found.wrong) == (1.0, num, num_wrong)
    assert found.why_not.startswith(why)
    assert str(found) == f"probabilities have a temperature of 1: {found.why_not}"
    assert set(found.to_dict()) == {"temperature", "images", "wrong", "why_not"}


@pytest.mark.parametrize("logits", [np.zeros((200, 4)), -9 * np.eye(4)[np.arange(200) % 4], np.full((200, 4), np.nan)])
def test_a_net_that_knows_nothing_keeps_1(logits):
    found = fit_temperature(logits, np.arange(200) % 4)
    assert found.temperature == 1.0
    assert "is not between 0.01 and 100" in found.why_not


def test_a_fit_comes_back_from_what_is_kept_of_it():
    found = fit_temperature(*answers())
    assert Fit(**found.to_dict()) == found
    assert str(found).startswith(f"probabilities have a temperature of {found.temperature:.3f} ± ")
