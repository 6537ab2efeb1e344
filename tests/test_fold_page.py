"""docs/fold-your-own-net.md, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import read_greeting
from test_readme import argv_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "fold-your-own-net.md").read_text()
BLOCKS = re.findall(r"```(python|sh|text)\n(.*?)```", PAGE, flags=re.DOTALL)
NETS, TRAINED, *PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
PRINTED = [text for kind, text in BLOCKS if kind == "text"]
ROADS = [text.splitlines() for kind, text in BLOCKS if kind == "sh"]


def run(*argv, cwd):
    # The page's programs import this tree, installed or not.
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def folder(tmp_path):
    assert NETS.startswith("# nets.py\n")
    (tmp_path / "nets.py").write_text(NETS)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_prints_what_the_page_says(number, folder):
    assert len(PROGRAMS) == len(PRINTED) == 3
    done = run(sys.executable, "-c", PROGRAMS[number], cwd=folder)
    assert done.stdout == PRINTED[number], done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("road", ROADS, ids=["own", "timm"])
def test_its_commands_build_an_engine_and_serve(road, folder, port):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    done = run(sys.executable, "-c", TRAINED, cwd=folder)
    assert done.returncode == 0, done.stderr
    *commands, serve, ask = road
    for line in commands:
        done = subprocess.run(argv_of(line, port), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (folder / "plain.engine").exists()
    with subprocess.Popen(argv_of(serve, port), cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            read_greeting(server)
            done = subprocess.run(argv_of(ask, port), cwd=folder, capture_output=True, text=True)
            assert '"probability"' in done.stdout, done.stdout + done.stderr
        finally:
            server.terminate()


@pytest.mark.slow
def test_a_net_of_signals_stops_where_images_are_needed(folder):
    done = run(sys.executable, str(ROOT / "fold/run.py"), "nets.py:signal", "--image-size", "32", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the net does not take images of 3 channels of 32x32")
    assert done.stderr.count("\n") == 1
    assert not (folder / "plain.safetensors").exists()
