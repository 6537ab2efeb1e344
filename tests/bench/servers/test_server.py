"""The benchmark of servers: what it refuses, what it checks, and what its page says. Peers are not started here."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bench import server
from bench.lab.load import put_load
from bench.lab.server import Server, free_port
from bench.servers import race
from bench.servers.page import CONNECTIONS, OURS, PERCENTILES, draw_latencies, judge_bars, page
from bench.servers.race import (
    CONTESTANTS,
    Contestant,
    ServedNet,
    Way,
    as_form,
    as_inference_request,
    check_answers,
    measure,
    write_net,
)
from common.cli import run_command
from common.figure import png
from common.refusal import Refusal
from serve.request.body import read_images
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[3]
# A server without packages: it answers every POST with the index 3.
STUB = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"index": 3}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
WAY = Way("stub", "/", "image/png", bytes)
needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed here")


def run(*argv):
    return run_command(server.command, server.ServerConfig, argv=[str(part) for part in argv])


def start_stub(folder, program=STUB):
    (folder / "stub.py").write_text(program)
    return Contestant("ours", f"{folder}/stub.py {{port}}", (WAY,), "a stub").start(folder / "m.onnx", b"", folder)


def measured(requests_per_s, p99_ms=10.0):
    return {"requests_per_s": requests_per_s, "p50_ms": 1.0, "p99_ms": p99_ms, "failures": 0}


def model_of(rows, *, macs=4_700_000):
    alone = {"model_1": [0.2, 0.2], "model_32": [3.2, 3.2], "decode_and_model_1": [0.3, 0.3]}
    return {
        "title": "a net",
        "picture": "server-small.png",
        "macs": macs,
        "alone": alone,
        "steps": {"model, in batches of 32": 100.0, "decoding": 20.0},
        "rows": [
            {"server": name, "title": title, "failed": failed, "loads": {str(num): loads for num in CONNECTIONS}}
            for name, title, failed, loads in rows
        ],
    }


OURS_ROW = ("ours", OURS, None, [measured(5000), measured(6000)])


def judged(model):
    return {bar["promise"]: (bar["found"], bar["verdict"]) for bar in judge_bars(model)}


def test_bars_are_judged_by_medians_of_ratios_within_a_round_and_bounded_by_the_model_alone():
    lit = ("litserve", "LitServe", None, [measured(500, 40), measured(500, 40)])
    assert judged(model_of([OURS_ROW, lit])) == {
        "4.7 MMAC: 10x LitServe at 64 connections": ("11.0x; without any cost of a server 20.0x", "met"),
        "4.7 MMAC: p99 at 64 connections below all others": (
            "10.0 ms; the lowest other is LitServe with 40.0 ms",
            "met",
        ),
        "4.7 MMAC: a lone request costs 1.5 ms beside its work": ("0.70 ms", "met"),
    }


def test_the_share_of_the_model_alone_is_a_bar_of_the_large_model():
    bars = judged(model_of([OURS_ROW], macs=38_000_000))
    assert bars["38.0 MMAC: 85% of the model alone"] == ("55.0%", "**not met**")


def test_what_failed_is_a_row_with_its_reason_and_judges_nothing():
    lit = ("litserve", "LitServe", "ends with status 1: no | such module", [])
    model = model_of([OURS_ROW, lit])
    assert not [bar for bar in judge_bars(model) if "LitServe" in bar["promise"] + bar["found"]]
    record = {"command": "c", "rounds": 2, "seconds": 1, "connections": CONNECTIONS, "machine": {"cores": "2"}}
    text = page({**record, "servers": [{"name": "ours", "note": "ours"}], "models": [model]})
    assert "| LitServe | failed: ends with status 1: no / such module |  |  |" in text
    assert "| ours, raw body | 5,500 (5,000–6,000) |" in text
    assert "| decoding | 20.0 | 11% |" in text
    assert "| the rest: sockets, and two threads and their caches on one core | 61.8 | 34% |" in text
    assert "| a request | 181.8 | 100% |" in text


def test_without_ours_there_are_no_bars():
    assert judge_bars(model_of([("ours", OURS, "10 failures at 64 connections", [])])) == []


def test_wrk_that_is_missing_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run() == 2
    assert capsys.readouterr().err == (
        "error: wrk and taskset missing: install the Debian packages wrk and util-linux\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--rounds", 0), "--rounds must be positive"),
        (("--seconds", 0), "--seconds must be positive"),
        (("--models",), "--models needs at least one value"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_an_environment_is_made_once_and_made_anew_where_its_packages_change(tmp_path, monkeypatch):
    peers, made = tmp_path / "peers", []
    peers.mkdir()
    (peers / "x.txt").write_text("a==1\n")
    monkeypatch.setattr(race, "PEERS", peers)

    def play(argv, **options):
        made.append(argv)
        (tmp_path / "x").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(argv, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", play)
    assert race.make_environment("x", tmp_path) == tmp_path / "x" / "bin" / "python"
    assert len(made) == 2
    race.make_environment("x", tmp_path)
    assert len(made) == 2
    (peers / "x.txt").write_text("a==2\n")
    race.make_environment("x", tmp_path)
    assert len(made) == 4


def test_what_cannot_be_installed_fails_its_rows_only(tmp_path, monkeypatch):
    def refuse(name, folder):
        raise Refusal(f"{name} cannot be installed: no such wheel")

    monkeypatch.setattr(race, "make_environment", refuse)
    rows = [{"server": one.name, "title": way.title, "failed": None} for one in CONTESTANTS[:2] for way in one.ways]
    measure(CONTESTANTS[1], ServedNet(tmp_path / "m.onnx", [b""], [], {"rows": rows}), tmp_path, seconds=1)
    reason = "fastapi cannot be installed: no such wheel"
    assert [row["failed"] for row in rows] == [None, None, reason, reason]


@pytest.mark.slow
def test_a_server_is_started_checked_and_ended(tmp_path):
    with start_stub(tmp_path) as stub:
        check_answers(stub.client, WAY, [b"one", b"two"], [3, 3])
        with pytest.raises(Refusal, match=r"stub answers \[3, 3\] where the model itself gives \[3, 4\]"):
            check_answers(stub.client, WAY, [b"one", b"two"], [3, 4])
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(stub.url)


@pytest.mark.slow
def test_a_server_that_ends_is_refused_with_its_last_line(tmp_path):
    broken = start_stub(tmp_path, "import sys; sys.exit('no such module')")
    with pytest.raises(Refusal, match="ends with status 1: no such module"), broken:
        pass


@pytest.mark.slow
def test_a_server_that_does_not_become_ready_is_refused_and_ended(monkeypatch):
    program = "import time; print('still loading', flush=True); time.sleep(600)"
    server = Server([sys.executable, "-c", program], free_port())
    server.wait_for("still loading")
    monkeypatch.setattr("bench.lab.server.START_S", 0.2)
    with pytest.raises(Refusal, match=r"is not ready after 0.2 s: still loading"), server:
        pass
    assert server.exit_status is not None


def test_each_nine_is_as_far_as_the_one_before():
    def row(title, *, failed=None):
        rounds = [{name: factor * value for name, value in PERCENTILES.items()} for factor in (1, 5, 2)]
        return {"title": title, "failed": failed, "loads": {"64": rounds}}

    rows = [row("ours"), row("theirs"), row("broken", failed="3 failures")]
    figure = draw_latencies({"title": "a net", "rows": rows})
    ours, theirs = figure.axes[0].lines
    assert ours.get_xdata()[[2, 4, 5]] == pytest.approx([1, 2, 3])  # 90, 99 and 99.9 %
    assert list(theirs.get_ydata()) == [2 * value for value in PERCENTILES.values()]  # medians of the rounds
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "theirs"]
    assert png(figure).startswith(b"\x89PNG")


@needs_wrk
@pytest.mark.slow
def test_load_counts_what_fails(tmp_path):
    body = tmp_path / "body"
    body.write_bytes(b"x")
    with start_stub(tmp_path) as stub:
        good = put_load(stub.url, "/", "image/png", [body], num_connections=1, seconds=1)
    assert good["requests_per_s"] > 0
    assert 0 < good["p50_ms"] <= good["p99_ms"]
    assert good["failures"] == 0
    # It is ready when it answers the probe, whose body is empty.
    program = STUB.replace("send_response(200)", "send_response(503 if int(self.headers['Content-Length']) else 200)")
    with start_stub(tmp_path, program) as stub:
        assert put_load(stub.url, "/", "image/png", [body], num_connections=1, seconds=1)["failures"] > 0


@needs_wrk
@pytest.mark.slow
def test_our_server_is_measured_from_the_command_to_the_page(tmp_path, monkeypatch, capsys):
    milliseconds = dict.fromkeys(PERCENTILES, 2.0)
    monkeypatch.setattr(
        race,
        "put_load",
        lambda *_, num_connections, **__: {"requests_per_s": 100.0 * num_connections, "failures": 0, **milliseconds},
    )
    argv = (
        "--servers",
        "ours",
        "--models",
        "small",
        "--quick",
        "--work",
        tmp_path,
        "--out",
        tmp_path / "out",
    )
    assert run(*argv) == 0
    record = json.loads((tmp_path / "out" / "server.json").read_text())
    (model,) = record["models"]
    assert model["macs"] == pytest.approx(4.66e6, rel=0.01)
    titles = ["ours, raw body", "ours, form"]
    assert [row["title"] for row in model["rows"]] == titles
    assert not any(row["failed"] for row in model["rows"])
    assert (tmp_path / "out" / model["picture"]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "server.md").read_text() == page(record)


def test_the_served_nets_tell_the_images_apart(tmp_path):
    assert len(set(write_net("small", CONTESTANTS, tmp_path).expected)) >= 4


def test_a_body_of_each_kind_holds_the_png():
    import asyncio

    async def receive():
        return {"type": "http.request", "body": as_form("image", b"a png"), "more_body": False}

    form = next(way for way in CONTESTANTS[0].ways if way.title == "ours, form")
    headers = {b"content-type": form.media_type.encode()}
    assert asyncio.run(read_images(receive, headers, Limits())) == [b"a png"]
    (element,) = json.loads(as_inference_request(b"a png"))["inputs"]
    assert element["data"] == ["YSBwbmc="]
