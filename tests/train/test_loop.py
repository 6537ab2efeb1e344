import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from common.progress import make_console
from common.refusal import Refusal
from train import trainer
from train.checkpoint import Checkpoint, load_checkpoint, load_net
from train.config import TrainConfig
from train.data import batches
from train.data.batches import Batch
from train.data.datasets import Dataset, DatasetInfo, Split
from train.families import build, initialize
from train.layers import DiracConv2d
from train.machine import World
from train.recipes import Recipe, recipe
from train.trainer import Trainer, evaluate, learning_rate, make_optimizer, train_step


def test_the_schedules():
    assert [learning_rate("cosine", 0.2, done) for done in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])
    wrn = [learning_rate("wrn", 0.1, epoch / 200) for epoch in (0, 59, 60, 119, 120, 159, 160)]
    assert wrn == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008])
    resnet = [learning_rate("resnet", 0.1, epoch / 100) for epoch in (0, 29, 30, 59, 60, 89, 90)]
    assert resnet == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001])
    assert [learning_rate("wrn", 1.0, done, warmup=0.1) for done in (0, 0.05, 0.1)] == pytest.approx([0, 0.5, 1])


def test_our_recipe_follows_the_number_of_images():
    few, some, many = (TrainConfig(dataset="folder").resolved(num) for num in (60, 1000, 50_000))
    assert (few.batch_size, few.epochs, few.warmup, few.lr) == (8, 100, 5, pytest.approx(0.2 / 4))
    assert (some.batch_size, some.epochs, some.erase, some.label_smoothing) == (16, 32, 0, 0)
    whole = TrainConfig(dataset="folder").resolved()
    assert asdict(many) == asdict(whole)
    assert (whole.batch_size, whole.epochs, whole.warmup, whole.lr) == (128, 30, 1, 0.2)
    assert TrainConfig(epochs=2).resolved(60).warmup == 0.5
    assert TrainConfig(epochs=2, warmup=1).resolved(60).warmup == 1


def test_the_first_step_of_a_warm_up_has_a_rate_even_where_an_epoch_is_one_step(make_spec, images):
    config = TrainConfig(epochs=4, warmup=2, lr=1.0, batch_size=4).resolved()
    spec, split = make_spec(), Split(images(4), np.arange(4))
    info = DatasetInfo(spec.image, spec.labels, flip=False, crop=0)
    dataset = Dataset(info, split, test=split, validation=split.take(np.arange(0)))
    trainer = Trainer(config, spec, dataset, World(), make_console(quiet=True))
    rates = [trainer.epoch()["lr"] for _ in range(4)]
    cosine = [(1 + math.cos(math.pi * middle / 4)) / 2 for middle in (0.5, 1.5, 2.5, 3.5)]
    assert rates == pytest.approx([0.25 * cosine[0], 0.75 * cosine[1], cosine[2], cosine[3]])


@pytest.fixture
def make_trainer(make_spec, images):
    """A trainer of a few images, of which four are held out."""

    def make(*, labels=None, **options):
        spec = make_spec()
        spec = replace(spec, labels=labels or spec.labels)
        split = Split(images(12), np.arange(12) % 10)
        dataset = Dataset(
            DatasetInfo(spec.image, spec.labels, flip=False, crop=0),
            train=split.take(np.arange(8)),
            test=split,
            validation=split.take(np.arange(8, 12)),
        )
        config = TrainConfig(epochs=3, lr=0.1, batch_size=4, **options).resolved()
        return Trainer(config, spec, dataset, World(), make_console(quiet=True))

    return make


def test_the_net_that_validation_judges_is_the_average(make_trainer):
    trained = make_trainer(ema=0.9)
    for _ in range(2):
        row = trained.epoch()
        average, raw = (evaluate(net, trained.held_out) for net in (trained.judged, trained.net))
        assert (row["validation_loss"], row["validation_accuracy"]) == (average.loss, average.accuracy)
        assert average.loss != raw.loss


def test_the_average_forgets_its_start_and_then_follows_slowly(make_trainer, monkeypatch):
    decays = []
    monkeypatch.setattr(trainer, "follow", lambda average, net, decay: decays.append(decay))
    trained = make_trainer(ema=0.3)
    for _ in range(3):
        trained.epoch()
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3])  # two steps an epoch


def test_a_saved_trainer_is_resumed_whole(make_trainer, tmp_path):
    saved, resumed = (make_trainer(ema=0.9, precision="fp16", out=tmp_path) for _ in range(2))
    for _ in range(2):
        saved.epoch()
    saved.scaler.load_state_dict(saved.scaler.state_dict() | {"scale": 1024.0})
    saved.save("checkpoint.pt")
    resumed.resume(load_checkpoint(tmp_path / "checkpoint.pt"))
    for part in ("net", "judged", "scaler"):
        before, after = (getattr(one, part).state_dict() for one in (saved, resumed))
        assert before.keys() == after.keys()
        assert all(
            torch.equal(*map(torch.as_tensor, pair)) for pair in zip(before.values(), after.values(), strict=True)
        )
    judged = load_net(load_checkpoint(tmp_path / "checkpoint.pt")).state_dict()  # what is tested and folded, too
    assert all(torch.equal(tensor, judged[name]) for name, tensor in saved.judged.state_dict().items())
    momenta = (one.optimizer.state_dict()["state"] for one in (saved, resumed))
    assert all(
        torch.equal(*(value["momentum_buffer"] for value in pair))
        for pair in zip(*map(dict.values, momenta), strict=True)
    )
    assert (resumed.history, resumed.epochs_done, resumed.steps_done) == (saved.history, 2, 0)


@pytest.mark.parametrize(
    ("scores", "since"),
    [
        ([], 0),
        ([(0.5, 1.0)], 0),
        ([(0.5, 1.0), (0.6, 2.0), (0.6, 1.5), (0.6, 1.8)], 1),  # of equal accuracies the smaller loss
        ([(0.6, 1.0), (0.6, 1.0), (0.5, 0.5)], 2),  # of equal epochs the earlier
        ([(None, None), (None, None)], 0),
    ],
)
def test_the_best_epoch_is_that_of_the_best_accuracy_and_then_loss(make_trainer, scores, since):
    trained = make_trainer()
    trained.history = [{"validation_accuracy": accuracy, "validation_loss": loss} for accuracy, loss in scores]
    assert trained.since_best() == since


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("labels", [None, tuple("abcdefghij")])
def test_fine_tuning_starts_net_and_average_from_the_same_layers(make_trainer, make_net, make_spec, ema, labels):
    learnt = make_net(seed=1).state_dict()
    trained = make_trainer(ema=ema, labels=labels)
    trained.fine_tune(Checkpoint.fresh(make_spec(), learnt, {}))
    for net in (trained.net, trained.judged):
        for name, tensor in net.state_dict().items():
            is_taken = labels is None or not name.startswith("fc.")
            assert torch.equal(tensor, learnt[name]) == is_taken, name


def test_balanced_epochs_draw_all_classes_equally_often_and_every_image_of_a_small_one():
    targets = np.repeat([0, 1, 2], [20, 5, 2])
    split = Split(np.zeros((27, 1, 1, 1), np.uint8), targets)
    drawn = batches._order(split, np.random.default_rng(0), balanced=True)
    assert np.bincount(targets[drawn]).tolist() == [9, 9, 9]
    assert set(drawn[targets[drawn] > 0]) == set(range(20, 27))
    assert sorted(batches._order(split, np.random.default_rng(0), balanced=False)) == list(range(27))


def test_mixed_targets_count_by_their_share(make_net, images):
    """Loss of a mixture: share of the one target's plus the rest of the other's."""
    pixels, targets, others = torch.from_numpy(images(4)), torch.arange(4), torch.arange(4).flip(0)
    sums = []
    for first, second, share in ((targets, None, 1.0), (others, None, 1.0), (targets, others, 0.3)):
        net = make_net()
        recipe = Recipe(lr=0.1, momentum=0, nesterov="no", weight_decay=0)
        optimizer = make_optimizer(net, recipe)
        batch = Batch(0, 0, pixels, first, second, share)
        sums.append(train_step(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, recipe))
    torch.testing.assert_close(sums[2], 0.3 * sums[0] + 0.7 * sums[1], rtol=1e-6, atol=0)


def test_the_average_follows_weights_and_statistics(make_net):
    average, net = make_net(seed=0), make_net(seed=1)
    net.stem.bn.num_batches_tracked.fill_(7)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    trainer.follow(average, net, 0.9)
    for name, tensor in average.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * net.state_dict()[name] if tensor.is_floating_point() else 7
        if name == "stem.bn.num_batches_tracked" or tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.as_tensor(expected), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_the_papers_recipe_and_what_is_given_instead():
    config = TrainConfig(recipe="paper", dataset="cifar10", epochs=3).resolved()
    assert (config.epochs, config.batch_size, config.lr, config.momentum, config.nesterov) == (3, 128, 0.1, 0.9, "no")
    assert (config.weight_decay, config.schedule, config.a0, config.b0, config.w_std) == (5e-4, "wrn", 5.0, 1e-3, 1.0)
    assert (config.start, config.validation, config.precision) == ("authors", 0.0, "fp32")
    ours = TrainConfig(dataset="cifar10").resolved()
    assert (ours.start, ours.validation, ours.precision) == ("pytorch", 0.1, "auto")
    given = TrainConfig(recipe="paper", start="pytorch", validation=0.2, precision="bf16").resolved()
    assert (given.start, given.validation, given.precision) == ("pytorch", 0.2, "bf16")
    imagenet = TrainConfig(recipe="paper", dataset="folder", family="imagenet", depth=18).resolved()
    assert (imagenet.epochs, imagenet.batch_size, imagenet.weight_decay) == (100, 256, 1e-4)
    assert (imagenet.schedule, imagenet.smallest_crop) == ("resnet", 0.08)
    zeros = TrainConfig(warmup=0.0, weight_decay=0.0, momentum=0.0).resolved()
    assert (zeros.warmup, zeros.weight_decay, zeros.momentum) == (0, 0, 0)


@pytest.mark.parametrize("name", ["ours", "paper"])
def test_a_recipe_leaves_nothing_open(name):
    for dataset, family in (("digits", "cifar"), ("cifar10", "cifar"), ("folder", "imagenet")):
        values = vars(recipe(name, family=family, dataset=dataset))
        open_before = {key for key, value in vars(TrainConfig()).items() if value is None}
        assert set(values) == open_before - {
            "dataset",
            "data_dir",
            "classes",
            "nonlinearity",
            "parameterization",
            "crop",
            "out",
            "init",
            "patience",
        }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"momentum": 1.0}, "--momentum must be at least 0 and below 1"),
        ({"label_smoothing": 1.5}, "--label-smoothing must be at least 0 and below 1"),
        ({"warmup": -1.0}, "--warmup must not be negative"),
        ({"smallest_crop": 0.0}, "--smallest-crop must be above 0"),
        ({"classes": 3}, "--classes requires --describe"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(Refusal, match=message):
        TrainConfig(**fields)


def test_initialize_sets_a_b_and_w(make_spec):
    torch.manual_seed(0)
    net = build(make_spec(width=2))
    initialize(net, a=2.0, b=0.5, std=0.03)
    for layer in net.modules():
        if isinstance(layer, DiracConv2d):
            assert (layer.a.item(), layer.b.item()) == (2.0, 0.5)
            assert layer.weight.std().item() == pytest.approx(0.03, rel=0.05)
    net = build(make_spec(parameterization="delta"))
    initialize(net, a=2.0, b=0.5, std=0.03)
    assert all(layer.a.item() == 1 for layer in net.modules() if isinstance(layer, DiracConv2d))


def test_the_authors_start_of_classifier_and_batch_normalisation(make_spec):
    """He's normal of fan-in, a bias of 0, γ uniform in [0, 1]; PyTorch's start is another."""
    nets = {}
    for name in ("pytorch", "authors"):
        torch.manual_seed(0)
        nets[name] = net = build(make_spec(width=4, num_labels=100))
        initialize(net, a=5.0, b=1e-3, std=1.0, start=name)
    fc, fan_in = nets["authors"].fc, nets["authors"].fc.in_features
    assert fc.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    assert fc.weight.abs().max() > 3 * fc.weight.std()  # no uniform distribution reaches that
    assert not fc.bias.any()
    gamma = torch.cat([layer.weight for layer in nets["authors"].modules() if isinstance(layer, nn.BatchNorm2d)])
    assert 0 <= gamma.min() < 0.01
    assert 0.99 < gamma.max() <= 1
    assert gamma.mean().item() == pytest.approx(0.5, abs=0.05)
    assert nets["pytorch"].fc.bias.any()
    assert all((layer.weight == 1).all() for layer in nets["pytorch"].modules() if isinstance(layer, nn.BatchNorm2d))


def test_weight_decay_reaches_everything_or_all_but_a_and_b(make_spec):
    net = build(make_spec())
    (everything,) = make_optimizer(net, Recipe()).param_groups
    assert (len(everything["params"]), everything["weight_decay"]) == (len(list(net.parameters())), 5e-4)
    decayed, free = make_optimizer(net, Recipe(), decay_ab=False).param_groups
    scales = {id(parameter) for name, parameter in net.named_parameters() if name.endswith((".a", ".b"))}
    assert {id(parameter) for parameter in free["params"]} == scales
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0)


def test_bf16_changes_a_step_by_no_more_than_its_precision(make_net, images):
    batch = Batch(0, 0, torch.from_numpy(images(16)), torch.arange(16) % 10)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = {}
    for precision in ("fp32", "bf16"):
        net = make_net()
        recipe = Recipe(lr=0.1, weight_decay=0, precision=precision)
        losses[precision] = train_step(net, make_optimizer(net, recipe), scaler, batch, recipe)
        assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    # 8 bits of mantissa, ten layers in a row.
    assert losses["bf16"][0] != losses["fp32"][0]
    torch.testing.assert_close(losses["bf16"][0], losses["fp32"][0], rtol=0.05, atol=0)


def test_a_step_divides_by_the_images_of_all_processes_and_an_empty_batch_changes_no_gradient(make_net, images):
    whole = Batch(0, 0, torch.from_numpy(images(4)), torch.arange(4))
    empty = Batch(0, 0, whole.images[:0], whole.targets[:0])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients, sums = [], []
    for batch, num_images in ((whole, None), (whole, 8.0), (empty, 2.0)):
        net = make_net()
        before = {name: tensor.clone() for name, tensor in net.named_buffers()}
        recipe = Recipe(lr=0.1, weight_decay=0)
        sums.append(train_step(net, make_optimizer(net, recipe), scaler, batch, recipe, num_images=num_images))
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert torch.equal(sums[0], sums[1])
    for one, half, none in zip(*gradients, strict=True):
        torch.testing.assert_close(half, one / 2)
        assert torch.equal(none, torch.zeros_like(none))
    assert sums[2].tolist() == [0, 0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.named_buffers())
