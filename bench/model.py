"""python bench/model.py: the plain net against its Dirac net, in every runtime and beside other nets, on this CPU."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.model_rows import BASELINES, RACES, Row, gemm_rows, rows_of
from common.cli import given_arguments, run_command
from common.refusal import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from bench.model_nets import Entrant

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
        """With all that depends on the form filled in, but the rounds of each net."""
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
    from bench.page import write_page
    from common.progress import make_console

    console, typed = make_console(), " ".join(["python bench/model.py", given_arguments(replace(config, out=None))])
    config = config.resolved()
    path = config.out / "model.json"
    record = _read(path) if config.render or path.exists() else {"nets": {}}
    for key in () if config.render else config.nets:
        nets = record["nets"] | {key: {"command": typed.rstrip(), **_measure(key, config, console)}}
        record["nets"] = {name: nets[name] for name in RACES if name in nets}
        console.print(write_page(config.out, "model", markdown(record), record))
    if config.render:
        console.print(write_page(config.out, "model", markdown(record), record))
    return int(any(row["strays"] for net in record["nets"].values() for row in net["rows"]))


def _read(path: Path) -> dict[str, Any]:
    import json

    from common.files import read_whole

    try:
        return json.loads(read_whole(path))
    except ValueError as error:
        raise Refusal(f"{path} is no JSON: {error}; move it away, or name another folder with --out") from error


def _measure(key: str, config: ModelConfig, console: "Console") -> dict[str, Any]:
    """One net with all its rows: write its graphs, race, then profile the best of ONNX Runtime."""
    import tempfile

    from bench.model_nets import entrants, expected_logits, write_graphs
    from bench.page import describe_machine
    from common.progress import progress

    console.print(f"{key}: making its nets and graphs")
    nets = entrants(key)
    rows = [row for row in rows_of(key, name=nets[0].name) if _is_chosen(row, config)] + gemm_rows()
    num_rounds = config.rounds or RACES[key].rounds
    record = {
        "machine": describe_machine(*PACKAGES),
        "rounds": num_rounds,
        "round_s": config.round_s,
        "threads": list(config.threads),
        "batches": list(config.batches),
        "entrants": [net.to_dict() for net in nets],
        "rows": [_empty(row) for row in rows],
        "profiles": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), expected_logits(nets)
        files = {row.file for row in rows if row.file}
        with progress(console, f"{key}: graphs", len(files)) as advance:
            write_graphs(nets, files, folder, advance)
        steps = len(config.threads) * (len(rows) + len(config.batches) * num_rounds)
        with progress(console, f"{key}: race", steps) as advance:
            for num_threads in config.threads:
                race = _Race(nets, rows, record["rows"], folder, num_threads)
                race.run(expected, config.batches, num_rounds, config.round_s, advance)
        record["profiles"] = _profiles(record, rows, nets, folder)
    return record


class _Race:
    """The processes of all rows with one number of threads."""

    def __init__(
        self, nets: "list[Entrant]", rows: list[Row], records: list[dict[str, Any]], folder: Path, num_threads: int
    ) -> None:
        from bench.worker import Worker

        self._rows, self._records, self._key = rows, records, str(num_threads)
        image = nets[0].spec.image
        self._workers = [Worker(row.open, folder, image, num_threads=num_threads) for row in rows]

    def run(
        self, expected: dict[str, Any], batches: tuple[int, ...], num_rounds: int, round_s: float, advance: Any
    ) -> None:
        """Open, compare, time; fills the records."""
        from functools import partial

        from bench.rounds import Failure, alternate

        try:
            running = self._open(expected, advance)
            for size in batches:
                racers = {str(i): partial(self._workers[i].time, size, round_s) for i in running}
                for i, timing in alternate(racers, batch_size=size, num_rounds=num_rounds, advance=advance).items():
                    row = self._records[int(i)]
                    is_failed = isinstance(timing, Failure)
                    row["timings"][self._key][str(size)] = "failed" if is_failed else timing.to_dict()
                    if is_failed:
                        row["failed"] = timing.reason
                        running.remove(int(i))
            for i in running:
                self._records[i]["peak_bytes"][self._key] = self._workers[i].peak_bytes()
        finally:
            for worker in self._workers:
                worker.close()

    def _open(self, expected: dict[str, Any], advance: Any) -> list[int]:
        """Which rows can be raced; the others have their reason."""
        from bench.model_nets import NUM_COMPARED, judge_logits
        from bench.worker import WorkerFailed

        running = []
        for i, (row, record, worker) in enumerate(zip(self._rows, self._records, self._workers, strict=True)):
            record["timings"][self._key] = {}
            try:
                worker.wait_until_open()
                logits = worker.answer(NUM_COMPARED)
            except WorkerFailed as failure:
                record["failed"] = str(failure)
            else:
                if row.net in expected:
                    record |= judge_logits(row, expected[row.net], logits)
                running.append(i)
            advance(note=row.title)
        return running


def _profiles(record: dict[str, Any], rows: list[Row], nets: "list[Entrant]", folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime's own, of the fastest of its rows in either precision, for the extreme batches."""
    from bench.layer_profile import profile_graph
    from fold.image_sets import random_images

    profiles, num_threads = [], max(record["threads"])
    for precision in ("fp32", "int8"):
        for size in sorted({min(record["batches"]), max(record["batches"])}):
            raced = {}
            for row, measured in zip(rows, record["rows"], strict=True):
                timing = measured["timings"].get(str(num_threads), {}).get(str(size))
                is_ours = (row.net, row.precision) == (nets[0].name, precision)
                if is_ours and row.title.startswith("ONNX Runtime") and isinstance(timing, dict):
                    raced[row] = timing["median_ms"]
            if raced:
                best = min(raced, key=lambda row: raced[row])
                images = random_images(nets[0].spec.image, size)
                found = profile_graph(folder / best.file, images, num_threads=num_threads, folder=folder)
                title = f"{best.title}, {precision}"
                profiles.append({"title": title, "num_threads": num_threads, **found})
    return profiles


def _is_chosen(row: Row, config: ModelConfig) -> bool:
    """The rows that bars are stated against always run."""
    text = f"{row.net}, {row.title}, {row.precision}"
    return not config.rows or row.title in BASELINES or any(part in text for part in config.rows)


def _empty(row: Row) -> dict[str, Any]:
    return {
        "net": row.net,
        "title": row.title,
        "precision": row.precision,
        "failed": None,
        "error": None,
        "strays": False,
        "timings": {},
        "peak_bytes": {},
    }


if __name__ == "__main__":
    sys.exit(run_command(command, ModelConfig, examples=EXAMPLES))
