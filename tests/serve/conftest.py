import io

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from export.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from fold.plain import fold_net
from serve.app import make_app
from serve.limits import Limits


@pytest.fixture
def artefact(tmp_path, make_net, make_spec):
    """A real, small plain.onnx."""
    path = tmp_path / "plain.onnx"
    path.write_bytes(to_onnx(fold_net(make_net()), make_spec(), {"training": {}}).SerializeToString())
    return path


@pytest.fixture
def runtime(artefact):
    return OnnxSession(artefact)


@pytest.fixture
def client(runtime):
    limits = Limits(max_body_bytes=20_000, max_images=3, max_pixels=1_000_000)
    with TestClient(make_app(runtime, limits), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def pixels():
    """Five images [5, 8, 8, 3] that the net takes as they are."""
    return np.random.default_rng(5).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def encode():
    def encode(pixels, kind="PNG", **options):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=kind, **options)
        return file.getvalue()

    return encode
