import pytest

from common.refusal import Refusal
from train.data.folder import JUNK_REASON, find_images


def test_images_are_found_in_order_at_any_depth_and_the_rest_is_said(tmp_path):
    for name in ("b/2.JPG", "b/deeper/1.png", "a/ä 1.webp", "top.bmp", ".hidden.png", "__MACOSX/x.png", "b/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found, left_out = find_images([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "top.bmp", "a/ä 1.webp", "b/2.JPG", "b/deeper/1.png",
    ]  # fmt: skip
    reasons = {stranger.path.relative_to(tmp_path).as_posix(): stranger.why for stranger in left_out}
    assert reasons.pop("b/loop") == "a link to a folder"
    assert reasons.pop("b/notes.md").startswith("not one of .png")
    assert reasons == {".hidden.png": JUNK_REASON, "__MACOSX": JUNK_REASON}


def test_a_file_that_is_named_is_taken_whatever_it_is_called_and_once(tmp_path):
    (tmp_path / "photo.dat").touch()
    (tmp_path / "a.png").touch()
    found, left_out = find_images([tmp_path / "photo.dat", tmp_path / "a.png", tmp_path])
    assert found == [tmp_path / "photo.dat", tmp_path / "a.png"]
    assert left_out == []


def test_what_is_not_there_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert find_images([tmp_path / "dangling.png"])[0] == [tmp_path / "dangling.png"]  # it is named when it is read
    with pytest.raises(Refusal, match=r"x, .*y are not there"):
        find_images([tmp_path / "x", tmp_path / "y", tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match=r"no \.png, .* images in .*empty"):
        find_images([tmp_path / "empty"])
