import socket

import pytest

from common.refusal import Refusal
from serve.demo import _show, find_held_out, start
from serve.request.access import KEY_VARIABLE, Access
from serve.request.app import make_app
from serve.request.limits import Limits


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


@pytest.mark.parametrize("key", ["", "secret"])
def test_images_are_shown_to_a_server_that_asks_for_the_key_of_the_environment(
    live, runtime, pixels, encode, tmp_path, monkeypatch, capsys, key
):
    monkeypatch.setenv(KEY_VARIABLE, key)
    best = runtime.model.spec.labels[runtime(pixels[:1]).argmax()]
    (tmp_path / f"{best}_1.png").write_bytes(encode(pixels[0]))
    with live(make_app(runtime, Limits(), access=Access(key.encode() or None))) as url:
        assert _show(url, tmp_path / f"{best}_1.png")
    assert "✓" in capsys.readouterr().out
