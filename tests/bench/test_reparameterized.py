"""timm's nets beside their folds: what is counted, and the page."""

import json
import sys

import onnx
import pytest
import torch
from torch import nn

from bench import reparameterized
from bench.reparameterized import (
    FOLDED,
    TIMM,
    TRAINED,
    ReparameterizedConfig,
    count_layers,
    make_forms,
    page,
    write_onnx,
)
from common.cli import run_command
from fold.graph import fold


def run(*argv):
    return run_command(reparameterized.command, ReparameterizedConfig, argv=[str(part) for part in argv])


def test_layers_are_counted_before_and_after():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    nn.init.normal_(net[3].running_mean)
    assert count_layers(net) == {"convolutions": 1, "batch_norms": 2, "scalings": 0}
    plain = fold(net, torch.randn(1, 3, 8, 8).double())
    assert count_layers(plain) == {"convolutions": 2, "batch_norms": 0, "scalings": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s1", "test_resnet"])
def test_a_form_has_no_convolution_that_never_runs(name):
    """The file holds as many as were counted."""
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for net in make_forms(name, x).values():
        num = count_layers(net)["convolutions"]
        nodes = onnx.load_from_string(write_onnx(net.float(), x.float())).graph.node
        assert [node.op_type for node in nodes].count("Conv") == num


@pytest.mark.slow
def test_two_small_nets(tmp_path, capsys):
    given = ("--nets", "mobileone_s1", "test_resnet", "--image-size", 64, "--quick")
    assert run(*given, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "reparameterized.json").read_text())
    assert record["command"].startswith("python bench/reparameterized.py --nets mobileone_s1")
    one, _ = record["rows"]
    assert [one[form]["convolutions"] for form in (TRAINED, TIMM, FOLDED)] == [65, 43, 43]
    assert [one[form]["batch_norms"] for form in (TRAINED, TIMM, FOLDED)] == [99, 0, 0]
    for row in record["rows"]:
        for form in (TRAINED, TIMM, FOLDED):
            assert row[form]["float64_error"] < 1e-13
            assert row[form]["onnxruntime_error"] < 1e-4
            assert len(row[form]["timing"]["round_ms"]) == record["rounds"] == 3
    assert "| mobileone_s1 | 65 + 99 | 43 + 0 | 43 + 0 | 0 |" in (tmp_path / "reparameterized.md").read_text()


def form(convolutions, batch_norms, scalings=0, timing=None):
    return {
        "convolutions": convolutions,
        "batch_norms": batch_norms,
        "scalings": scalings,
        "float64_error": 1e-15,
        "onnxruntime_error": 1e-7,
        "timing": timing or {"batch_size": 1, "round_ms": [4.0, 2.0]},
    }


def test_the_page_says_where_more_convolutions_are_left_and_which_form_failed():
    faster = {"batch_size": 1, "round_ms": [2.0, 1.0]}
    record = {"command": "c", "machine": {"device": "d"}, "image_size": 64, "rounds": 2}
    equal = {"net": "a", TRAINED: form(4, 4), TIMM: form(2, 0), FOLDED: form(2, 0, timing=faster)}
    text = page({**record, "rows": [equal]})
    assert "| a | 4 + 4 | 2 + 0 | 2 + 0 | 0 | 1.0e-15 | 1.0e-15 |" in text
    assert (
        "| a | 3.00 (2.00–4.00) | 3.00 (2.00–4.00) | 1.50 (1.00–2.00) | 1.00 (1.00–1.00) | 2.00 (2.00–2.00) |" in text
    )
    more = {"net": "b", TRAINED: form(4, 4), TIMM: form(4, 4, timing="Fail: no"), FOLDED: form(6, 0, 2)}
    text = page({**record, "rows": [equal, more]})
    assert "| b | 4 + 4 | 4 + 4 | 6 + 0 | 2 | 1.0e-15 | 1.0e-15 |" in text
    assert "| b | Fail: no |" in text


def test_a_machine_without_timm_is_told_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run("--quick", "--out", tmp_path) == 2
    assert "timm is missing: pip install -c constraints.txt -e '.[dev]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--nets", "no_such_net"), "has no net no_such_net; timm.list_models() lists them"),
        pytest.param(
            ("--nets", "test_mambaout", "--image-size", 32),
            "test_mambaout cannot be folded: stem (permute)",
            marks=pytest.mark.slow,
        ),
        (("--rounds", 0), "--rounds must be positive"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv, message, tmp_path, capsys):
    assert run(*argv, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err
