import numpy as np
import pytest

from export.eight_bits.calibrate import METHODS, NUM_BINS, Histogram, covered, observe
from export.graphs.graph import to_onnx
from fold.graph import fold


def histogram_of(values):
    low, high = min(0.0, values.min()), max(0.0, values.max())
    return Histogram(low, high, np.histogram(values, NUM_BINS, (low, high))[0])


def test_every_tensor_is_observed_and_every_value_counted(make_net, make_spec, images):
    pixels = images(7)
    done = []
    model = to_onnx(fold(make_net()), make_spec(), {})
    found = observe(model, pixels, batch_size=3, advance=done.append)
    assert done == [3, 3, 1] * 2
    assert {"stem.conv", "stem.relu", "group0.block1.ncrelu", "group2.block1.conv"} <= set(found)
    assert found["stem.conv"].counts.sum() == 7 * 4 * 8 * 8
    assert found["stem.relu"].low == 0
    ncrelu, before = found["group0.block1.ncrelu"], found["group0.block0.conv"]
    assert (ncrelu.low, ncrelu.high) == (before.low, before.high)


def test_min_max_covers_all_and_the_others_clip_what_is_rare():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=200_000), [40.0, -30.0]])
    found = {method: covered(histogram_of(values), method) for method in METHODS}
    assert found["min-max"] == (-30, 40)
    low, high = found["percentile"]
    expected = np.quantile(values, [5e-5, 1 - 5e-5])
    assert (low, high) == pytest.approx(expected, abs=2 * 70 / NUM_BINS)
    assert found["entropy"] == pytest.approx((-30 * 0.25, 40 * 0.25))  # the least that it considers


def test_entropy_keeps_what_is_common():
    values = np.random.default_rng(0).uniform(-1, 1, 200_000)
    low, high = covered(histogram_of(values), "entropy")
    assert -1 <= low < -0.95
    assert 0.95 < high <= 1


def test_entropy_takes_the_share_whose_255_levels_lose_least():
    """The divergence in loops: a level has the mean of its bins that hold anything; what is clipped is in the last."""

    def divergence(share):
        inside = [place for place, x in enumerate(centres) if share * low <= x <= share * high]
        p = [counts[place] for place in inside]
        levels = [[] for _ in range(255)]
        for place, num in enumerate(p):
            levels[place * 255 // len(p)].append(num)
        means = [sum(level) / max(1, sum(num > 0 for num in level)) for level in levels]
        q = [means[place * 255 // len(p)] for place in range(len(p))]
        p[0] += sum(counts[: inside[0]])
        p[-1] += sum(counts[inside[-1] + 1 :])
        pairs = [(a / sum(p), b) for a, b in zip(p, q, strict=True) if a]
        total = sum(b for _, b in pairs)
        return sum(a * (np.log(a * total / b) if b else np.log(NUM_BINS)) for a, b in pairs)

    histogram = histogram_of(np.random.default_rng(0).laplace(size=200_000))
    low, high, counts = histogram.low, histogram.high, histogram.counts.tolist()
    centres = [low + (place + 0.5) * (high - low) / NUM_BINS for place in range(NUM_BINS)]
    counts[np.abs(centres).argmin()] = 0
    best = min(np.linspace(1, 0.25, 61), key=divergence)
    assert covered(histogram, "entropy") == pytest.approx((best * low, best * high))


def test_a_relus_peak_at_zero_does_not_narrow_entropys_range():
    values = np.maximum(np.random.default_rng(0).uniform(-9, 1, 200_000), 0)
    assert covered(histogram_of(values), "entropy")[1] > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_range(method):
    low, high = covered(Histogram(0.0, 1.0, np.histogram(np.zeros(9), NUM_BINS, (0, 1))[0]), method)
    assert low <= 0 < high


def test_an_unknown_method_is_no_users_mistake():
    with pytest.raises(ValueError, match="median is none of"):
        covered(Histogram(0.0, 1.0, np.ones(NUM_BINS)), "median")
