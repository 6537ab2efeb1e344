import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_labels, read_whole, write_whole
from common.refusal import Refusal

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert read_whole(path) == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_labels_are_read_as_any_editor_saves_them(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffRöhre\r\n t-shirt \r\n\r\n".encode())
    assert read_labels(path) == ("Röhre", "t-shirt")


def test_a_disk_that_takes_no_more_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import resource, signal; from pathlib import Path; from common.files import write_whole\n"
        "from common.refusal import Refusal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: write_whole(Path({str(path)!r}), bytes(5000))\n"
        "except Refusal as refusal: print(refusal)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"cannot write {path}: File too large; nothing was changed\n"
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_missing_files_and_folders_in_the_way_are_refused(tmp_path):
    with pytest.raises(Refusal, match="No such file"):
        read_whole(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="nothing was changed"):
        write_whole(tmp_path / "file" / "below", b"")
