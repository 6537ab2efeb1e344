"""Files that appear whole or not at all, and how they are read."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from common.refusal import Refusal


def write_whole(path: Path, content: bytes) -> Path:
    """Write `content` beside `path`, flush it to the disk, then rename it over `path`.

    An interrupted or failed write leaves the earlier file as it was. Refuses if the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            part.unlink()
    return path


def read_whole(path: Path) -> bytes:
    """The bytes of a file; refuses one that is missing or unreadable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror or error}") from error


def read_labels(path: Path) -> tuple[str, ...]:
    """One label per line; empty lines at the end do not count."""
    try:
        return tuple(line.strip() for line in read_whole(path).decode("utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not a text file in UTF-8; write one label a line") from error


def sha256(content: bytes) -> str:
    """The hex digest that names an artefact."""
    return hashlib.sha256(content).hexdigest()
