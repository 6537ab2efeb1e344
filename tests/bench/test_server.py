"""The benchmark of servers: what it refuses, what it checks, and what its page says. Peers are not started here."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bench import server, server_race, servers
from bench.lab.server import Server, free_port
from bench.lab.wrk import WrkResult, put_load
from bench.server_page import OURS, PERCENTILES, bars_of, draw_latencies, markdown
from bench.server_race import CONNECTIONS, RaceRow, check_answers, open_race, start_contestant, write_net
from bench.servers import CONTESTANTS, Contestant, Way, as_form, as_inference_request
from common.cli import run_command
from common.figure import png
from common.refusal import Refusal
from serve.request.body import read_images
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
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
WAY = Way("stub", "/", "image/png", bytes, lambda answer: answer["index"])
needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed here")


def run(*argv):
    return run_command(server.command, server.ServerConfig, argv=[str(part) for part in argv])


def start_stub(folder, program=STUB):
    (folder / "stub.py").write_text(program)
    contestant = Contestant("stub", f"{folder}/stub.py {{port}}", (WAY,), "a stub")
    return start_contestant(contestant, Path(sys.executable), folder / "m.onnx", folder / "log")


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


def test_bars_are_judged_by_medians_of_ratios_within_a_round_and_bounded_by_the_model_alone():
    lit = ("litserve", "LitServe", None, [measured(500, 40), measured(500, 40)])
    bars = {bar.promise: bar for bar in bars_of(model_of([OURS_ROW, lit]), CONNECTIONS)}
    ratio = bars["4.7 MMAC: 10x LitServe at 64 connections"]
    assert (ratio.found, ratio.is_met) == ("11.0x; without any cost of a server 20.0x", True)
    p99 = bars["4.7 MMAC: p99 at 64 connections below all others"]
    assert (p99.found, p99.is_met) == ("10.0 ms; the lowest other is LitServe with 40.0 ms", True)
    lone = bars["4.7 MMAC: a lone request costs 1.5 ms beside its work"]
    assert (lone.found, lone.is_met) == ("0.70 ms", True)
    assert len(bars) == 3


def test_the_share_of_the_model_alone_is_a_bar_of_the_large_model():
    bars = {bar.promise: bar for bar in bars_of(model_of([OURS_ROW], macs=38_000_000), CONNECTIONS)}
    share = bars["38.0 MMAC: 85% of the model alone"]
    assert (share.found, share.is_met) == ("55.0%", False)


def test_what_failed_is_a_row_with_its_reason_and_judges_nothing():
    lit = ("litserve", "LitServe", "ends with status 1: no | such module", [])
    model = model_of([OURS_ROW, lit])
    assert not [bar for bar in bars_of(model, CONNECTIONS) if "LitServe" in bar.promise + bar.found]
    record = {"command": "c", "rounds": 2, "seconds": 1, "connections": CONNECTIONS, "machine": {"cores": "2"}}
    page = markdown({**record, "servers": [{"name": "ours", "note": "ours"}], "models": [model]})
    assert "| LitServe | failed: ends with status 1: no / such module |  |  |" in page
    assert "| ours, raw body | 5,500 (5,000–6,000) |" in page
    assert "| decoding | 20.0 | 11% |" in page
    assert "| the rest: sockets, and two threads and their caches on one core | 61.8 | 34% |" in page
    assert "| a request | 181.8 | 100% |" in page


def test_without_ours_there_are_no_bars():
    assert bars_of(model_of([("ours", OURS, "10 failures at 64 connections", [])]), CONNECTIONS) == []


def test_wrk_that_is_missing_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run() == 2
    assert capsys.readouterr().err == (
        "error: wrk and taskset missing: install the Debian packages wrk and util-linux\n"
    )


@pytest.mark.parametrize("argv", [("--rounds", 0), ("--seconds", 0), ("--models",)])
def test_wrong_arguments_are_refused(argv, capsys):
    assert run(*argv) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_an_environment_is_made_once_and_made_anew_where_its_packages_change(tmp_path, monkeypatch):
    peers, made = tmp_path / "peers", []
    peers.mkdir()
    (peers / "x.txt").write_text("a==1\n")
    monkeypatch.setattr(servers, "PEERS", peers)

    def play(argv, **options):
        made.append(argv)
        (tmp_path / "x").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(argv, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", play)
    assert servers.make_environment("x", tmp_path) == tmp_path / "x" / "bin" / "python"
    assert len(made) == 2
    servers.make_environment("x", tmp_path)
    assert len(made) == 2
    (peers / "x.txt").write_text("a==2\n")
    servers.make_environment("x", tmp_path)
    assert len(made) == 4


def test_what_cannot_be_installed_fails_its_rows_only(tmp_path, monkeypatch):
    def refuse(name, folder):
        raise Refusal(f"{name} cannot be installed: no such wheel")

    monkeypatch.setattr(server_race, "make_environment", refuse)
    race = open_race([CONTESTANTS[1]], tmp_path, print)
    rows = {way.title: RaceRow("fastapi", way.title) for way in CONTESTANTS[1].ways}
    race.measure(CONTESTANTS[1], None, rows, seconds=1, warm_up=False)
    assert {row.failed for row in rows.values()} == {"fastapi cannot be installed: no such wheel"}


@pytest.mark.slow
def test_a_server_is_started_checked_and_ended(tmp_path):
    with start_stub(tmp_path) as stub:
        check_answers(stub.url, WAY, [b"one", b"two"], [3, 3])
        with pytest.raises(Refusal, match=r"stub answers \[3, 3\] where the model itself gives \[3, 4\]"):
            check_answers(stub.url, WAY, [b"one", b"two"], [3, 4])
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
    figure = draw_latencies({"title": "a net", "rows": rows}, 64)
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
    assert good.requests_per_s > 0
    assert 0 < good.p50_ms <= good.p99_ms
    assert good.failures == 0
    program = STUB.replace("send_response(200)", "send_response(503)")
    with start_stub(tmp_path, program) as stub:
        assert put_load(stub.url, "/", "image/png", [body], num_connections=1, seconds=1).failures > 0


@needs_wrk
@pytest.mark.slow
def test_our_server_is_measured_from_the_command_to_the_page(tmp_path, monkeypatch, capsys):
    milliseconds = dict.fromkeys(PERCENTILES, 2.0)
    monkeypatch.setattr(
        server_race,
        "put_load",
        lambda *_, num_connections, **__: WrkResult(100.0 * num_connections, failures=0, **milliseconds),
    )
    argv = ("--servers", "ours", "--models", "small", "--quick", "--work", tmp_path, "--out", tmp_path / "out")
    assert run(*argv) == 0
    record = json.loads((tmp_path / "out" / "server.json").read_text())
    (model,) = record["models"]
    assert model["macs"] == pytest.approx(4.66e6, rel=0.01)
    assert [row["title"] for row in model["rows"]] == ["ours, raw body", "ours, form"]
    assert not any(row["failed"] for row in model["rows"])
    assert (tmp_path / "out" / model["picture"]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "server.md").read_text() == markdown(record)


def test_the_served_nets_tell_the_images_apart(tmp_path):
    pngs = [path.read_bytes() for path in sorted((ROOT / "models" / "held-out").glob("*.png"))]
    assert len(set(write_net("small", tmp_path, pngs).expected)) >= 4


def test_a_body_of_each_kind_holds_the_png():
    import asyncio

    async def receive():
        return {"type": "http.request", "body": as_form("image")(b"a png"), "more_body": False}

    form = next(way for way in CONTESTANTS[0].ways if way.title == "ours, form")
    headers = {b"content-type": form.media_type.encode()}
    assert asyncio.run(read_images(receive, headers, Limits())) == [b"a png"]
    (element,) = json.loads(as_inference_request(b"a png"))["inputs"]
    assert element["data"] == ["YSBwbmc="]
