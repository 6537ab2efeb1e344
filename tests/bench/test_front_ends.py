"""The benchmark of front ends in its quick form, on a small net: what is counted, not how long it takes."""

import json
import shutil
import sys

import pytest
from PIL import Image

from bench import front_ends
from common.cli import run_command
from export.graphs.graph import to_onnx
from fold.graph import fold

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="front ends need Linux")


@pytest.fixture
def paths(tmp_path, make_net, make_spec, images):
    """A model and an image for it."""
    model, image = tmp_path / "plain.onnx", tmp_path / "image.png"
    model.write_bytes(to_onnx(fold(make_net()), make_spec(), {"training": {}}).SerializeToString())
    Image.fromarray(images(1)[0]).save(image)
    return model, image


def rounds(one_us, two_us):
    return [{"one": {"front_end_us": one_us}, "two": {"front_end_us": two_us}}]


FREE = {"batch_us": 0.0, "front_end_us": 0.0, "image_us": 0.0}


def test_front_ends_that_cost_what_one_process_does_answer_as_many_times_as_much_until_the_device_is_full():
    paper = front_ends._on_paper((200, 4), rounds(100, 100), FREE)
    assert [row["answers_per_s"] for row in paper] == [10_000 * num for num in front_ends.ON_PAPER]
    assert {row["share"] for row in paper} == {1.0}
    full = front_ends._on_paper((200, 40), rounds(100, 100), FREE)[-1]
    assert full["answers_per_s"] == full["device_per_s"] == pytest.approx(256e6 / (200 + 256 * 40))
    assert full["share"] == 1


def test_what_front_ends_and_the_device_process_cost_more_is_missing_on_paper():
    paper = front_ends._on_paper((200, 4), rounds(100, 125), FREE)
    assert [row["share"] for row in paper] == [1, *[pytest.approx(0.8)] * 5]
    cost = {"batch_us": 24.0, "front_end_us": 50.0, "image_us": 1.0}
    last = front_ends._on_paper((200, 4), rounds(10, 10), cost)[-1]
    assert last["answers_per_s"] == pytest.approx(256e6 / (200 + 1024 + 24 + 16 * 50 + 256))
    assert last["share"] == pytest.approx(1224 / 2304)


@pytest.mark.slow
def test_the_hand_over_is_drawn_from_batches_of_every_kind(paths):
    from bench.servers.simulated import FRONT_ENDS, IMAGES, hand_over

    cost = hand_over(paths[0], 256, 3)
    assert [(row["num"], len(row["us"])) for row in cost["rows"]] == [(num, len(IMAGES)) for num in FRONT_ENDS]
    assert min(us for row in cost["rows"] for us in row["us"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_scaling_writes_its_page(paths, tmp_path):
    argv = [paths[0], "--image", paths[1], "--quick", "--out", tmp_path]
    assert run_command(front_ends.command, front_ends.FrontEndsConfig, argv=[str(part) for part in argv]) in (0, 1)
    measured = json.loads((tmp_path / "front-ends.json").read_text())["rounds"][0]
    assert all(measured[name]["requests_per_s"] > 0 for name in ("one", "two"))
    assert measured["one"]["device_us"] == 0 < measured["two"]["device_us"]
    assert "| 16 |" in (tmp_path / "front-ends.md").read_text()
