"""bench/gpu_check.py --offline: what becomes of steps that fail, hang or come too late; its own steps on the CPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_check, gpu_steps
from bench.gpu_steps import Step, run_plan, run_step
from common.cli import run_command
from export.runtimes import gpu

ROOT = Path(__file__).resolve().parents[2]


def code(text):
    return ("-c", text)


def test_what_a_step_prints_as_json_is_its_result(tmp_path):
    said = 'print("hello"); print(\'{"a": 1.5, "b": [1]}\'); print("{broken")'
    row = run_step(Step("one", 60, code(said)), 60)
    assert (row["outcome"], row["results"], row["said"][0]) == ("done", [{"a": 1.5}], "hello")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("print('no device'); raise SystemExit(3)", "failed: no device (exit 3)"),
        ("import os; os.abort()", "failed: no output (exit -6)"),
        ("import ctypes; ctypes.string_at(0)", "failed: no output (exit -11)"),
    ],
)
def test_a_step_that_fails_or_crashes_is_a_row_with_its_reason(text, outcome):
    assert run_step(Step("one", 60, code(text)), 60)["outcome"] == outcome


@pytest.mark.slow
def test_a_step_over_its_limit_gets_ctrl_c_and_is_killed_if_it_goes_on(tmp_path, monkeypatch):
    """Each says that it has begun; what comes after Ctrl-C tells whether it heard it."""
    begin = "import signal\nprint('begun', flush=True)\n"
    obeys = begin + "try:\n    signal.pause()\nexcept KeyboardInterrupt:\n    print('saved')"
    deaf = begin + "signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.pause()"
    row = run_step(Step("obeys", 5, code(obeys)), 5)
    assert (row["outcome"], row["said"][-1]) == ("stopped by its limit of 5 s", "saved")
    monkeypatch.setattr(gpu_steps, "GRACE_S", 0.5)
    assert "does not stop" in run_step(Step("deaf", 5, code(deaf)), 5)["outcome"]


def test_the_rest_goes_on_and_results_are_written_after_every_step(tmp_path):
    plan = (
        Step("fails", 60, code("raise SystemExit('broken')")),
        Step("has no file", 60, code("pass"), str(tmp_path / "plain.onnx")),
        Step("comes too late", 10_000, code("pass")),
        Step("runs", 60, code("print('{\"x\": 2.0}')")),
    )
    num_written = []

    def say(line):
        path = tmp_path / "gpu-offline.json"
        num_written.append(len(json.loads(path.read_text())) if path.exists() else 0)

    rows = run_plan(plan, 600, tmp_path, say)
    assert [row["outcome"].partition(":")[0] for row in rows] == ["failed", "not run", "not run", "done"]
    assert "plain.onnx was not made" in rows[1]["outcome"]
    assert "of the budget left" in rows[2]["outcome"]
    assert num_written[-1] == 3
    page = (tmp_path / "gpu-offline.md").read_text()
    assert "| fails | failed: broken (exit 1) |" in page
    assert "## runs\n\n| x |\n| --- |\n| 2 |" in page


def test_every_step_is_a_command_that_is_there(tmp_path):
    """A wrong flag would fail on the machine with the GPU, which has minutes."""
    for device in ("cuda", "cpu"):
        for step in gpu_steps.steps(device, tmp_path, tmp_path):
            script, *argv = step.argv
            if argv[0] == "bench.gpu_steps":
                assert argv[1] in gpu_steps.STEPS
            elif script != "-m":
                assert (ROOT / script).exists()
                assert flags(argv) <= known_flags(script), step.name


def flags(argv):
    return {part for part in argv if part.startswith("--")}


def known_flags(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    return {word.strip(",[]") for word in done.stdout.split() if word.strip(",[]").startswith("--")}


def test_needs_lists_packages_with_their_wheels(capsys):
    assert run_command(gpu_check.command, gpu_check.GpuCheckConfig, argv=["--needs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("| server | typing-inspection | 0.02 MB | carry |" in line for line in lines)
    assert any("| train, fold | numpy | 17 MB | there |" in line for line in lines)
    assert any("| engines | tensorrt | 1500 MB | carry | " in line for line in lines)


def test_what_is_needed_is_in_the_environment_of_the_bare_machine():
    """But for what comes from NVIDIA, and ONNX Runtime's package with CUDA in it."""
    image = (ROOT / "bench" / "gpu-image.txt").read_text()
    named = {re.split(r"==|\[", line)[0] for line in image.splitlines() if not line.startswith("#")}
    needed = {name for packages in gpu_steps.NEEDED.values() for name in packages}
    assert needed - named == {"tensorrt", "onnxruntime-gpu"}


@pytest.mark.skipif(bool(gpu.num_devices()), reason="this machine has a CUDA device")
def test_without_a_device_the_drivers_calls_say_so():
    (result,) = gpu_steps.driver_calls("cpu")
    assert "no CUDA device" in result["gpu.py"]


@pytest.mark.slow
def test_the_fold_is_measured_in_every_precision(tmp_path, capsys):
    from train import run as train

    argv = ["--depth", "10", "--width", "0.25", "--epochs", "1", "--out", str(tmp_path)]
    assert run_command(train.command, train.TrainConfig, argv=argv) == 0
    rows = list(gpu_steps.fold_on_device("cpu", str(tmp_path / "checkpoint.pt")))
    assert [row["precision"] for row in rows[::2]] == ["fp64", "fp32", "TF32", "bf16", "fp16"]
    assert all(row["largest error"] < 1e-12 for row in rows[:2])
    assert all(row["largest error"] < 1e-4 for row in rows[2:4])
