"""Classifiers as other people's exporters write them, each with images and what its own code answers to them."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import timm.data
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from timm.models._hub import save_config_for_hf
from timm.utils.onnx import onnx_export
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAID = ("--mean", *map(str, MEAN), "--std", *map(str, STD))
SIZE = 32


@dataclass(frozen=True)
class Sample:
    """A file, and the probabilities [4, 10] of its own code."""

    path: Path
    images: np.ndarray  # uint8 [4, H, W, 3]
    probabilities: np.ndarray


class Two(nn.Module):
    """Logits and the class."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return y, y.argmax(1)


class Entry(nn.Module):
    """A net behind the door of another exporter: channels last, or bytes that it normalizes by itself."""

    def __init__(self, body, *, normalizes):
        super().__init__()
        self.body, self.normalizes = body, normalizes
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        return self.body((x.float() / 255 - self.mean) / self.std if self.normalizes else x)


def net(*tail, seed=1):
    """Statistics and weights lie away from their initial values, and classes are far apart."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10), *tail,
    )  # fmt: skip
    with torch.no_grad():
        for norm in (made[1], made[4]):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
        made[8].weight.mul_(8)
    return made.eval()


def images():
    """Of different contrast, so that a batch's statistics are not those of each of its images."""
    noise = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3))
    return (noise * np.array([1.0, 0.7, 0.4, 0.1]).reshape(4, 1, 1, 1)).astype(np.uint8)


def inputs(make=None):
    """What a net takes for the images: normalized [N, C, H, W], or what `make` gives of pixels and normalized."""
    pixels = torch.from_numpy(images())
    normalized = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalized.permute(0, 3, 1, 2).contiguous() if make is None else make(pixels, normalized)


def softmax(y):
    return y.flatten(1).softmax(1)


@torch.no_grad()
def write(folder, name, model, *, x=None, read=softmax, dynamic=True, opset=17, training=False):
    """Through torch's first exporter."""
    pixels, x = images(), inputs(x)
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its deprecation and of its passes
        torch.onnx.export(
            model,
            (x if dynamic else x[:1],),
            path,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}} if dynamic else None,
            opset_version=opset,
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL,
            do_constant_folding=not training,
        )
    y = model.eval()(x)
    y = y[0] if isinstance(y, tuple) else y
    return Sample(path, pixels, read(y.float()).numpy())


@torch.no_grad()
def write_today(folder, name, model, *, x=None, read=softmax, own=None, static=False, **options):
    """Through torch's second exporter, which writes weights into NAME.onnx.data unless told otherwise.

    `own` is the net that gives its answer, where `model` itself computes too coarsely for that.
    """
    pixels, x = images(), inputs(x)
    path = folder / f"{name}.onnx"
    shapes = None if static else ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries of the exporter's use what is deprecated
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    y = own(x.float()).half() if own else model.eval()(x)
    y = y[0] if isinstance(y, tuple) else y
    return Sample(path, pixels, read(y.float()).numpy())


def write_today_in_half(folder):
    """Weights, input and output in float16; its own answer in float32 between them, which is how CPUs compute it.

    Its batch norms are folded before: the exporter folds them in float16, and rounds the weights a second time.
    """
    layers = list(net())
    folded = (fuse_conv_bn_eval(layers[0], layers[1]), layers[2], fuse_conv_bn_eval(layers[3], layers[4]), *layers[5:])
    half = nn.Sequential(*folded).eval().half()
    return write_today(folder, "today-half", half, x=in_half, own=copy.deepcopy(half).float(), opset_version=20)


def write_timm(folder):
    """As timm's tools write it: the graph by its exporter, config.json with labels and preprocessing beside it.

    Images are larger than the input, so that timm's own transform resizes and crops them.
    """
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model.fc.weight.mul_(20)
    path = folder / "timm.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(model, str(path), batch_size=2, dynamic_size=False, input_names=["x"], output_names=["y"])
    names = {index: f"name {index}" for index in range(10)}
    save_config_for_hf(model, str(folder / "config.json"), {"label_names": names})
    noise = np.random.default_rng(2).integers(0, 256, (4, 10, 10, 3), dtype=np.uint8)
    pixels = noise.repeat(20, 1).repeat(20, 2)  # 200x200
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        y = model(torch.stack([transform(Image.fromarray(image)) for image in pixels]))
    return Sample(path, pixels, softmax(y).numpy())


def write_half(folder):
    """The net in float16, and the same weights in float32 as its own answer, as CPUs compute it."""
    sample = write(folder, "half", net())
    model = onnx.load(sample.path)
    graph = model.graph
    first, last = graph.input[0], graph.output[0]
    graph.node.insert(0, helper.make_node("Cast", ["input"], ["input32"], to=TensorProto.FLOAT))
    for node in graph.node[1:]:
        node.input[:] = ["input32" if name == "input" else name for name in node.input]
    first.type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.node.append(helper.make_node("Cast", [last.name], ["half"], to=TensorProto.FLOAT16))
    last.name, last.type.tensor_type.elem_type = "half", TensorProto.FLOAT16
    onnx.save(model, sample.path)
    pixels = (torch.from_numpy(sample.images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        y = net()(pixels.permute(0, 3, 1, 2).half().float()).half().float()
    return Sample(sample.path, sample.images, softmax(y).numpy())


def write_external(folder):
    """Weights in a file of their own, as today's exporter writes them."""
    sample = write(folder, "external", net())
    split(sample.path)
    return sample


def write_opset_21(folder):
    sample = write(folder, "opset21", net(), opset=18)
    onnx.save(onnx.version_converter.convert_version(onnx.load(sample.path), 21), sample.path)
    return sample


def split(path):
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)


def write_with_nan(folder):
    sample = write(folder, "nan", net())
    model = onnx.load(sample.path)
    nan = helper.make_node("Constant", [], ["nan"], value=numpy_helper.from_array(np.float32(np.nan)))
    last = model.graph.node[-1].output[0]
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend([nan, helper.make_node("Add", ["before", "nan"], [last])])
    onnx.save(model, sample.path)
    return sample.path


def channels_last(pixels, normalized):
    return normalized


def raw(pixels, normalized):
    return pixels


def in_half(pixels, normalized):
    return inputs().half()


def as_it_is(y):
    return y


# By name; each is served as its own code answers.
SHEET = {
    "plain": lambda folder: write(folder, "plain", net()),
    "softmax": lambda folder: write(folder, "softmax", net(nn.Softmax(1)), read=as_it_is),
    "log-softmax": lambda folder: write(folder, "log-softmax", net(nn.LogSoftmax(1)), read=torch.exp),
    "sigmoid": lambda folder: write(folder, "sigmoid", net(nn.Sigmoid()), read=as_it_is),
    "static, opset 9": lambda folder: write(folder, "static", net(), dynamic=False, opset=9),
    "two outputs": lambda folder: write(folder, "two", Two(net()), opset=11),
    "not flattened": lambda folder: write(folder, "not-flattened", net(nn.Unflatten(1, (10, 1, 1)))),
    "channels last": lambda folder: write(folder, "last", Entry(net(), normalizes=False), x=channels_last),
    "bytes": lambda folder: write(folder, "bytes", Entry(net(), normalizes=True), x=raw),
    "half": write_half,
    "external data": write_external,
    "opset 21": write_opset_21,
    "today": lambda folder: write_today(folder, "today", net()),
    "today, static, opset 18, softmax": lambda folder: write_today(
        folder, "today-static", net(nn.Softmax(1)), read=as_it_is, static=True, opset_version=18
    ),
    "today, half, opset 20": write_today_in_half,
    "today, one file, opset 21, log-softmax": lambda folder: write_today(
        folder, "today-log", net(nn.LogSoftmax(1)), read=torch.exp, opset_version=21, external_data=False
    ),
    "today, channels last, two outputs": lambda folder: write_today(
        folder, "today-two", Two(Entry(net(), normalizes=False)), x=channels_last
    ),
    "today, bytes": lambda folder: write_today(folder, "today-bytes", Entry(net(), normalizes=True), x=raw),
    "timm": write_timm,
}
