import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench import model
from bench.nets import PEERS, count_macs, count_weights, reference_form, seeded_net, torch_answer
from bench.runtimes import race, racers
from bench.runtimes.page import Column, judge_bars, page
from bench.runtimes.race import (
    NUM_COMPARED,
    NUM_RUNS,
    expected_logits,
    judge_logits,
    make_nets,
    profile_graph,
    time_by_operator,
    write_graphs,
)
from bench.runtimes.racers import OURS, RACES, REFERENCE, Graph, Race, Racer, gemm_racers, racers_of
from common.cli import run_command
from common.spec import Spec
from export.runtimes.onnx_session import OnnxSession
from train.data.datasets import cifar_image, imagenet_image
from train.families import build


def spec_of(family: str, depth: int, width: float) -> Spec:
    image, num = (imagenet_image(), 1000) if family == "imagenet" else (cifar_image(), 10)
    return Spec(family, depth, width, "ncrelu", image, tuple(map(str, range(num))))


def timing(batch_size: int, ms: float) -> dict:
    return {"batch_size": batch_size, "median_ms": ms, "images_per_s": 1000 * batch_size / ms, "round_ms": [ms] * 3}


def row(title: str, precision: str, batch_ms: dict[int, float], *, net: str = "Net", **fields) -> dict:
    times = {"2": {str(size): timing(size, ms) for size, ms in batch_ms.items()}}
    empty = {"failed": None, "error": 1e-7, "strays": False, "peak_bytes": {"2": 10**8}}
    return {"net": net, "title": title, "precision": precision, "timings": times, **empty, **fields}


@pytest.fixture
def record() -> dict:
    """A net of 10 M MACs, a peak of 1 TFLOP/s in fp32 and of 4 in int8."""
    operations = {"fp32": 2 * racers.NUM_GEMM["fp32"] ** 3, "int8": 2 * racers.NUM_GEMM["int8"] ** 3}
    fp32, int8 = operations["fp32"] / 1e9, operations["int8"] / 4e9
    net = {
        "command": "python bench/model.py",
        "machine": {"device": "Imaginary CPU", "cores": "2"},
        "rounds": 3,
        "round_s": 0.1,
        "threads": [2],
        "batches": [1, 32],
        "entrants": [
            {"name": "Net", "macs": 10_000_000, "parameters": 5, "published": "none"},
            {"name": "Peer", "macs": 20_000_000, "parameters": 5, "published": "all"},
        ],
        "rows": [
            row(REFERENCE, "fp32", {1: 10.0, 32: 2.0}),
            row(OURS, "fp32", {1: 20.0, 32: 1.0}),
            row("quick", "fp32", {1: 2.0, 32: 0.5}),
            row("quicker but wrong", "fp32", {1: 0.1, 32: 0.1}, strays=True),
            row("bytes", "int8", {1: 1.0}),
            row("absent", "fp32", {}, failed="ImportError: no | such library", error=None),
            row("quick", "fp32", {1: 0.001, 32: 0.001}, net="Peer"),
            row("product", "fp32", {1: fp32, 32: fp32}, net="GEMM", error=None),
            row("slow product", "fp32", {1: 2 * fp32, 32: 2 * fp32}, net="GEMM", error=None),
            row("bytes", "int8", {1: int8, 32: int8}, net="GEMM", error=None),
        ],
        "profiles": [
            {
                "title": "ONNX Runtime, shared, fp32",
                "batch_size": 1,
                "num_threads": 2,
                "operators": {"Conv": 9.0, "Relu": 0.5, "Transpose": 0.5},
            }
        ],
    }
    return {"nets": {"34-2": net}}


@pytest.mark.slow
def test_macs_are_those_that_are_published():
    resnet18 = PEERS["ResNet-18"](spec_of("imagenet", 18, 0.75))
    assert count_macs(resnet18, imagenet_image()) == pytest.approx(1.814e9, rel=1e-3)
    repvgg = PEERS["RepVGG-A0"](spec_of("imagenet", 18, 0.75))
    assert count_macs(repvgg, imagenet_image()) == pytest.approx(1.361e9, rel=1e-3)
    assert count_weights(repvgg) == pytest.approx(8.309e6, rel=1e-4)


@pytest.mark.slow
def test_macs_of_a_dirac_net_are_those_of_its_convolutions():
    # Stem, three groups of ten, of which the first of a group reads what the group before gives, classifier.
    groups = [(32, 32, 32), (16, 64, 32), (8, 128, 64)]
    expected = 1024 * 9 * 3 * 32 + 1280
    for side, width, before in groups:
        expected += side**2 * 9 * width * (2 * before + 9 * 2 * width)
    assert count_macs(build(spec_of("cifar", 34, 2.0)), cifar_image()) == expected


def test_macs_of_a_linear_layer_are_its_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    image = replace(cifar_image(), height=2, width=2)
    net.insert(0, build(spec_of("cifar", 10, 1.0)).normalize)
    assert count_macs(net, image) == 60


def test_the_reference_form_answers_what_our_dirac_net_answers():
    net = seeded_net(10, 0.25)
    images = torch.from_numpy(net.image_sets["random"][:4])
    other = reference_form(net.dirac)
    with torch.no_grad():
        expected, logits = net.dirac(images), other(images)
    assert torch.allclose(expected, logits, atol=1e-5 * expected.abs().max())
    assert not any(type(layer).__module__ == "train.layers" for layer in list(other)[1:])
    for net_of_torch, layout in ((net.dirac, torch.channels_last), (other, torch.contiguous_format)):
        assert torch.allclose(expected, torch.from_numpy(torch_answer(net_of_torch, layout=layout)(images.numpy())))


def test_bars_are_judged_against_both_baselines(record):
    bars = judge_bars(record["nets"]["34-2"], 2)
    columns = ("bar", "best", "over_reference", "over_ours", "share", "demanded")
    assert [tuple(bar[column] for column in columns) for bar in bars] == [
        ("fp32, batch 1: ≥ 5×", "quick", "5.00×, met", "10.00×, met", "1 %", "1 %, 1 %"),
        # 32 images of 20 MFLOP in 0.5 ms: 1.28 TFLOP/s.
        (
            *("fp32, batch 32: ≥ 2.4× and above the peak", "quick"),
            *("4.00×, met", "2.00×, **not met**", "128 %", "77 %, 154 %"),
        ),
        # 20 MOP in 1 ms of 4 TOP/s.
        ("int8, batch 1: ≥ 14×", "bytes", "10.00×, **not met**", "20.00×, met", "1 %", "1 %, 0 %"),
    ]  # nothing in int8 was timed with batches of 32


def test_a_speedup_is_not_enough_where_the_peak_is_to_be_exceeded(record):
    net = record["nets"]["34-2"]
    net["entrants"][0]["macs"] //= 2
    bar = judge_bars(net, 2)[1]
    assert (bar["over_reference"], bar["share"]) == ("4.00×, **not met**", "64 %")


def test_a_baseline_that_was_not_timed_leaves_its_cell_empty(record):
    net = record["nets"]["34-2"]
    net["rows"] = [row for row in net["rows"] if row["title"] != REFERENCE]
    bar = judge_bars(net, 2)[1]
    assert (bar["over_reference"], bar["over_ours"], bar["demanded"]) == ("", "2.00×, **not met**", "154 %")


def test_the_peak_is_that_of_the_fastest_product_of_the_precision(record):
    net = record["nets"]["34-2"]
    assert Column(net, 2, 1).peak("fp32") == pytest.approx(1e12)
    assert Column(net, 2, 1).peak("int8") == pytest.approx(4e12)
    assert Column(net, 1, 1).peak("fp32") is None


def test_the_page_shows_bars_limits_rows_failures_and_the_profile(record):
    text = page(record)
    assert "| Net, 2 | fp32, batch 1: ≥ 5× | quick | 5.00×, met | 10.00×, met | 1 % |" in text
    assert "≥ 2.4× and above the peak | quick | 4.00×, met | 2.00×, **not met** | 128 % | 77 %, 154 % |" in text
    assert (
        "| Net | quick, fp32 | **500** (1 %), 2 (2–2) | **64,000** (128 %), 0.5 (0.5–0.5) | 1.0e-07 | 100 MB |" in text
    )
    assert "| 1.0e-07 **strays** |" in text
    assert "- Net, absent, fp32: ImportError: no | such library" in text
    assert "fp32 1000 GOP/s, int8 4000 GOP/s" in text
    assert "10 ms in nodes; 90 % Conv, 5 % Relu, 5 % Transpose." in text


def test_the_page_of_a_race_without_products_and_baselines_says_so(record):
    net = record["nets"]["34-2"]
    net["rows"] = [row("quick", "fp32", {1: 2.0})]
    net["profiles"] = []
    text = page(record)
    assert "Nothing was measured that a bar asks for." in text
    assert "| Net | quick, fp32 | **500**, 2 (2–2) |" in text


@pytest.mark.parametrize("key", RACES)
def test_racers_have_names_of_their_own_and_both_baselines(key):
    every = racers_of(key, name="Net") + gemm_racers()
    assert len({(racer.net, racer.title, racer.precision) for racer in every}) == len(every)
    assert {REFERENCE, OURS} < {racer.title for racer in every}
    assert set(RACES[key].peers) < {racer.net for racer in every}
    assert all(peer in PEERS for peer in RACES[key].peers)


def test_racers_are_described_without_a_library():
    """Their processes set the number of threads before any library loads."""
    program = (
        "import sys; sys.modules['numpy'] = sys.modules['torch'] = None; "
        "import bench.model, bench.runtimes.racers as racers; racers.racers_of('34-2', name='Net')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[3])


SMALL = Race("cifar", 10, 1.0, ("WRN-16-1",), ("concat", "shared"))


@pytest.fixture
def small(monkeypatch):
    """A race of a small net, under the key of a large one."""
    monkeypatch.setitem(RACES, "16-1", SMALL)


@pytest.mark.slow
def test_graphs_answer_what_the_plain_net_answers(small, tmp_path):
    spec, nets = make_nets(SMALL)
    readers = [racer for racer in racers_of("16-1", name="DiracNet-10-1") if racer.graph]
    graphs, written = {racer.graph for racer in readers}, []
    write_graphs(spec, nets, graphs, tmp_path, lambda note="": written.append(note))
    assert {path.name for path in tmp_path.iterdir()} == {graph.file for graph in graphs} == set(written)
    expected = expected_logits(spec, nets)
    for racer in readers:
        if racer.title.startswith("ONNX Runtime"):
            logits = racer.open(tmp_path, 1)(images_of(NUM_COMPARED))
            found = judge_logits(racer.precision, expected[racer.net], logits)
            assert not found["strays"], racer
            assert found["error"] < (1e-5 if racer.precision == "fp32" else 0.5), racer
    assert judge_logits("fp32", expected["DiracNet-10-1"], 1.01 * expected["DiracNet-10-1"])["strays"]


def images_of(num: int) -> np.ndarray:
    from fold.image_sets import random_images

    return random_images(cifar_image(), num)


def test_a_profile_is_the_time_of_each_operator_in_one_call(tmp_path):
    spec, nets = make_nets(SMALL)
    graph = Graph("DiracNet-10-1", "concat")
    write_graphs(spec, nets, {graph}, tmp_path, lambda note="": None)
    found = profile_graph(tmp_path / graph.file, images_of(2), num_threads=1)
    times = list(found["operators"].values())
    assert found["batch_size"] == 2
    assert set(found["operators"]) > {"Conv"}
    assert times == sorted(times, reverse=True)
    node = {"cat": "Node", "name": "conv_kernel_time", "args": {"op_name": "Conv"}, "dur": 1000 * NUM_RUNS}
    others = [{"cat": "Session", "name": "run"}, {**node, "name": "conv_fence_before"}]
    assert time_by_operator([node, *others, node]) == {"Conv": 2.0}


def open_session(file: str, folder: Path, num_threads: int):
    return OnnxSession(folder / file, providers=("CPUExecutionProvider",), num_threads=num_threads)


def open_wrong(file: str, folder: Path, num_threads: int):
    session = open_session(file, folder, num_threads)
    return lambda images: session(images) + 1e6


def open_nothing(folder: Path, num_threads: int):
    raise ImportError("no such library")


@pytest.fixture
def few_racers(small, monkeypatch):
    """Racers without torch, the second of which is another form of the first."""
    graph = Graph("DiracNet-10-1", "concat")

    def make(key: str, *, name: str) -> list[Racer]:
        return [
            Racer(REFERENCE, name, "fp32", partial(open_session, graph.file), graph),
            Racer("ONNX Runtime, concat", name, "fp32", partial(open_session, graph.file), graph),
            Racer("absent", name, "fp32", open_nothing),
        ]

    monkeypatch.setattr(race, "racers_of", make)
    monkeypatch.setattr(race, "gemm_racers", lambda: [])
    return make, graph


def run(*words) -> int:
    return run_command(model.command, model.ModelConfig, argv=list(map(str, words)))


SHORT = ("--rounds", 2, "--round-s", 1e-9, "--threads", 1, "--batches", 1)


@pytest.mark.slow
def test_the_command_races_keeps_other_nets_and_writes_the_page_again(few_racers, record, tmp_path, capsys):
    (tmp_path / "model.json").write_text(json.dumps(record))
    assert run("--nets", "16-1", *SHORT, "--out", tmp_path) == 1  # a row of the record strays
    nets = json.loads((tmp_path / "model.json").read_text())["nets"]
    assert list(nets) == ["34-2", "16-1"]
    assert nets["34-2"] == record["nets"]["34-2"]
    rows = {row["title"]: row for row in nets["16-1"]["rows"]}
    assert rows["absent"]["failed"] == "ImportError: no such library"
    assert len(rows[REFERENCE]["timings"]["1"]["1"]["round_ms"]) == 2
    assert rows["ONNX Runtime, concat"]["error"] < 1e-5
    assert rows["ONNX Runtime, concat"]["peak_bytes"]["1"] > 1e6
    assert nets["16-1"]["command"].startswith("python bench/model.py --nets 16-1 --threads 1")
    assert [profile["title"] for profile in nets["16-1"]["profiles"]] == ["ONNX Runtime, concat, fp32"]
    text = (tmp_path / "model.md").read_text()
    assert "## DiracNet-10-1" in text
    assert "M | 8.77 % error on CIFAR-10 (arXiv 1612.03928, table 1) |" in text
    (tmp_path / "model.md").unlink()
    assert run("--render", "--out", tmp_path) == 1
    assert (tmp_path / "model.md").read_text() == text


@pytest.mark.slow
def test_a_row_with_other_logits_is_marked_and_ends_in_status_one(few_racers, tmp_path, monkeypatch, capsys):
    make, graph = few_racers
    bent = Racer("bent", graph.net, "fp32", partial(open_wrong, graph.file), graph)
    monkeypatch.setattr(race, "racers_of", lambda key, name: [*make(key, name=name), bent])
    assert run("--nets", "16-1", *SHORT, "--out", tmp_path) == 1
    assert "**strays**" in (tmp_path / "model.md").read_text()


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, capsys):
    assert run("--nets", "20-1") == 2
    assert "--nets must be among 34-2, 16-1, 18-0.75, got 20-1" in capsys.readouterr().err
    assert run("--threads", 0) == 2
    assert run("--render", "--out", tmp_path) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "model.json").write_text("{")
    assert run("--render", "--out", tmp_path) == 2
    assert "is not valid JSON" in capsys.readouterr().err


def test_the_short_form_leaves_the_recorded_figures_alone():
    full, quick = model.ModelConfig().resolved(), model.ModelConfig(quick=True).resolved()
    assert full.out == Path("docs/benchmarks")
    assert quick.out == Path("runs/bench")
    assert (full.nets, quick.nets) == (tuple(RACES), ("34-2",))
    assert model.ModelConfig(quick=True, batches=(8,), out=Path("x")).resolved().out == Path("x")
