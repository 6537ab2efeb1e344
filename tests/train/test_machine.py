from dataclasses import replace

import pytest
import torch

from common.refusal import Refusal
from train.config import TrainConfig
from train.machine import World, available_bytes, choose_precision, refuse_what_does_not_fit, training_bytes


def test_memory_grows_with_the_batch_and_with_the_area(make_spec):
    small, large = (training_bytes(make_spec(size=size), 8, "fp32") for size in (8, 16))
    weights = training_bytes(make_spec(), 0, "fp32")
    assert training_bytes(make_spec(), 16, "fp32") - weights == 2 * (small - weights)
    # The pooled features and the logits have no area.
    assert large - weights == pytest.approx(4 * (small - weights), rel=0.02)
    assert training_bytes(make_spec(), 8, "bf16") < small


def test_a_net_whose_last_outputs_are_one_pixel_is_estimated(make_spec):
    """Batch normalisation refuses such an output of a single image in training."""
    assert 0 < training_bytes(make_spec("pooled"), 8, "fp32") < training_bytes(make_spec(), 8, "fp32")


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


def test_precision_is_what_the_device_has(monkeypatch):
    for capable, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        assert choose_precision("auto", "cpu") == expected
    assert choose_precision("fp32", "cpu") == "fp32"
    with pytest.raises(Refusal, match="fp16 needs a CUDA device"):
        choose_precision("fp16", "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_precision("auto", "cuda") == "fp16"
