import socket

import pytest

from common.refusal import Refusal
from serve.demo import find_held_out, start


def test_files_of_every_readable_kind_are_shown_in_the_order_of_their_numbers(tmp_path):
    names = ("Kätzchen_0.JPG", "coffee cup_1.webp", "b_2.png", "a_10.gif", "a_9.bmp", "c_3.jpeg")
    for name in (*names, "notes_4.txt", "a_5.tif", "readme.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder_6.png").mkdir()
    found = [path.name for path in find_held_out(tmp_path)]
    assert found == ["Kätzchen_0.JPG", "coffee cup_1.webp", "b_2.png", "c_3.jpeg", "a_9.bmp", "a_10.gif"]


def test_a_folder_without_one_is_refused(tmp_path):
    (tmp_path / "notes_4.txt").write_bytes(b"")
    with pytest.raises(Refusal, match=r"no LABEL_NUMBER file in .* write some with"):
        find_held_out(tmp_path)


def test_another_server_on_the_port_is_not_taken_for_the_demos_own(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Refusal, match=rf"cannot listen on 127\.0\.0\.1 port {port}: address already in use"):
            start(tmp_path / "plain.onnx", port, f"http://127.0.0.1:{port}")
    assert [*tmp_path.iterdir()] == []
