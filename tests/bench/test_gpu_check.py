"""make gpu-check on a machine without a GPU: the same code on the CPU, and what it says of each missing runtime."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check, nets
from bench.runtimes import contenders
from common.cli import run_command
from export.compare import TOLERANCES, compare
from export.runtimes import gpu
from fold.graph import fold
from fold.plain import save_plain

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(bool(gpu.num_devices()), reason="this machine has a CUDA device")
QUICK = ("--rounds", "2", "--round-s", "0.001")


def run(*argv):
    return run_command(gpu_check.command, gpu_check.GpuCheckConfig, argv=[str(part) for part in argv])


@pytest.fixture
def plain(tmp_path, make_net, make_spec):
    path = tmp_path / "plain.safetensors"
    save_plain(path, fold(make_net()).float(), make_spec(), {"training": {"dataset": "digits"}})
    return path


def titles_of(device):
    return list(contenders.contenders(device, nets.seeded_net(10, 0.25), Path("unused"), (1, 1, 1)))


def only_record(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_cpu_table_comes_from_the_same_code(plain, tmp_path):
    out = tmp_path / "out"
    assert run(plain, "--device", "cpu", "--batch-sizes", 2, *QUICK, "--out", out) == 0
    record = only_record(out)
    assert (
        record["command"]
        == f"python bench/gpu_check.py {plain} --device cpu --batch-sizes 2 --rounds 2 --round-s 0.001"
    )
    assert (record["sample"], record["tests"]) == (False, None)
    (net,) = record["nets"]
    titles = [row["title"] for row in net["rows"]]
    assert titles == titles_of("cpu")
    assert all(len(row["timings"]["2"]["round_ms"]) == 2 for row in net["rows"])
    assert net["rows"][0]["timings"]["2"]["speedup"] == 1
    verdicts = {row["title"]: row["parity"] for row in net["rows"]}
    assert verdicts.pop("PyTorch, Dirac net, fp32") == "not compared: its weights are others"
    assert verdicts.pop("ONNX Runtime CPU, int8")["within_tolerance"] is None
    assert all(parity["within_tolerance"] for parity in verdicts.values())
    (page,) = out.glob("cpu-*.md")
    assert page.read_text() == gpu_check.page(record)
    assert "| torch.compile, fp32 | " in page.read_text()


def test_no_net_is_begun_after_the_budget(plain, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(contenders, "measure", lambda net, config, console: measured.append(net.name) or {"rows": []})
    monkeypatch.setattr(gpu_check, "page", lambda record: "")
    assert run(plain, plain, "--device", "cpu", "--budget-s", 1e-9, "--out", tmp_path) == 1  # nothing was compared
    assert len(measured) == 1
    assert "is not measured: the 1e-09 s of --budget-s have passed" in capsys.readouterr().out


@without_gpu
def test_without_a_gpu_one_line_says_what_to_do(capsys):
    assert run() == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no CUDA device: this needs an NVIDIA GPU and its driver; --device cpu measures the CPU"
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--batch-sizes", 0), "--batch-sizes must be positive"),
        (("--batch-sizes",), "--batch-sizes needs at least one value"),
        (("--rounds", 0), "--rounds must be positive"),
        (("--round-s", 0), "--round-s must be positive"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


@without_gpu
@pytest.mark.slow
def test_every_runtime_that_a_machine_lacks_is_a_row_with_its_reason(plain, tmp_path, capsys, monkeypatch):
    """Everything up to the GPU itself: graphs are written and engines built, then each row fails in its own way."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # restored afterwards
    monkeypatch.setattr(gpu_check, "machine_of", lambda device: {"device": "Imaginary GPU"})
    monkeypatch.setattr(gpu_check, "_run_tests", lambda console: {"passed": True, "summary": "none"})
    out = tmp_path / "out"
    assert run(plain, "--batch-sizes", 1, 2, *QUICK, "--out", out) == 1
    rows = {row["title"]: row for row in only_record(out)["nets"][0]["rows"]}
    assert not any(row["timings"] for row in rows.values())
    assert all("\n" not in row["failed"] for row in rows.values())
    for name, reason in {
        "PyTorch, fp16": "NVIDIA",
        "--runtime torch, fp16": "no CUDA device 0 here",
        "ONNX Runtime CUDA, fp16": "CUDAExecutionProvider does not load here",
        "ONNX Runtime TensorRT, fp16": "TensorrtExecutionProvider does not load here",
        "TensorRT, fp32": "needs an NVIDIA GPU",
        "TensorRT, fp16": "needs an NVIDIA GPU",
        "TensorRT, int8": "needs an NVIDIA GPU",
    }.items():
        assert reason in rows[name]["failed"], rows[name]["failed"]
    page = (out / "gpu-imaginary-gpu.md").read_text()
    assert "TensorrtExecutionProvider does not load here" in page


@pytest.mark.slow
def test_a_form_beyond_its_tolerance_and_a_failing_call_end_in_status_one(plain, tmp_path, capsys, monkeypatch):
    answer = nets.torch_answer(nets.net_of_file(plain).plain)

    def bent(images):
        return answer(images) + 2 * TOLERANCES["fp32"].largest * abs(answer(images)).max()

    def broken(images):
        raise RuntimeError("the device | is gone")

    rows = {"bent, fp32": lambda: bent, "broken, fp32": lambda: broken}
    monkeypatch.setattr(contenders, "contenders", lambda *_: rows)
    out = tmp_path / "out"
    assert run(plain, "--device", "cpu", "--batch-sizes", 1, 2, *QUICK, "--out", out) == 1
    one, other = only_record(out)["nets"][0]["rows"]
    assert one["parity"]["within_tolerance"] is False
    assert other["timings"] == dict.fromkeys("12", "RuntimeError: the device | is gone")
    assert other["parity"] == "RuntimeError: the device | is gone"
    (page,) = out.glob("*.md")
    assert "| broken, fp32 | failed: RuntimeError: the device / is gone |" in page.read_text()


def test_seeded_nets_are_whole_repeatable_and_compared_in_both_forms():
    net, again = nets.seeded_net(10, 0.25), nets.seeded_net(10, 0.25)
    images = torch.from_numpy(net.image_sets["random"])
    with torch.no_grad():
        logits = net.plain(images)
        assert torch.equal(logits, again.plain(images))
        assert torch.allclose(logits, net.dirac(images), atol=1e-4 * logits.abs().max())
        extremes = net.plain(torch.from_numpy(net.image_sets["extreme"]))
    assert extremes.std(dim=0).max() > 0.01 * extremes.abs().max()  # logits depend on the image
    assert net.is_same
    assert not (net.calibration[:64] == net.image_sets["random"]).all()


@pytest.mark.parametrize("is_dirac", [True, False])
def test_half_precision_in_pytorch_is_within_its_tolerance(is_dirac):
    net = nets.seeded_net(10, 0.25)
    answer = nets.torch_answer(net.dirac if is_dirac else net.plain, dtype=torch.float16)
    images = net.image_sets["random"][:4]
    with torch.no_grad():
        expected = net.plain(torch.from_numpy(images)).numpy()
    result = compare(("plain", expected), ("fp16", answer(images)), tolerance=TOLERANCES["fp16"])
    assert result
    assert result.difference.relative > 1e-5


def test_a_net_that_learnt_a_data_set_is_compared_on_its_images_and_calibrated_on_others(tmp_path, make_net, make_spec):
    spec = make_spec(channels=1)
    path = tmp_path / "plain.safetensors"
    save_plain(path, fold(make_net(channels=1)).float(), spec, {"training": {"dataset": "digits"}})
    net = nets.net_of_file(path)
    assert {kind: len(images) for kind, images in net.image_sets.items()} == {"real": 103, "random": 64, "extreme": 5}
    assert len(net.calibration) == nets.NUM_CALIBRATION
    assert not net.is_same


def test_by_default_two_seeded_nets_and_the_bundled_one_are_measured(plain, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(net, config, console):
        measured.append(net.name)
        return {"name": net.name, "weights": net.weights, "batch_sizes": [], "rows": [{"title": "", "parity": ""}]}

    monkeypatch.setattr(contenders, "measure", measure)
    monkeypatch.setattr(gpu_check, "BUNDLED", plain)
    assert run("--device", "cpu", "--out", tmp_path) == 1  # nothing was compared
    assert measured == ["DiracNet-16-1", "DiracNet-34-2", "DiracNet-10-0.25"]


def test_the_machine_is_described_with_its_gpu_and_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "600.10\n600.10")
    machine = gpu_check.machine_of("cuda")
    assert (machine["device"], machine["compute_capability"], machine["driver"]) == ("Imaginary GPU", "9.0", "600.10")
    assert machine["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(("status", "summary"), [(0, "12 passed in 3s"), (1, "1 failed, 11 passed in 3s")])
def test_the_tests_on_the_gpu_are_run_and_summed_up(status, summary, monkeypatch, capsys):
    done = subprocess.CompletedProcess([], status, stdout=f"....\n{summary}\n", stderr="")

    def play(argv, **options):
        assert argv == [sys.executable, "-m", "pytest", "tests/gpu", "-q"]
        assert options["cwd"] == ROOT
        return done

    monkeypatch.setattr(subprocess, "run", play)
    from common.progress import make_console

    assert gpu_check._run_tests(make_console()) == {"passed": status == 0, "summary": summary}
    assert (summary in capsys.readouterr().out) == bool(status)


def test_the_sample_page_is_marked_and_comes_from_its_record(tmp_path, capsys):
    sample = ROOT / "tests" / "data" / "gpu-sample.json"
    assert run("--render", sample, "--out", tmp_path) == 0
    page = (tmp_path / "gpu-sample.md").read_text()
    written = (ROOT / "docs" / "gpu-sample.md").read_text()
    assert page == written, f"write it again: python bench/gpu_check.py --render {sample.relative_to(ROOT)} --out docs"
    assert page.startswith("# SAMPLE: no GPU was measured\n\n**Every figure on this page is invented**")
    titles = [row["title"] for row in json.loads(sample.read_text())["nets"][0]["rows"]]
    assert titles == titles_of("cuda")


def test_the_command_helps_from_any_folder_without_torch(tmp_path):
    path = ROOT / "bench" / "gpu_check.py"
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = [{str(path)!r}, '--help']; runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
