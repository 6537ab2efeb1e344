"""Which image is for training, validation and test: it follows from a file's name, and is recorded with the run."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_whole, sha256
from common.refusal import Refusal

FILE = "split.json"  # in the run's folder: names and sizes of a folder's images, by part
PARTS = ("train", "validation", "test")
TEST_SHARE = 0.2

Sizes = dict[str, int]  # bytes of a file, by its name below the data set's folder


class Changed(Refusal):
    """An image of the run is gone, or is another."""


class Unlike(Refusal):
    """Other images than those of the run."""


def picked_by_name(names: Sequence[str], targets: np.ndarray, share: float, *, purpose: str) -> np.ndarray:
    """bool [N]: the images of a part that takes about `share` of each class, by a hash of name and `purpose` alone.

    A class of two images or more gives at least one and keeps at least one; a class of one keeps it. Since
    another image's name does not matter, adding images makes no image of the rest one of the part,
    but for classes of one, and those all of whose hashes are below `share`.
    """
    digests = (
        hashlib.sha256(f"{purpose}:{unicodedata.normalize('NFC', name)}".encode(errors="surrogateescape"))
        for name in names  # the same for a name however its accents are composed
    )
    place = np.array([int.from_bytes(digest.digest()[:6]) / 2**48 for digest in digests])  # from 0 to below 1
    picked = place < share
    for target in np.unique(targets):
        of_class = np.flatnonzero(targets == target)
        if share == 0 or len(of_class) < 2:
            picked[of_class] = False
        elif not picked[of_class].any():
            picked[of_class[place[of_class].argmin()]] = True
        elif picked[of_class].all():
            picked[of_class[place[of_class].argmax()]] = False
    return picked


def read_record(path: Path, expected_sha256: str) -> dict[str, Sizes] | None:
    """The parts in a run's FILE; None where there is no such file, or it is another run's."""
    if not path.is_file():
        return None
    content = read_whole(path)
    return json.loads(content) if sha256(content) == expected_sha256 else None


def check_same(found: Mapping[str, Any], recorded: Mapping[str, Any], *, where: str) -> None:
    """Refuses images that are not those of the run: `found` and `recorded` are what `record` in datasets.py gives."""
    if found["sha256"] == recorded.get("sha256"):
        return
    then, now = (", ".join(f"{counts.get(part, 0)} {part}" for part in PARTS) for counts in (recorded, found))
    raise Unlike(
        f"{where} does not hold the images that the model was trained and tested on ({then}; found {now}): "
        f"name them as they were with --data-dir, or keep the run's {FILE} beside the model"
    )
