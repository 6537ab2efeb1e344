from dataclasses import replace

import pytest

from common.refusal import Refusal
from train.config import TrainConfig
from train.distributed import World
from train.machine import available_bytes, refuse_what_does_not_fit, training_bytes


def test_memory_grows_with_the_batch_and_with_the_area(make_spec):
    small, large = (training_bytes(make_spec(size=size), 8, "fp32") for size in (8, 16))
    weights = training_bytes(make_spec(), 0, "fp32")
    assert training_bytes(make_spec(), 16, "fp32") - weights == 2 * (small - weights)
    # The pooled features and the logits have no area.
    assert large - weights == pytest.approx(4 * (small - weights), rel=0.02)
    assert training_bytes(make_spec(), 8, "bf16") < small


def test_more_than_there_is_is_refused_before_the_start_with_what_fits(make_spec):
    config = replace(TrainConfig().resolved(), batch_size=128, precision="fp32")
    spec = make_spec(depth=16, width=1, size=224)
    with pytest.raises(Refusal, match=r"needs about 1\d\.\d GB .* lower --batch-size; .*--family imagenet --depth 18"):
        refuse_what_does_not_fit(config, spec, World(), available=4_000_000_000)
    assert "--family imagenet" in refuse_what_does_not_fit(config, spec, World(), available=None)
    assert refuse_what_does_not_fit(config, make_spec(), World(), available=10**10).endswith("MB of memory")


def test_this_machine_says_what_is_free():
    free = available_bytes("cpu")
    assert free is None or 0 < free < 10**14
