"""What every runtime owes parity and the server, on a file of each kind in turn."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from common.files import sha256
from common.refusal import Refusal
from export.compare import compare
from export.graphs.graph import to_onnx
from export.runtimes.load import load_runtime
from fold.graph import fold
from serve.request.app import make_app
from serve.request.limits import Limits

PROVENANCE = {"training": {"dataset": "none"}}


def write_onnx(path, net, spec):
    path.write_bytes(to_onnx(net, spec, PROVENANCE).SerializeToString())


# What writes the file of each runtime. Engines are run in tests/gpu, where there is a device.
WRITERS = {
    ("onnxruntime", ".onnx"): write_onnx,
    ("mnn", ".onnx"): write_onnx,
    ("torch", ".onnx"): write_onnx,
}


@pytest.fixture(params=WRITERS, ids="".join)
def kind(request):
    return request.param


@pytest.fixture
def write(kind, make_net, make_spec, tmp_path):
    """`write(**fields)` gives a Dirac net and the path of its file for the runtime under test."""

    def make(**fields):
        net, path = make_net(**fields), tmp_path / f"plain{kind[1]}"
        WRITERS[kind](path, fold(net).float(), make_spec(**fields))
        return net, path

    return make


@pytest.fixture
def load(kind):
    """`load(path)` with the runtime under test."""
    return lambda path: load_runtime(path, name=kind[0])


@pytest.mark.parametrize("num_images", [1, 5])
@pytest.mark.parametrize(
    "fields", [{}, {"depth": 16, "nonlinearity": "relu"}, {"channels": 1, "size": 13}, {"family": "pooled", "size": 13}]
)
def test_it_answers_as_the_dirac_net(write, load, images, fields, num_images):
    net, path = write(**fields)
    pixels = images(num_images, fields.get("size", 8), fields.get("channels", 3))
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    logits = load(path)(pixels)
    assert logits.dtype == np.float32
    assert compare(("Dirac net", expected), ("runtime", logits))


def test_it_says_which_model_it_runs(write, load, make_spec):
    _, path = write()
    runtime = load(path)
    model = runtime.model
    assert (model.name, model.digest, model.spec) == ("DiracNet-10-0.25", sha256(path.read_bytes()), make_spec())
    assert model.provenance == PROVENANCE
    assert runtime.platform
    assert runtime.description


def test_a_file_that_is_cut_short_is_refused_in_one_line(write, load):
    _, path = write()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refusal) as refusal:
        load(path)
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_server_takes_it(write, load, images):
    net, path = write()
    pixels, file = images(1), io.BytesIO()
    Image.fromarray(pixels[0]).save(file, format="PNG")
    with TestClient(make_app(load(path), Limits())) as client:
        answer = client.post("/predict", content=file.getvalue(), headers={"Content-Type": "image/png"}).json()
    with torch.no_grad():
        assert answer["results"][0]["index"] == net(torch.from_numpy(pixels)).argmax()
