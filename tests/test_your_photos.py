"""The commands of docs/your-photos.md, run as they stand there on a small set of real photographs."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from photos import PHOTOS, make_photos
from serving import read_greeting

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "your-photos.md").read_text(), flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


def argv_of(line, port):
    """A line as a process: this Python, this tree, a free port."""
    words = shlex.split(line.removesuffix("&"))
    assert words[0] == "python"
    extra = {"serve/run.py": ["--port", str(port)], "serve/client.py": ["--url", f"http://127.0.0.1:{port}"]}
    return [sys.executable, str(ROOT / words[1]), *words[2:], *extra.get(words[1], [])]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_way_from_a_folder_to_a_served_and_judged_model_works_as_written(tmp_path, port):
    make_photos(tmp_path / "photos", per_class=16)
    make_photos(tmp_path / "new-photos", per_class=2, seed=1)
    server, outputs = None, {}
    try:
        for line in LINES:
            if line.endswith("&"):
                server = subprocess.Popen(argv_of(line, port), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
                read_greeting(server)
                continue
            done = subprocess.run(argv_of(line, port), cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            outputs[line.split()[1]] = done.stdout
    finally:
        if server:
            server.terminate()
            server.communicate(timeout=60)
    commands = ["train/run.py", "fold/run.py", "export/to_onnx.py", "export/parity.py", "export/evaluate.py"]
    assert list(outputs) == [*commands, "export/predict.py", "serve/client.py"]
    assert all(label in outputs["train/run.py"] for label in PHOTOS)
    run = tmp_path / "runs" / "photos"
    report = json.loads((run / "report" / "report.json").read_text())
    recorded = json.loads((run / "split.json").read_text())
    assert report["images"]["num"] == len(recorded["test"]) > 0
    assert {row["label"] for row in report["classes"]} == set(PHOTOS)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(PHOTOS)
    assert all(row["label"] in PHOTOS and not row["error"] for row in rows)
    for row in rows:
        assert row["image"] in outputs["serve/client.py"]
