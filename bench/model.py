"""python bench/model.py: the plain net against its Dirac net, in every runtime and beside other nets, on this CPU."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.model_rows import BASELINES, RACES, RaceRow, gemm_rows, rows_of
from common.cli import run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from bench.model_graphs import Entrant
    from bench.worker import Worker

PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "mnn", "numpy")
EXAMPLES = (
    "python bench/model.py                                   # all nets: writes docs/benchmarks/model.md and .json",
    "python bench/model.py --nets 34-2                       # this net again, the others stay in the record",
    "python bench/model.py --quick                           # one net, few rounds; writes runs/bench",
    "python bench/model.py --nets 16-1 --rows MNN OpenVINO --batches 1 --out runs/bench",
)


@dataclass(frozen=True)
class ModelConfig:
    nets: Annotated[tuple[str, ...], f"which of {', '.join(RACES)} (default: all; quick: 34-2)"] = ()
    threads: Annotated[tuple[int, ...], "numbers of threads (default: 1 2; quick: 2)"] = ()
    batches: Annotated[tuple[int, ...], "images per call (default: 1 8 32; quick: 1 32)"] = ()
    rows: Annotated[tuple[str, ...], "only rows whose title, net or precision contains one of these"] = ()
    rounds: Annotated[int | None, "rounds in which the rows take turns (default: 5, ImageNet 3; quick: 2)"] = None
    round_s: Annotated[float | None, "seconds of one row in one round (default: 0.1; quick: 0.05)"] = None
    quick: Annotated[bool, "the short form, under two minutes on two cores"] = False
    out: Annotated[Path | None, "folder for the page and its JSON (default: docs/benchmarks; quick: runs/bench)"] = None
    render: Annotated[bool, "measure nothing: write the page of the record in the folder again"] = False

    def __post_init__(self) -> None:
        if unknown := sorted({*self.nets} - {*RACES}):
            raise Refusal(f"--nets must be among {', '.join(RACES)}, got {', '.join(unknown)}")
        if min((*self.threads, *self.batches, 1)) < 1 or (self.rounds or 1) < 1 or (self.round_s or 1) <= 0:
            raise Refusal("--threads, --batches, --rounds and --round-s must be positive")

    def resolved(self) -> "ModelConfig":
        """With every default that depends on --quick filled in; --rounds stays open where it depends on the net."""
        quick = self.quick
        return replace(
            self,
            nets=self.nets or (("34-2",) if quick else tuple(RACES)),
            threads=self.threads or ((2,) if quick else (1, 2)),
            batches=self.batches or ((1, 32) if quick else (1, 8, 32)),
            rounds=self.rounds or (2 if quick else None),
            round_s=self.round_s or (0.05 if quick else 0.1),
            out=self.out or Path("runs/bench" if quick else "docs/benchmarks"),
        )


def command(config: ModelConfig) -> int:
    """Race every way to run a net on the CPU; judge the bars.

    Each row runs in a process of its own. A row that fails says why. After every net the record is
    written, so that an interrupted run goes on with --nets. Exit status 1 where a row in float32
    answers other logits than the plain net.
    """
    from bench.model_report import markdown
    from bench.page import typed_command, write_page
    from common.progress import make_console

    console, typed, config = make_console(), typed_command("bench/model.py", config), config.resolved()
    path = config.out / "model.json"
    record = _read(path) if config.render or path.exists() else {"nets": {}}
    for key in ("",) if config.render else config.nets:
        if key:
            nets = record["nets"] | {key: {"command": typed, **_measure(key, config, console)}}
            record["nets"] = {name: nets[name] for name in RACES if name in nets}
        console.print(write_page(config.out, "model", markdown(record), record))
    return int(any(row["strays"] for net in record["nets"].values() for row in net["rows"]))


def _read(path: Path) -> dict[str, Any]:
    import json

    from common.files import read_whole

    try:
        return json.loads(read_whole(path))
    except ValueError as error:
        raise Refusal(f"{path} is not valid JSON: {error}; move it away, or choose another --out") from error


def _measure(key: str, config: ModelConfig, console: "Console") -> dict[str, Any]:
    """One net with all its rows: write its graphs, race, then profile the best of ONNX Runtime."""
    import tempfile

    from bench.model_graphs import entrants, expected_logits, write_graphs
    from bench.page import describe_machine
    from common.progress import progress

    console.print(f"{key}: making its nets and graphs")
    nets = entrants(key)
    rows = [row for row in rows_of(key, name=nets[0].name) if _is_chosen(row, config)] + gemm_rows()
    config = replace(config, rounds=config.rounds or RACES[key].rounds)
    record = {
        "machine": describe_machine(*PACKAGES),
        "rounds": config.rounds,
        "round_s": config.round_s,
        "threads": list(config.threads),
        "batches": list(config.batches),
        "entrants": [net.to_dict() for net in nets],
        "rows": [_empty_record(row) for row in rows],
        "profiles": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), expected_logits(nets)
        files = {row.file for row in rows if row.file}
        with progress(console, f"{key}: graphs", len(files)) as advance:
            write_graphs(nets, files, folder, advance)
        steps = len(config.threads) * (len(rows) + len(config.batches) * config.rounds)
        with progress(console, f"{key}: race", steps) as advance:
            for num_threads in config.threads:
                _race(rows, record["rows"], expected, nets[0], folder, num_threads, config, advance)
        record["profiles"] = _profiles(record, rows, nets[0], folder)
    return record


def _race(
    rows: list[RaceRow],
    records: list[dict[str, Any]],
    expected: dict[str, Any],
    net: "Entrant",
    folder: Path,
    num_threads: int,
    config: ModelConfig,
    advance: Callable[..., None],
) -> None:
    """All rows with one number of threads: open, compare, time; fills the records."""
    from bench.rounds import Failure, alternate
    from bench.worker import Worker

    key = str(num_threads)
    workers = [Worker(row.open, folder, net.spec.image, num_threads=num_threads) for row in rows]
    try:
        running = {}
        for i, (row, record, worker) in enumerate(zip(rows, records, workers, strict=True)):
            record["timings"][key] = {}
            if _opens(row, record, worker, expected):
                running[i] = worker
            advance(note=row.title)
        for size in config.batches:
            racers = {i: partial(worker.time, size, config.round_s) for i, worker in running.items()}
            for i, timing in alternate(racers, batch_size=size, num_rounds=config.rounds, advance=advance).items():
                is_failed = isinstance(timing, Failure)
                records[i]["timings"][key][str(size)] = "failed" if is_failed else timing.to_dict()
                if is_failed:
                    records[i]["failed"] = timing.reason
                    del running[i]
        for i, worker in running.items():
            records[i]["peak_bytes"][key] = worker.peak_bytes()
    finally:
        for worker in workers:
            worker.close()


def _opens(row: RaceRow, record: dict[str, Any], worker: "Worker", expected: dict[str, Any]) -> bool:
    """Whether a row can be raced; its record gets the error of its logits, or the reason."""
    from bench.model_graphs import NUM_COMPARED, judge_logits
    from bench.worker import WorkerFailed

    try:
        worker.wait_until_open()
        logits = worker.answer(NUM_COMPARED)
    except WorkerFailed as failure:
        record["failed"] = str(failure)
        return False
    if row.net in expected:
        record |= judge_logits(row, expected[row.net], logits)
    return True


def _profiles(record: dict[str, Any], rows: list[RaceRow], net: "Entrant", folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime's own profiles of the fastest of its rows in either precision, for the extreme batches."""
    from bench.model_graphs import profile_graph
    from bench.model_report import timings
    from fold.image_sets import random_images

    profiles, num_threads = [], max(record["threads"])
    for precision in ("fp32", "int8"):
        for size in sorted({min(record["batches"]), max(record["batches"])}):
            raced = timings(record, net.name, precision, num_threads, size)
            raced = {title: timing for title, timing in raced.items() if title.startswith("ONNX Runtime")}
            if raced:
                best = min(raced, key=lambda title: raced[title].median_ms)
                (file,) = (
                    row.file for row in rows if (row.net, row.title, row.precision) == (net.name, best, precision)
                )
                images = random_images(net.spec.image, size)
                found = profile_graph(folder / file, images, num_threads=num_threads, folder=folder)
                profiles.append({"title": f"{best}, {precision}", "num_threads": num_threads, **found})
    return profiles


def _is_chosen(row: RaceRow, config: ModelConfig) -> bool:
    """The rows that bars are stated against always run."""
    text = f"{row.net}, {row.title}, {row.precision}"
    return not config.rows or row.title in BASELINES or any(part in text for part in config.rows)


def _empty_record(row: RaceRow) -> dict[str, Any]:
    names = {"net": row.net, "title": row.title, "precision": row.precision}
    return {**names, "failed": None, "error": None, "strays": False, "timings": {}, "peak_bytes": {}}


if __name__ == "__main__":
    sys.exit(run_command(command, ModelConfig, examples=EXAMPLES))
