"""Copies of a model's files, so that the files tried are those loaded, and those that served last stay available."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from common.files import read_whole, write_whole
from export.model_file.engine_card import card_path
from export.model_file.onnx_reader import find_weights, read_graph
from export.model_file.reading import descriptions

_log = logging.getLogger(__name__)
_LATEST = "latest"  # holds the folder name of the model that served last


def files_of(path: Path) -> list[Path]:
    """The model and the files that are read with it. Refuses missing models and weights."""
    content = read_whole(path)
    if path.suffix == ".engine":
        beside = [card_path(path)]
    else:
        beside = [*find_weights(path, read_graph(path, content)), *descriptions(path)]
    return [path, *(file for file in (*beside, path.with_suffix(".json")) if file.is_file())]


@contextmanager
def copied(paths: Sequence[Path], home: Path | None = None) -> Iterator[tuple[Path, ...]]:
    """The same model in a folder that is deleted at the end of the context, unless `keep` has renamed it.

    `paths` themselves if there is no room for a copy.
    """
    of_each = [files_of(path) for path in paths]
    with ExitStack() as held:
        try:  # such a folder is deleted too if the process ends before the context does
            made = tempfile.TemporaryDirectory(prefix="diracnet-model-", dir=home, ignore_cleanup_errors=True)
            folder = Path(held.enter_context(made))
            for index, (path, files) in enumerate(zip(paths, of_each, strict=True)):
                for file in files:
                    target = folder / str(index) / file.relative_to(path.parent)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
        except OSError as error:
            names = " and ".join(path.name for path in paths)
            _log.warning("%s is read in place, because it cannot be copied (%s)", names, error.strerror)
            yield tuple(paths)
        else:
            yield _places(folder, paths)


def keep(home: Path, copies: Sequence[Path], digest: str) -> None:
    """Record `copies`, which `copied` made in `home`, as the model that served last."""
    folder = copies[0].parent.parent
    if folder.parent != home:
        return  # read in place
    with suppress(OSError):  # another worker has done it
        folder.rename(home / digest)
    write_whole(home / _LATEST, digest.encode())
    for folder in home.iterdir():
        if folder.is_dir() and not folder.name.startswith("diracnet-model-") and folder.name != digest:
            shutil.rmtree(folder, ignore_errors=True)


def kept(home: Path, paths: Sequence[Path]) -> tuple[Path, ...] | None:
    """The copy of `paths` that served last, or None."""
    latest = home / _LATEST
    if not latest.exists():
        return None
    places = _places(home / latest.read_text(), paths)
    return places if all(place.exists() for place in places) else None


def _places(folder: Path, paths: Sequence[Path]) -> tuple[Path, ...]:
    """The copies of `paths`, each in its own folder because names may be equal."""
    return tuple(folder / str(index) / path.name for index, path in enumerate(paths))
