"""python bench/reliability.py: overload, SIGTERM, SIGHUP and kill -9 under load, and strangers, on this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.page import machine_table, table
from bench.siege_page import siege_parts
from train.cli import POSITIONAL, given_arguments, run_command
from train.refusal import Refusal

if TYPE_CHECKING:
    from bench.faults import Subject

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "python bench/reliability.py                      # two minutes; writes docs/reliability.md and its record",
    "python bench/reliability.py --quick --out /tmp/reliability",
    "python bench/reliability.py --only siege         # the rest stays as the record has it",
    "python bench/reliability.py --render docs/benchmarks/reliability.json",
)
TITLES = {
    "overload": "Ten times more than it can answer",
    "drain": "SIGTERM under load",
    "reload": "SIGHUP under load",
    "kill": "kill -9 of one worker of two",
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
    only: Annotated[
        tuple[Literal["overload", "drain", "reload", "kill", "siege"], ...],
        "measure these anew; the record in --out keeps the others (default: all)",
    ] = ()
    out: Annotated[Path, "folder for reliability.md and benchmarks/reliability.json"] = ROOT / "docs"
    render: Annotated[Path | None, "measure nothing: write the page of this record"] = None

    def __post_init__(self) -> None:
        if min(self.seconds, self.rounds, self.reloads) <= 0:
            raise Refusal("--seconds, --rounds and --reloads must be positive")


def command(config: ReliabilityConfig) -> int:
    """Put a server under load on 127.0.0.1 and do to it what operators and accidents do.

    Writes a record and its page. Exit status 1 where a bar is missed.
    """
    import json

    from train.files import read_whole, write_whole

    if config.render:
        record = json.loads(read_whole(config.render))
    else:
        path = config.out / "benchmarks" / "reliability.json"
        kept = json.loads(read_whole(path)) if config.only else {}
        measured = _measure(config)
        # What is measured alone says so beside itself: the head of the page is that of the others.
        record = {**measured, **kept, **{name: measured[name] for name in config.only}}
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"wrote {path}")
    page = write_whole(config.out / "reliability.md", markdown(record).encode())
    print(f"wrote {page}")
    missed = [f"{name}: {bar}" for name, bar, is_met in _bars(record) if not is_met]
    for bar in missed:
        print(f"missed: {bar}")
    return 1 if missed else 0


def _measure(config: ReliabilityConfig) -> dict[str, Any]:
    import os
    import tempfile

    import uvloop

    from bench import faults, siege
    from bench.page import describe_machine
    from train.progress import make_console, progress

    seconds, rounds, reloads = (3.0, 1, 4) if config.quick else (config.seconds, config.rounds, config.reloads)
    record: dict[str, Any] = {
        "command": f"python bench/reliability.py {given_arguments(config)}".strip(),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    names = config.only or tuple(TITLES)
    times = {name: rounds if name in ("drain", "kill") else 1 for name in names}
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(make_console(), "reliability", sum(times.values())) as advance,
    ):
        subject, name_of_model = _subject(config, Path(folder))
        record["model"] = config.model.name
        measure = {
            "overload": lambda: faults.overload(subject, seconds=seconds),
            "reload": lambda: faults.reload(subject, Path(folder), times=reloads),
            "drain": lambda: faults.drain(subject),
            "kill": lambda: faults.kill(subject),
            "siege": lambda: siege.siege(subject, name_of_model, quick=config.quick),
        }
        for name in names:
            record[name] = []
            for _ in range(times[name]):
                record[name].append(uvloop.run(measure[name]()))
                advance(1, name)
    for result in record.get("siege", ()):
        result.update(command=record["command"], machine=record["machine"], niceness=os.nice(0))
    return record


def _subject(config: ReliabilityConfig, folder: Path) -> "tuple[Subject, str]":
    """The model and one of the same architecture with random weights, what both say of the image, and its name."""
    import torch

    from bench.faults import Subject
    from export.graph import to_onnx
    from export.runtimes.onnx_session import OnnxSession
    from fold.plain import fold_net
    from serve.answer import softmax
    from serve.v2 import model_name
    from train.families import build
    from train.files import read_whole, write_whole
    from train.image import decode

    session = OnnxSession(config.model)
    spec = session.model.spec
    torch.manual_seed(0)
    net = fold_net(build(spec).eval()).float()
    other = write_whole(folder / "other.onnx", to_onnx(net, spec, {}).SerializeToString())
    image = read_whole(config.image)
    pixels = decode(image, spec.image)[None]
    expected = {one.model.digest: softmax(one(pixels))[0] for one in (session, OnnxSession(other))}
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
    explanations = {"overload": _overload, "drain": _drain, "reload": _reload, "kill": _kill, "siege": siege_parts}
    for name, explain in explanations.items():
        parts += [f"## {TITLES[name]}", *explain(record[name])]
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


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in counts.items())


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{value:.0f}" for value in milliseconds.values()) + " ms"


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
