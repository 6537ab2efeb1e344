"""Copies of a model's files: what is tried is what is loaded, and what served last can be loaded again."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.runtimes.card import card_path
from export.runtimes.described import descriptions
from export.runtimes.nodes import find_weights, read_graph
from train.files import read_whole, write_whole

_log = logging.getLogger(__name__)
_LATEST = "latest"  # holds the name of the folder that holds the model that served last


def files_of(path: Path) -> list[Path]:
    """The model, and all beside it that is read with it. Refuses a model that is missing or whose weights are."""
    content = read_whole(path)
    if path.suffix == ".engine":
        beside = [card_path(path)]
    else:
        beside = [*find_weights(path, read_graph(path, content)), *descriptions(path)]
    return [path, *(file for file in (*beside, path.with_suffix(".json")) if file.is_file())]


@contextmanager
def copied(path: Path, home: Path | None = None) -> Iterator[Path]:
    """The same model in a folder of its own, which ends with the context unless `keep` has taken it.

    The model itself where there is no room for a copy.
    """
    files, folder = files_of(path), None
    try:
        folder = Path(tempfile.mkdtemp(prefix="diracnet-model-", dir=home))
        for file in files:
            target = folder / file.relative_to(path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as error:
        _log.warning("%s is read where it is: there is no copy of it (%s)", path.name, error.strerror)
        yield path
    else:
        yield folder / path.name
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def keep(home: Path, copy: Path, digest: str) -> None:
    """From now on the model that served last is `copy`, which `copied` made in `home`."""
    if copy.parent.parent != home:
        return  # there is no copy
    with suppress(OSError):  # another worker has kept the same model
        copy.parent.rename(home / digest)
    write_whole(home / _LATEST, digest.encode())
    for folder in home.iterdir():
        if folder.is_dir() and not folder.name.startswith("diracnet-model-") and folder.name != digest:
            shutil.rmtree(folder, ignore_errors=True)


def kept(home: Path, name: str) -> Path | None:
    """The model `name` that served last, or None where none has."""
    latest = home / _LATEST
    if not latest.exists():
        return None
    path = home / latest.read_text() / name
    return path if path.exists() else None
