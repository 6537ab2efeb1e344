import numpy as np

from bench.confusion import ConfusionConfig, accuracy, command, confusion, draw
from train import data
from train.cli import run_command


def test_rows_are_truths_and_columns_are_answers():
    counts = confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy(counts) == "50.00 % right"
    (axes,) = draw(counts, ("cat", "dog", "eel", "fly"), "animals").axes
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert (shown[1, 0], shown[0, 2], shown[2, 0]) == ("1", "1", "")


def test_the_bundled_model_answers_what_it_is_given(monkeypatch, tmp_path, capsys):
    targets = np.array([9, 1])
    few = data.Split(np.zeros((2, 28, 28, 1), np.uint8), targets)
    loaded = []

    def load(name, **options):
        loaded.append(name)
        return data.Dataset(data.describe(name), few, few)

    monkeypatch.setattr(data, "load", load)
    out = tmp_path / "confusion.png"
    assert run_command(command, ConfusionConfig, argv=["--out", str(out)]) == 0
    assert loaded == ["fashion-mnist"]
    assert "DiracNet-16-2 on 2 test images of fashion-mnist" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_say_what_it_learnt_needs_a_data_set(tmp_path, capsys, make_net, make_spec):
    from export.graph import to_onnx
    from fold.plain import fold_net

    path = tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold_net(make_net()), make_spec(), {}).SerializeToString())
    assert run_command(command, ConfusionConfig, argv=[str(path)]) == 2
    assert "does not say what it was trained on: add --dataset" in capsys.readouterr().err
