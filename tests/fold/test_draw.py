import pytest
import reference
from PIL import Image

from common.cli import run_command
from fold.draw import DrawConfig, central_slices, command
from train.checkpoint import Checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path, make_net, make_spec):
    """`checkpoint(**fields)` gives the path of a small net's checkpoint."""

    def make(**fields):
        state = Checkpoint.fresh(make_spec(**fields), make_net(**fields).state_dict(), {}, epoch=1)
        save_checkpoint(tmp_path / "checkpoint.pt", state)
        return tmp_path / "checkpoint.pt"

    return make


@pytest.mark.parametrize("parameterization", ["dirac", "per-channel", "unnormalized", "delta"])
def test_slices_are_the_terms_of_equation_4(make_net, parameterization):
    layer = make_net(nonlinearity="relu", parameterization=parameterization).group1.block0.conv
    skip, learned, whole = (part.double().numpy() for part in central_slices(layer))
    a, b = (None if part is None else part.detach().numpy() for part in (layer.a, layer.b))
    weight = layer.weight.detach().double().numpy()
    expected = reference.folded_weight(a, b, weight)[:, :, 1, 1]
    assert whole == pytest.approx(expected, abs=1e-6)
    assert skip + learned == pytest.approx(whole, abs=1e-6)
    assert skip == pytest.approx(expected - reference.folded_weight(0, b, weight)[:, :, 1, 1], abs=1e-6)


@pytest.mark.slow
def test_the_picture_has_a_row_for_each_layer(checkpoint, tmp_path, capsys):
    path = checkpoint()
    assert run_command(command, DrawConfig, argv=[str(path)]) == 0
    assert "group0.block0.conv, group1.block1.conv, group2.block1.conv" in capsys.readouterr().out
    one = tmp_path / "one.png"
    argv = [str(path), "--layers", "group1.block1.conv", "--out", str(one), "--channels", "4"]
    assert run_command(command, DrawConfig, argv=argv) == 0
    with Image.open(path.with_name("fold.png")) as three_rows, Image.open(one) as one_row:
        assert three_rows.height == 3 * one_row.height


def test_what_cannot_be_drawn_is_refused(checkpoint, capsys):
    assert run_command(command, DrawConfig, argv=[str(checkpoint()), "--layers", "stem.conv"]) == 2
    assert "no Dirac convolution is called stem.conv; there are group0.block0.conv" in capsys.readouterr().err
    assert run_command(command, DrawConfig, argv=[str(checkpoint(parameterization="plain"))]) == 2
    assert "has no Dirac convolution to draw" in capsys.readouterr().err
