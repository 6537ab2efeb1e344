"""A model repository of Triton Inference Server: folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from common.files import read_whole, write_whole
from common.refusal import Refusal

Files = Mapping[str, bytes]  # path within a folder → content


def publish(folder: Path, version: int, *, model: Files, shared: Files) -> None:
    """Put the files `model` into the folder of a version, and the files `shared` by all versions beside it.

    Refuses a version that holds another model, and shared files other than those that earlier versions use.
    """
    target = folder / str(version)
    if target.exists():
        _refuse_another_model(target, model)
    versions = [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if {*versions} - {str(version)}:
        _refuse_other_shared_files(folder, shared)
    if not folder.exists():
        _write_folder(folder, {**shared, **{f"{version}/{name}": content for name, content in model.items()}})
        return
    for name, content in shared.items():
        write_whole(folder / name, content)
    if not target.exists():
        _write_folder(target, model)


def _refuse_another_model(target: Path, model: Files) -> None:
    """The same model has the same files with the same bytes."""
    held = {path.relative_to(target).as_posix(): read_whole(path) for path in target.rglob("*") if path.is_file()}
    if held != model:
        differing = sorted(name for name in {*held, *model} if held.get(name) != model.get(name))
        raise Refusal(
            f"{target} holds another model: {', '.join(differing)} differs; give a new --version, or remove that folder"
        )


def _refuse_other_shared_files(folder: Path, shared: Files) -> None:
    for name, content in shared.items():
        path = folder / name
        held = read_whole(path) if path.exists() else b""
        if held != content:
            lines = zip(held.decode(errors="replace").splitlines(), content.decode().splitlines(), strict=False)
            changes = (f"{old.strip()!r}, not {new.strip()!r}" for old, new in lines if old != new)
            first = next(changes, "shorter or longer")
            raise Refusal(f"{path} serves other versions too and says {first}; choose another --name for this model")


def _write_folder(target: Path, files: Files) -> None:
    """Write into a folder beside `target`, then rename it: a server that watches it never sees an incomplete one."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for name, content in files.items():
            write_whole(part / name, content)
        os.rename(part, target)
    except OSError as error:
        raise Refusal(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # renamed, or of no use
