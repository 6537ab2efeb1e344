"""The faults of bench/reliability.py in their quick form, on a small net: what is lost, not how long it takes."""

import asyncio
import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from bench import reliability
from bench.lab.load import LOST, Load, predict_request
from bench.servers import attacks, faults
from bench.servers.attacks import Attack
from common.cli import run_command
from common.files import write_whole
from export.graphs.graph import to_onnx
from fold.graph import fold
from serve.request.connection import MAX_TURNED_AWAY


@pytest.fixture
def subject(tmp_path, make_net, make_spec):
    """A model's file, and an image for it."""
    pixels, file = np.random.default_rng(5).integers(0, 256, (8, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    model = to_onnx(fold(make_net()), make_spec(), {"training": {}})
    return write_whole(tmp_path / "model.onnx", model.SerializeToString()), file.getvalue()


def is_met(result):
    return all(result["bars"].values()) or result


@pytest.mark.slow
def test_sigterm_loses_no_request_that_was_begun(subject):
    result = asyncio.run(faults.drain(*subject))
    assert is_met(result) is True
    assert result["begun"] > 0


@pytest.mark.slow
def test_reloads_lose_no_request_and_answers_fit_their_model(subject):
    assert is_met(asyncio.run(faults.reload(*subject, times=3))) is True


@pytest.mark.slow
def test_what_a_killed_worker_was_answering_succeeds_on_one_retry(subject):
    assert is_met(asyncio.run(faults.kill(*subject))) is True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="front ends need Linux")
def test_nothing_is_lost_that_is_asked_once_more(subject, monkeypatch):
    monkeypatch.setattr(faults, "RESTART_S", 120)  # the defaults are measured in bench/ alone
    result = asyncio.run(faults.kill_front_ends(*subject, seconds=10, every_s=4))
    assert is_met(result) is True
    assert result["num_killed"] == 2
    assert result["answered_then"] == result["sent_again"]


class Scripted(asyncio.Protocol):
    """Answers every request with the next of `script`; None closes the connection instead."""

    def __init__(self, script):
        self._script = script

    def connection_made(self, transport):
        self._transport = transport

    def data_received(self, data):
        answer = next(self._script)
        if answer is None:
            self._transport.close()
        else:
            self._transport.write(answer)


def answer(status, body=b"", *fields):
    head = (b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *fields, b"", b"")
    return b"\r\n".join(head) + body


def offered(script, *, num_requests):
    """A load on one connection to a server that follows `script`, and its replies."""

    async def scenario():
        server = await asyncio.get_running_loop().create_server(lambda: Scripted(iter_script), "127.0.0.1", 0)
        taken = []

        def take(reply):
            taken.append(reply)
            if len(taken) == num_requests:
                load.stop()

        async with server:
            port = server.sockets[0].getsockname()[1]
            load = Load(port, predict_request(b"image"), take, num_connections=1)
            await load.run(60)
        return load, taken

    iter_script = iter(script)
    return asyncio.run(scenario())


def test_a_load_reads_answers_whole_and_opens_lost_connections_again():
    refused = answer(503, b"no", b"Retry-After: 1")
    load, taken = offered([answer(200, b"yes"), None, refused, answer(503)], num_requests=4)
    assert [(one.number, one.status, one.body) for one in taken] == [
        (0, 200, b"yes"),
        (1, LOST, b""),
        (2, 503, b"no"),
        (3, 503, b""),
    ]
    assert [b"\r\nretry-after: 1\r\n" in one.head for one in taken] == [False, False, True, False]
    assert load.num_sent == 4
    assert load.statuses() == {"lost": 1, "200": 1, "503": 2}


def test_an_answer_fits_its_model_or_not():
    expected = np.array([0.25, 0.75])
    top = [{"index": 1, "probability": 0.75}, {"index": 0, "probability": 0.25}]
    body = json.dumps({"results": [{**top[0], "top": top}]}).encode()
    assert faults._fits(body, expected)
    assert not faults._fits(body, np.array([0.75, 0.25]))
    assert not faults._fits(body, None)


def test_a_request_names_itself():
    assert predict_request(b"100%d")(7).endswith(b"X-Request-Id: load-7\r\n\r\n100%d")


@pytest.mark.slow
def test_every_attack_is_ended_and_costs_no_memory(subject, monkeypatch):
    monkeypatch.setattr(attacks, "DRIP_S", 60.0)  # how soon is measured in bench/ alone
    result = asyncio.run(attacks.attack(subject[0]))
    bars = {bar: met for bar, met in result["bars"].items() if "probe" not in bar}  # a time, measured in bench/ alone
    assert len(bars) == 3
    assert all(bars.values()), result
    assert result["connections"]["inside"] == "200"
    assert result["connections"]["beyond"]["503"] == MAX_TURNED_AWAY


@pytest.mark.slow
def test_a_siege_reports_every_answer_and_what_a_healthy_client_notices(subject):
    png = attacks.flat_png(16, "RGB")
    strangers = [
        Attack("small images", lambda: 3 * [png]),
        Attack("lists", lambda: [attacks.empty_lists(2 * 10**6)], is_json=True),
        Attack(
            "an infer request of the wrong shape",
            lambda: [attacks.nested_tensor(1000)],
            path="/v2/models/{model}/infer",
            is_json=True,
        ),
        Attack("senders that hang up", lambda: [png], hang_up=True, server=attacks.ROOMY),
    ]
    result = asyncio.run(attacks.siege(*subject, strangers))
    small, lists, infer, hung_up = result["attacks"]
    assert small["answers"] == {"200": 3}
    assert lists["answers"] == {"413": 1}
    assert infer["answers"].keys() <= {"400", "404"}
    assert hung_up["answers"] == {"hung up": 1}
    assert hung_up["server"] == " ".join(attacks.ROOMY)
    assert result["bars"]["every healthy request is answered 200"]
    assert all(0 < one["mb"]["before"] <= one["mb"]["largest"] for one in result["attacks"])
    assert {one["probe"] for one in result["attacks"]} == {"/predict", "/healthz"}


def test_the_files_of_a_siege_are_what_they_are_named():
    scans = Image.open(io.BytesIO(attacks.scans_jpeg(16, 3)))
    assert (scans.format, scans.size) == ("JPEG", (16, 16))
    assert attacks.chunks_png(5).count(b"prVt") == 5
    assert Image.open(io.BytesIO(attacks.flat_png(8, "I;16"))).mode == "I;16"
    assert Image.open(io.BytesIO(attacks.noise_webp(8))).format == "WEBP"
    assert json.loads(attacks.empty_lists(9)) == {"images": [[], [], [], []]}
    assert len(json.loads(attacks.nested_tensor(16))["inputs"][0]["data"]) == 3


def test_a_part_that_is_measured_alone_leaves_the_others(tmp_path, monkeypatch):
    folder = reliability.ROOT / "docs"
    known = json.loads((folder / "reliability.json").read_text())
    write_whole(tmp_path / "reliability.json", json.dumps(known).encode())
    (found,) = known["attacks"]

    async def attack(model):
        return {**found, "drips": {"a drop": {"seconds": 1.25}}}

    monkeypatch.setattr(attacks, "attack", attack)
    argv = ["--only", "attacks", "--out", str(tmp_path)]
    assert run_command(reliability.command, reliability.ReliabilityConfig, argv=argv) == 0
    record = json.loads((tmp_path / "reliability.json").read_text())
    assert {name: record[name] for name in known if name not in ("attacks", "alone")} == {
        name: known[name] for name in known if name not in ("attacks", "alone")
    }
    assert "--only attacks" in record["alone"]["attacks"]["command"]
    assert "| a drop | 1.2 s |" in (tmp_path / "reliability.md").read_text()


def test_the_page_is_that_of_the_record(tmp_path):
    folder = reliability.ROOT / "docs"
    shutil.copy(folder / "reliability.json", tmp_path)
    argv = ["--render", "--out", str(tmp_path)]
    status = run_command(reliability.command, reliability.ReliabilityConfig, argv=argv)
    page = (tmp_path / "reliability.md").read_text()
    assert status == (1 if "| MISSED |" in page else 0)
    assert page == (folder / "reliability.md").read_text()


def test_a_missed_bar_is_named_and_fails(tmp_path, capsys):
    record = json.loads((reliability.ROOT / "docs" / "reliability.json").read_text())
    record["drain"][1]["bars"]["exit status 0"] = False
    (tmp_path / "reliability.json").write_text(json.dumps(record))
    argv = ["--render", "--out", str(tmp_path)]
    assert run_command(reliability.command, reliability.ReliabilityConfig, argv=argv) == 1
    assert "missed: drain: exit status 0" in capsys.readouterr().out
    assert "| SIGTERM under load | exit status 0 | MISSED |" in (tmp_path / "reliability.md").read_text()
