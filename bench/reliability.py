"""python bench/reliability.py: overload, SIGTERM, SIGHUP, kill -9 and attacks, on this machine alone."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import machine_table, table
from bench.siege_page import siege_parts
from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from bench.faults import Subject

BOUNDED = """\
| what a client may take | bound | by |
| --- | --- | --- |
| connections | `--max-connections`, and what the process may open files for | `serve/request/open_connections.py` |
| headers, trailers, chunk extensions, blank lines | [http.md](http.md#limits) | `serve/request/connection.py` |
| requests behind one another on a connection | 64 | `serve/request/connection.py` |
| a connection without a request, and what comes after an answer | 5 s | `serve/request/connection.py` |
| answers that are not read | 30 s, and what a socket holds | `serve/request/connection.py` |
| bodies | `--max-body-mb` each, `--max-held-mb` together, `--deadline-ms` to arrive | `serve/request/` |
| images that wait | `--max-queue`, `--max-images` of a request | `serve/request/batcher.py` |
| the time of an answer | `--deadline-ms` | `serve/request/batcher.py` |
| labels of metrics | the known addresses; 128 classes of 80 characters | `serve/watching/` |
| a reload | `--reload-seconds`, tried in a process that can be ended | `serve/model/process.py` |
| lines of the log that nobody reads | 4 MB; those beyond are counted | `serve/watching/logs.py` |
| JSON inside a model's file or card | 64 lists and objects inside one another | `common/documents.py` |

What happens to a server at the wrong time, signals before it serves, lost files, models that hang and logs that nobody
reads, is measured by `python bench/accidents.py`: [accidents.md](benchmarks/accidents.md).

Left to a proxy: TLS; how many connections and requests one client may have, as the server knows no clients; who may
reach it at all. A stranger who opens `--max-connections` connections, and opens them again every ten seconds, keeps
others out."""
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "python bench/reliability.py                      # two minutes; writes docs/reliability.md and its record",
    "python bench/reliability.py --quick --out /tmp/reliability",
    "python bench/reliability.py --only attacks siege # the record keeps what it has of the others",
    "python bench/reliability.py --render docs/benchmarks/reliability.json",
)
TITLES = {
    "overload": "Ten times more than it can answer",
    "drain": "SIGTERM under load",
    "reload": "SIGHUP under load",
    "kill": "kill -9 of one worker of two",
    "attacks": "Endless and slow requests",
    "siege": "Under siege",
}


@dataclass(frozen=True)
class ReliabilityConfig:
    model: Annotated[Path, "plain.onnx to serve", POSITIONAL] = ROOT / "models" / "fashion-mnist.onnx"
    image: Annotated[Path, "the image that is asked for"] = ROOT / "models" / "held-out" / "Coat_6.png"
    seconds: Annotated[float, "how long ten times the maximum is offered"] = 30.0
    rounds: Annotated[int, "how often SIGTERM and kill -9 are tried"] = 5
    reloads: Annotated[int, "how often the model is exchanged"] = 30
    quick: Annotated[bool, "3 s of overload, one round, 4 reloads"] = False
    out: Annotated[Path, "folder for reliability.md and benchmarks/reliability.json"] = ROOT / "docs"
    only: Annotated[
        tuple[Literal["overload", "drain", "reload", "kill", "attacks", "siege"], ...],
        "parts to measure (default: all)",
    ] = ()
    render: Annotated[Path | None, "measure nothing: write the page of this record"] = None

    def __post_init__(self) -> None:
        if min(self.seconds, self.rounds, self.reloads) <= 0:
            raise Refusal("--seconds, --rounds and --reloads must be positive")


def command(config: ReliabilityConfig) -> int:
    """Put a server under load on 127.0.0.1 and do to it what operators and accidents do.

    Writes a record and its page. Exit status 1 where a bar is missed of what was measured.
    """
    import json

    from common.files import read_whole, write_whole

    if config.render:
        record = json.loads(read_whole(config.render))
    else:
        path = config.out / "benchmarks" / "reliability.json"
        record = _measure(config, json.loads(read_whole(path)) if config.only else {"alone": {}})
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"wrote {path}")
    page = write_whole(config.out / "reliability.md", markdown(record).encode())
    print(f"wrote {page}")
    missed = [f"{name}: {bar}" for name, bar, is_met in _bars(record) if not is_met and name in (config.only or TITLES)]
    for bar in missed:
        print(f"missed: {bar}")
    return 1 if missed else 0


def _measure(config: ReliabilityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the parts that are asked for measured anew; those that are measured alone say so."""
    import os
    import tempfile

    import uvloop

    from bench import faults, siege
    from bench.attacks import attack
    from bench.page import describe_machine
    from common.progress import make_console, progress

    seconds, rounds, reloads = (3.0, 1, 4) if config.quick else (config.seconds, config.rounds, config.reloads)
    about = {
        "command": f"python bench/reliability.py {given_arguments(config)}".strip(),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    with tempfile.TemporaryDirectory() as folder:
        subject, name_of_model = _subject(config, Path(folder))
        parts: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
            "overload": (1, lambda: uvloop.run(faults.overload(subject, seconds=seconds))),
            "reload": (1, lambda: uvloop.run(faults.reload(subject, Path(folder), times=reloads))),
            "drain": (rounds, lambda: uvloop.run(faults.drain(subject))),
            "kill": (rounds, lambda: uvloop.run(faults.kill(subject))),
            "attacks": (1, lambda: attack(config.model)),
            "siege": (1, lambda: uvloop.run(siege.siege(subject, name_of_model, quick=config.quick))),
        }
        chosen = {name: part for name, part in parts.items() if name in (config.only or parts)}
        with progress(make_console(), "reliability", sum(times for times, _ in chosen.values())) as advance:
            for name, (times, fault) in chosen.items():
                record[name] = []
                for _ in range(times):
                    record[name].append(fault())
                    advance(1, name)
    if "siege" in chosen:
        record["siege"][0].update(**about, niceness=os.nice(0))
    if not config.only:
        return {**about, "model": config.model.name, **record}
    return {**record, "alone": {**record.get("alone", {}), **dict.fromkeys(chosen, about)}}


def _subject(config: ReliabilityConfig, folder: Path) -> "tuple[Subject, str]":
    """The model and one of the same architecture with random weights, what both say of the image, and its name."""
    import torch

    from bench.faults import Subject
    from common.files import read_whole, write_whole
    from common.image import decode
    from export.graphs.graph import to_onnx
    from export.runtimes.onnx_session import OnnxSession
    from export.runtimes.probabilities import softmax
    from fold.plain import fold_net
    from serve.v2.routes import model_name
    from train.families import build

    session = OnnxSession(config.model)
    spec = session.model.spec
    torch.manual_seed(0)
    net = fold_net(build(spec).eval()).float()
    other = write_whole(folder / "other.onnx", to_onnx(net, spec, {}).SerializeToString())
    image = read_whole(config.image)
    pixels = decode(image, spec.image)[None]
    expected = {
        one.model.digest: softmax(one(pixels), temperature=spec.temperature)[0] for one in (session, OnnxSession(other))
    }
    return Subject(config.model, other, image, expected), model_name(session.model)


def _bars(record: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(fault, bar, whether every round met it)."""
    return [
        (name, bar, all(round["bars"][bar] for round in record[name]))
        for name in TITLES
        for bar in record[name][0]["bars"]
    ]


def markdown(record: dict[str, Any]) -> str:
    """The page of one record."""
    parts = [
        "# What a server survives",
        f"Written by `{record['command']}`. It serves `{record['model']}` with `serve/run.py` and asks it from the "
        "same machine: server and clients share its cores. The record is "
        "[reliability.json](benchmarks/reliability.json).",
        machine_table(record["machine"]),
        table(("", "bar", ""), [(TITLES[name], bar, "met" if met else "MISSED") for name, bar, met in _bars(record)]),
    ]
    sections = (_overload, _drain, _reload, _kill, _attacks, siege_parts)
    for name, explain in zip(TITLES, sections, strict=True):
        parts += [f"## {TITLES[name]}", *explain(record[name])]
        if name != "siege" and (alone := record["alone"].get(name)):
            machine = ", ".join(f"{name} {value}" for name, value in alone["machine"].items())
            parts.append(f"Measured by `{alone['command']}` on another day: {machine}.")
    parts += ["## What is bounded, and by what", BOUNDED]
    return "\n\n".join(parts) + "\n"


def _overload(rounds: list[dict[str, Any]]) -> list[str]:
    (result,) = rounds
    closed = result["closed_loop_per_s"]
    rows = [
        (f"{num} connections without a pause", *(f"{closed[when][num]:.0f} answers/s" for when in ("before", "after")))
        for num in closed["before"]
    ]
    rss, accepted, refused = result["rss_mb"], result["accepted_ms"], result["refused_ms"]
    return [
        f"The server runs with `{' '.join(result['server'])}`. Clients that wait for their answer find its maximum:",
        table(("", "before", "after"), rows),
        f"Then {result['offered_per_s']:.0f} requests a second are due for {result['seconds']:g} s, whatever becomes "
        f"of them; {result['sent']:,} of {result['due']:,} were sent. Times count from when a request was due.",
        table(
            ("", ""),
            [
                ("answers", _counts(result["statuses"])),
                ("accepted", f"{result['accepted_per_s']:.0f}/s, {result['goodput_share']:.0%} of the maximum"),
                ("accepted: median, p99, longest", _times(accepted)),
                ("refused: median, p99", _times(refused)),
                ("503 without Retry-After", str(result["without_retry_after"])),
                ("memory before, largest, after", ", ".join(f"{rss[when]:.0f}" for when in rss) + " MB"),
            ],
        ),
        "A full server refuses before it reads the body. A refusal still costs some of the time of a core, and what "
        "accepted answers lack went there and into making the requests.",
    ]


def _drain(rounds: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            f"{result['begun']:,}",
            str(result["begun_and_lost"]),
            _counts(result["answers"]),
            f"{result['leave_s']:.2f} s",
            str(result["exit_status"]),
        )
        for result in rounds
    ]
    return [
        "32 connections ask without a pause. The server's log names every request that it began; each must have its "
        "answer. `lost` are requests that reached a connection when the server had closed it: it never read them, and "
        "a client may send them elsewhere.",
        table(("begun", "begun and lost", "answers", "time to leave", "exit status"), rows),
    ]


def _reload(rounds: list[dict[str, Any]]) -> list[str]:
    (result,) = rounds
    return [
        "16 connections ask without a pause while the file is replaced by one of two models in turn, "
        f"{result['reloads']} times, each followed by SIGHUP; a reload took {result['seconds_each']:.2f} s. Answers: "
        f"{_counts(result['statuses'])}; {result['answers_that_do_not_fit']} of them do not fit the digest that they "
        "name. The last file is damaged, cut in half.",
    ]


def _kill(rounds: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            _counts(result["statuses"]),
            f"{result['lost_and_answered_on_one_retry']} of {result['lost']}",
            f"{result['recovery_s']:.1f} s",
        )
        for result in rounds
    ]
    return [
        "16 connections ask without a pause. What the killed worker was answering is lost, and asked once more with "
        "`serve/client.py`. Recovery is the time until a new process answers; the other worker answers meanwhile.",
        table(("answers", "answered on one retry", "recovery"), rows),
    ]


def _attacks(rounds: list[dict[str, Any]]) -> list[str]:
    (result,) = rounds
    floods = [
        (
            what,
            f"{flood['sent_mb']:.1f} MB",
            f"{flood['seconds']:.2f} s",
            f"{flood['memory_mb']:.1f} MB",
            f"{flood['probe_ms']:.0f} ms",
        )
        for what, flood in result["floods"].items()
    ]
    drips = [(what, f"{seconds:.1f} s") for what, seconds in result["drips_s"].items()]
    crowd = result["connections"]
    return [
        "One connection sends without an end, as fast as it can, while another one asks `/healthz` again and again. "
        "What was sent stood in the sockets when the server ended the connection; it read a part of that.",
        table(("sent without an end", "sent until it ended", "after", "memory", "longest probe"), floods),
        "A byte, or a line, every quarter of a second:",
        table(("dripped", "ended after"), drips),
        f"With `--max-connections {crowd['limit']}`, {crowd['limit']} connections that say nothing cost "
        f"{crowd['kb_each']:.0f} kB each. Of as many more, {_counts(crowd['beyond'])}; one of the first is answered "
        f"{crowd['inside']}.",
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in counts.items())


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{value:.0f}" for value in milliseconds.values()) + " ms"


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
