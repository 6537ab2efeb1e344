"""A choice that was measured, kept beside the model: plain.onnx.runtime.json."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.cores import num_cores
from common.files import write_whole
from common.refusal import Refusal
from export.runtimes.load import RuntimeName

FORMAT = "diracnet-runtime-2"  # another number where a runtime computes in another way
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "MNN", "numpy", "torch")


@dataclass(frozen=True)
class Conditions:
    """Everything that can change which candidate is fastest; under others it is measured again."""

    candidates: list[list[str]]  # digest of the file, and the runtime's name
    versions: dict[str, str]  # of the packages that compute
    processor: str
    num_cores: int
    num_threads: int  # of one worker's model
    devices: list[int]
    max_batch: int

    @classmethod
    def here(
        cls, candidates: Sequence[tuple[str, str]], *, devices: Sequence[int], num_threads: int, max_batch: int
    ) -> "Conditions":
        return cls(
            [list(candidate) for candidate in candidates],
            _versions(),
            _processor(),
            num_cores(),
            num_threads,
            list(devices),
            max_batch,
        )


@dataclass(frozen=True)
class Kept:
    digest: str
    runtime: RuntimeName
    reason: str


def record_path(model: Path) -> Path:
    return model.with_name(model.name + ".runtime.json")


def recall(model: Path, conditions: Conditions) -> Kept | None:
    """What was chosen under the same conditions; None where nothing readable says so."""
    path = record_path(model)
    try:
        record: Any = json.loads(path.read_bytes())
        if record["format"] != FORMAT or record["conditions"] != asdict(conditions):
            return None
        if record["chosen"] not in conditions.candidates:
            return None
        digest, runtime = record["chosen"]
        return Kept(digest, runtime, f"{record['reason']}, as {path} says")
    except (OSError, ValueError, KeyError, TypeError):  # missing, unreadable, damaged or somebody else's
        return None


def remember(model: Path, conditions: Conditions, digest: str, runtime: RuntimeName, reason: str) -> str:
    """Keep the choice; the reason with what became of it. A folder that takes no file costs the next start a second."""
    record = {"format": FORMAT, "chosen": [digest, runtime], "reason": reason, "conditions": asdict(conditions)}
    try:
        path = write_whole(record_path(model), (json.dumps(record, indent=1) + "\n").encode())
    except Refusal as refusal:
        return f"{reason}, not kept: {refusal}"
    return f"{reason}, kept in {path}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
