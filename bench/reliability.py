"""python bench/reliability.py: overload, SIGTERM, SIGHUP, kill -9 and attacks, on this machine alone."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.bars import bars_table, counts, report_missed
from bench.page import fill, machine_table, table, table_of
from common.cli import POSITIONAL, given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from bench.faults import Subject

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (
    "python bench/reliability.py                      # two minutes; writes docs/reliability.md and its record",
    "python bench/reliability.py --quick --out /tmp/reliability",
    "python bench/reliability.py --only attacks siege # the record keeps its other parts",
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
    image: Annotated[Path, "the image to send"] = ROOT / "models" / "held-out" / "Coat_6.png"
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
    """Put a server under load on 127.0.0.1 and expose it to the faults of operators, accidents and strangers.

    Writes a record and its page. Exit status 1 if a measured bar is missed.
    """
    import json

    from common.files import read_whole, write_whole

    if config.render:
        record = json.loads(read_whole(config.render))
    else:
        path = config.out / "benchmarks" / "reliability.json"
        record = _measure(config, json.loads(read_whole(path)) if config.only else {"alone": {}})
        content = f"{json.dumps(record, indent=1)}\n".encode()
        print(f"wrote {write_whole(path, content)}")
    print(f"wrote {write_whole(config.out / 'reliability.md', markdown(record).encode())}")
    return report_missed(record, config.only or TITLES)


def _measure(config: ReliabilityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the chosen parts measured anew; it says which of them were measured alone."""
    import os
    import tempfile

    import uvloop

    from bench import attacks, faults
    from bench.page import describe_machine
    from common.progress import make_console, progress

    seconds, rounds, reloads = (3.0, 1, 4) if config.quick else (config.seconds, config.rounds, config.reloads)
    about = {
        "command": f"python bench/reliability.py {given_arguments(config)}".strip(),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    with tempfile.TemporaryDirectory() as folder:
        subject, model = _subject(config, Path(folder))
        strangers = attacks.siege_attacks(quick=config.quick)
        parts: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
            "overload": (1, lambda: uvloop.run(faults.overload(subject, seconds=seconds))),
            "reload": (1, lambda: uvloop.run(faults.reload(subject, Path(folder), times=reloads))),
            "drain": (rounds, lambda: uvloop.run(faults.drain(subject))),
            "kill": (rounds, lambda: uvloop.run(faults.kill(subject))),
            "attacks": (1, lambda: attacks.attack(config.model)),
            "siege": (
                1,
                lambda: uvloop.run(attacks.siege(subject, model, strangers)) | about | {"niceness": os.nice(0)},
            ),
        }
        chosen = {name: part for name, part in parts.items() if name in (config.only or parts)}
        with progress(make_console(), "reliability", sum(times for times, _ in chosen.values())) as advance:
            for name, (times, fault) in chosen.items():
                record[name] = []
                for _ in range(times):
                    record[name].append(fault())
                    advance(1, name)
    if not config.only:
        return {**about, "model": config.model.name, **record}
    return {**record, "alone": {**record.get("alone", {}), **dict.fromkeys(chosen, about)}}


def _subject(config: ReliabilityConfig, folder: Path) -> "tuple[Subject, str]":
    """The model and one of the same architecture with random weights, their outputs for the image, and its name."""
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


def markdown(record: Mapping[str, Any]) -> str:
    """The page of one record."""
    (overload,), (reload,), (attacks,), (siege,) = (record[name] for name in ("overload", "reload", "attacks", "siege"))
    crowd, closed = attacks["connections"], overload["closed_loop_per_s"]
    return fill(
        "reliability",
        **{name: record[name] for name in ("command", "model")},
        machine=machine_table(record["machine"]),
        apart="\n\n".join(_apart(name, about) for name, about in record["alone"].items() if name != "siege"),
        bars=bars_table(TITLES, record),
        overload=overload,
        options=" ".join(overload["server"]),
        closed_loop=table_of(
            " | before | after",
            "{num} connections without a pause | {before:.0f} answers/s | {after:.0f} answers/s",
            ({"num": num, "before": closed["before"][num], "after": closed["after"][num]} for num in closed["before"]),
        ),
        overloaded=_overloaded(overload),
        drains=table_of(
            "begun | begun and lost | answers | time to leave | exit status",
            "{begun:,} | {begun_and_lost} | {answers} | {leave_s:.2f} s | {exit_status}",
            ({**one, "answers": counts(one["answers"])} for one in record["drain"]),
        ),
        reload=reload,
        reload_answers=counts(reload["statuses"]),
        kills=table_of(
            "answers | answered on one retry | recovery",
            "{answers} | {lost_and_answered_on_one_retry} of {lost} | {recovery_s:.1f} s",
            ({**one, "answers": counts(one["statuses"])} for one in record["kill"]),
        ),
        floods=table_of(
            "sent without an end | sent until it ended | after | memory | longest probe",
            "{what} | {sent_mb:.1f} MB | {seconds:.2f} s | {memory_mb:.1f} MB | {probe_ms:.0f} ms",
            ({"what": what, **flood} for what, flood in attacks["floods"].items()),
        ),
        drips=table(
            ("dripped", "ended after"), [(what, f"{seconds:.1f} s") for what, seconds in attacks["drips_s"].items()]
        ),
        crowd=crowd,
        beyond=counts(crowd["beyond"]),
        siege=siege,
        niceness=f", at a niceness of {siege['niceness']} on a shared machine" if siege["niceness"] else "",
        attacks=table_of(
            "attack | sent | answers | longest wait | MB before, largest, after",
            "{name}{options} | {body_mb:.1f} MB | {answers} | {wait_ms:.0f} ms of `{probe}` | "
            "{mb[before]:.0f}, {mb[largest]:.0f}, {mb[after]:.0f}",
            map(_besieged, siege["attacks"]),
        ),
    )


def _apart(name: str, about: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    return f'"{TITLES[name]}" was measured by `{about["command"]}` on another day: {machine}.'


def _overloaded(overload: Mapping[str, Any]) -> str:
    accepted, refused = (
        ", ".join(f"{ms:.0f}" for ms in overload[name].values()) + " ms" for name in ("accepted_ms", "refused_ms")
    )
    rows = [
        ("answers", counts(overload["statuses"])),
        ("accepted", f"{overload['accepted_per_s']:.0f}/s, {overload['goodput_share']:.0%} of the maximum"),
        ("accepted: median, p99, longest", accepted),
        ("refused: median, p99", refused),
        ("503 without Retry-After", str(overload["without_retry_after"])),
        ("memory before, largest, after", ", ".join(f"{mb:.0f}" for mb in overload["rss_mb"].values()) + " MB"),
    ]
    return table(("", ""), rows)


def _besieged(attack: Mapping[str, Any]) -> dict[str, Any]:
    options = f", `{' '.join(attack['server'])}`" if attack["server"] else ""
    return {
        **attack,
        "options": options,
        "answers": counts(attack["answers"]),
        "wait_ms": 1000 * attack["worst_wait_s"],
    }


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
