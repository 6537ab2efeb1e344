"""train/run.py --init plain.safetensors: what begins with a plain file, goes on with it, and folds again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import run_command
from common.files import sha256
from common.spec import ImageSpec, Spec
from fold.graph import fold
from fold.plain import load_plain, save_plain
from fold.run import FoldConfig
from fold.run import command as fold_command
from train.checkpoint import load_checkpoint, load_net
from train.config import TrainConfig, like
from train.families import build
from train.fine_tune import from_plain
from train.run import command

DIGITS = Spec(
    "cifar", 10, 0.25, "ncrelu", ImageSpec(8, 8, 1, (0.305,), (0.376,), resize=8), tuple("0123456789")
)  # as train/run.py has them


def run(*argv):
    return run_command(command, TrainConfig, argv=[*map(str, argv)])


@pytest.fixture
def write_plain(tmp_path, make_net):
    """A plain.safetensors of a net for digits whose every number is away from its start: (net, path)."""

    def write(spec=DIGITS, name="plain.safetensors"):
        image = spec.image
        net = make_net(
            size=image.height,
            channels=image.channels,
            nonlinearity=spec.nonlinearity,
            parameterization=spec.parameterization,
            num_labels=len(spec.labels),
        )
        net.normalize = build(spec).normalize
        save_plain(tmp_path / name, fold(net).float(), spec, {"training": {"dataset": "digits"}})
        return net, tmp_path / name

    return write


@pytest.mark.slow
def test_a_plain_file_is_trained_on_and_folds_again(tmp_path, capsys):
    """The road twice: the second run begins where the first ended, and says of which file it is."""
    small = ["--depth", "10", "--width", "0.25", "--batch-size", "32"]
    assert run(*small, "--epochs", 3, "--out", tmp_path / "a") == 0
    assert run_command(fold_command, FoldConfig, argv=[str(tmp_path / "a")]) == 0
    plain = tmp_path / "a" / "plain.safetensors"
    first = load_checkpoint(tmp_path / "a" / "best.pt").test_accuracy
    capsys.readouterr()
    assert run("--init", plain, "--epochs", 2, "--lr", "0.01", "--out", tmp_path / "b", "--seed", 1) == 0
    said = capsys.readouterr().out
    assert f"{plain} is open again: the logits differ by" in said
    assert "on 64 random and 64 training images, and no class changes" in said
    assert "batch statistics are those of 1,280 training images" in said
    state = load_checkpoint(tmp_path / "b" / "best.pt")
    assert state.history[0]["train_accuracy"] > first - 0.03  # nothing was forgotten
    assert state.test_accuracy > first - 0.01
    record = state.training_record()
    assert record["init_sha256"] == sha256(plain.read_bytes())
    assert [(row["precision"], row["images"]) for row in record["unfold"]["logits"]] == [
        ("float64", "random"),
        ("float32", "random"),
        ("float64", "training"),
        ("float32", "training"),
    ]
    assert str(tmp_path) not in state.config["command"]
    assert run_command(fold_command, FoldConfig, argv=[str(tmp_path / "b")]) == 0
    again = load_plain(tmp_path / "b" / "plain.safetensors").provenance
    assert again["training"]["init_sha256"] == record["init_sha256"]
    assert again["training"]["unfold"] == record["unfold"]
    assert again["fold"]["checkpoint_sha256"] == state.sha256


@pytest.mark.slow
def test_before_the_first_step_the_net_is_that_of_the_file(tmp_path, write_plain):
    """Frozen and at a rate that changes nothing, with the same classes: the classifier came along too."""
    _, path = write_plain()
    argv = ["--init", path, "--epochs", 1, "--freeze", 1, "--lr", "1e-30", "--validation", 0]
    assert run(*argv, "--out", tmp_path / "run") == 0
    images = torch.randint(256, (40, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load_plain(path).net(images)
        after = load_net(load_checkpoint(tmp_path / "run" / "checkpoint.pt"))(images)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.slow
def test_other_classes_take_all_layers_but_the_last(tmp_path, photos, write_plain):
    image = ImageSpec(8, 8, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize=11)
    net, path = write_plain(replace(DIGITS, image=image))
    argv = ["--init", path, "--data-dir", photos, "--epochs", 1, "--freeze", 1]
    assert run(*argv, "--out", tmp_path / "run") == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (state.spec.labels, state.spec.image) == (("dark", "light"), image)
    tuned, images = (
        load_net(state),
        torch.from_numpy(np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)),
    )
    with torch.no_grad():
        before, after = (part[:-1](images) for part in (net, tuned))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.slow
def test_training_for_eight_bits_computes_in_float32_and_is_recorded(tmp_path, write_plain):
    _, path = write_plain()
    argv = ["--init", path, "--epochs", 1, "--lr", "0.001", "--precision"]
    assert run(*argv, "auto", "--qat", "--out", tmp_path / "rounded") == 0
    assert run(*argv, "fp32", "--out", tmp_path / "float") == 0
    rounded, floats = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("rounded", "float"))
    assert rounded.config["precision"] == "fp32"
    assert rounded.training_record()["qat"] is True
    assert rounded.model.keys() == floats.model.keys()
    assert rounded.history[0]["train_loss"] != floats.history[0]["train_loss"]


def test_files_that_are_not_the_plain_net_of_a_family_are_refused(tmp_path, write_plain, capsys):
    net, path = write_plain()
    content = path.read_bytes()
    for damaged in (b"", content[:-9], b"hello" * 99):
        path.write_bytes(damaged)
        assert run("--init", path, "--out", tmp_path / "run") == 2
        assert "is not a valid safetensors file" in capsys.readouterr().err
    plain = fold(net).float()
    plain.graph["fc"].tensors["bias"][0] = float("nan")
    save_plain(path, plain, DIGITS, {})
    assert run("--init", path, "--out", tmp_path / "run") == 2
    assert "holds NaN or infinite values in fc.bias" in capsys.readouterr().err
    save_plain(path, fold(net).float(), replace(DIGITS, depth=16), {})
    assert run("--init", path, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert (
        f"{path}: the plain file does not fit its spec DiracNet-16-0.25: group0.block2.conv.weight is missing" in error
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_graph_of_somebodys_own_net_is_refused(tmp_path, capsys):
    spec = Spec.of_net("theirs", DIGITS.image, DIGITS.labels)
    net = torch.nn.Sequential(build(DIGITS).normalize, torch.nn.Flatten(), torch.nn.Linear(64, 10))
    save_plain(tmp_path / "own.safetensors", fold(net.eval(), torch.zeros(2, 8, 8, 1, dtype=torch.uint8)), spec, {})
    assert run("--init", tmp_path / "own.safetensors", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "holds theirs as a graph, and training builds nets of its own families alone" in error
    assert error.count("\n") == 1


def test_other_images_another_net_and_a_start_of_zero_are_refused(tmp_path, write_plain, capsys):
    _, path = write_plain()
    for argv, message in (
        (["--dataset", "fashion-mnist"], "fashion-mnist has images of shape (28, 28, 1), the net takes (8, 8, 1)"),
        (["--depth", "34"], "the net of --init has --depth 10: leave out --depth 34"),
        (["--a0", "0"], "a plain file is opened with --a0 and --w-std above 0, got 0"),
    ):
        assert run("--init", path, *argv, "--out", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_wide_residual_net_is_not_trained_for_eight_bits(write_plain, make_spec):
    source = from_plain.PlainFile(
        None, {}, make_spec(family="wrn", nonlinearity="relu", parameterization="plain"), {}, ""
    )
    with pytest.raises(from_plain.Refusal, match="--qat trains chains of layers"):
        like(TrainConfig(init="plain.safetensors", qat=True), source)


def test_describe_says_what_a_plain_file_would_train(write_plain, capsys):
    net, path = write_plain()
    assert run("--describe", "--init", path) == 0
    num = sum(parameter.numel() for parameter in net.parameters())
    said = f"DiracNet-10-0.25, ncrelu, dirac, 8x8x1 images, 10 classes: {num:,} parameters"
    assert said in capsys.readouterr().out


def test_a_net_that_is_not_the_same_is_not_trained(tmp_path, write_plain, monkeypatch, capsys):
    """The proof is of the net as it would be trained, after its statistics were measured."""
    _, path = write_plain()

    def wrong(net, moments):
        net.get_submodule("stem.bn").bias.data += 1e-6

    monkeypatch.setattr(from_plain, "standardize", wrong)
    assert run("--init", path, "--out", tmp_path / "run") == 2
    assert "cannot be opened exactly: float64 logits on random images differ by" in capsys.readouterr().err
