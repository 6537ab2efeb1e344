"""Every family and parameterization down the whole road: a step of training, fold, ONNX, one request."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from export.compare import compare
from export.engines.engine import build_engine
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from fold.plain import load_plain, save_plain
from fold.proof import prove
from serve.request.app import make_app
from serve.request.limits import Limits
from train.data.batches import Batch
from train.families import build, initialize
from train.recipes import Recipe
from train.trainer import make_optimizer, train_step


def a_step_of_training(spec, images):
    torch.manual_seed(0)
    net = build(spec)
    initialize(net, a=1.0, b=0.1, std=0.03)
    recipe = Recipe(lr=0.1)
    optimizer = make_optimizer(net, recipe)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    batch = Batch(0, 0, torch.from_numpy(images), torch.arange(len(images)) % len(spec.labels))
    assert torch.isfinite(train_step(net, optimizer, scaler, batch, recipe)).all()
    unmoved = [name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved
    return net.eval()


def test_the_whole_road(make_spec, images, row, tmp_path):
    spec, pixels = make_spec(**row), images(8, row.get("size", 8))
    net = a_step_of_training(spec, pixels)

    plain = fold(net)
    proof = prove(net, plain, {"random": torch.from_numpy(pixels)})
    assert proof, proof.failures()
    save_plain(tmp_path / "plain.safetensors", plain.float(), spec, {"training": {}})
    plain = load_plain(tmp_path / "plain.safetensors").net

    model = to_onnx(plain, spec, {"training": {}})
    (tmp_path / "plain.onnx").write_bytes(model.SerializeToString())
    runtime = OnnxSession(tmp_path / "plain.onnx")
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels)).numpy()
    parity = compare(("Dirac net", expected), ("ONNX Runtime", runtime(pixels)))
    assert parity, f"{parity}: export/graphs/graph.py, or the runtime"

    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, format="PNG")
    with TestClient(make_app(runtime, Limits())) as client:
        (result,) = client.post("/predict", content=file.getvalue(), headers={"Content-Type": "image/png"}).json()[
            "results"
        ]
    powers = np.exp(expected[0].astype(np.float64) - expected[0].max())
    assert result["index"] == expected[0].argmax()
    assert result["probability"] == pytest.approx(powers.max() / powers.sum(), rel=1e-4)


@pytest.mark.slow
def test_every_family_becomes_an_engine(make_net, make_spec, row, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
    path = tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold(make_net(**row)), make_spec(**row), {}).SerializeToString())
    engine = build_engine(path, batch=(1, 4, 16))
    assert len(engine.content) > 1000
    assert engine.card.spec == make_spec(**row)
