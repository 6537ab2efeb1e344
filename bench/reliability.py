"""python bench/reliability.py: overload, SIGTERM, SIGHUP, kill -9 and attacks, on this machine alone."""

import json
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.lab.page import bars_table, describe_machine, render, report_missed, typed_command
from bench.lab.server import IMAGE, MODEL, ROOT
from common.cli import POSITIONAL, run_command
from common.files import read_whole, write_whole
from common.progress import make_console, progress
from common.refusal import Refusal

if TYPE_CHECKING:
    from bench.servers.faults import Subject

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
    model: Annotated[Path, "plain.onnx to serve", POSITIONAL] = MODEL
    image: Annotated[Path, "the image to send"] = IMAGE
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
    path = config.out / "benchmarks" / "reliability.json"
    if config.render:
        record = json.loads(read_whole(config.render))
    else:
        record = _measure(config, json.loads(read_whole(path)) if config.only else {"alone": {}})
        content = json.dumps(record, indent=1) + "\n"
        print(f"wrote {write_whole(path, content.encode())}")
    print(f"wrote {write_whole(config.out / 'reliability.md', page(record).encode())}")
    return report_missed(record, config.only or TITLES)


def _measure(config: ReliabilityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the chosen parts measured anew; it says which of them were measured alone."""
    import uvloop

    from bench.servers import attacks, faults

    seconds, rounds, reloads = (3.0, 1, 4) if config.quick else (config.seconds, config.rounds, config.reloads)
    about = {
        "command": typed_command("bench/reliability.py", config),
        "machine": describe_machine("onnxruntime-gpu", "onnxruntime", "uvicorn"),
    }
    with tempfile.TemporaryDirectory() as folder:
        subject = _subject(config, Path(folder))
        strangers = attacks.siege_attacks(quick=config.quick)
        parts: dict[str, Callable[[], Coroutine[Any, Any, dict[str, Any]]]] = {
            "overload": lambda: faults.overload(subject, seconds=seconds),
            "reload": lambda: faults.reload(subject, Path(folder), times=reloads),
            "drain": lambda: faults.drain(subject),
            "kill": lambda: faults.kill(subject),
            "attacks": lambda: attacks.attack(config.model),
            "siege": lambda: attacks.siege(subject, strangers),
        }
        turns = [name for name in parts if name in (config.only or parts)]
        turns = [name for name in turns for _ in range(rounds if name in ("drain", "kill") else 1)]
        measured: dict[str, Any] = {name: [] for name in turns}
        with progress(make_console(), "reliability", len(turns)) as advance:
            for name in turns:
                measured[name].append(uvloop.run(parts[name]()))
                advance(1, name)
    if not config.only:
        return {**about, "model": config.model.name, **record, **measured}
    return {**record, **measured, "alone": {**record["alone"], **dict.fromkeys(measured, about)}}


def _subject(config: ReliabilityConfig, folder: Path) -> "Subject":
    """The model and one of the same architecture with random weights, and their outputs for the image."""
    from bench.nets import random_net
    from bench.servers.faults import Subject
    from common.image import decode
    from export.graphs.graph import to_onnx
    from export.runtimes.onnx_session import OnnxSession
    from export.runtimes.probabilities import softmax
    from fold.plain import fold_net
    from serve.v2.routes import model_name

    session, image = OnnxSession(config.model), read_whole(config.image)
    spec = session.model.spec
    net = fold_net(random_net(spec)).float()
    other = write_whole(folder / "other.onnx", to_onnx(net, spec, {}).SerializeToString())
    pixels = decode(image, spec.image)[None]
    expected = {
        one.model.digest: softmax(one(pixels), temperature=spec.temperature)[0] for one in (session, OnnxSession(other))
    }
    return Subject(config.model, other, image, model_name(session.model), expected)


def page(record: Mapping[str, Any]) -> str:
    """The page of one record."""
    return render("reliability", record, bars=bars_table(TITLES, record))


if __name__ == "__main__":
    sys.exit(run_command(command, ReliabilityConfig, examples=EXAMPLES))
