import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto

from common.files import sha256
from common.refusal import Refusal
from export.runtimes import onnx_session
from export.runtimes.load import load_runtime
from export.runtimes.onnx_session import OnnxSession, loadable_providers


def test_an_artefact_of_ours_says_what_it_is(write_onnx, make_spec):
    _, path = write_onnx()
    model = OnnxSession(path).model
    assert (model.name, model.digest, model.spec) == ("DiracNet-10-0.25", sha256(path.read_bytes()), make_spec())
    assert model.provenance["training"] == {"dataset": "none"}


@pytest.mark.parametrize("shape", [("N", 3, 6, 5), ("N", 6, 5, 3), (4, 3, 6, 5), (1, 6, 5, 1)])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT16])
def test_a_foreign_net_answers_with_generic_labels(write_foreign, shape, kind):
    channels = shape[1] if shape[1] == 3 else shape[3]
    matrix = np.random.default_rng(0).normal(size=(channels, 4))
    runtime = load_runtime(write_foreign(shape, kind, matrix=matrix))
    assert runtime.model.name == "foreign"
    assert runtime.model.spec.labels == ("class 0", "class 1", "class 2", "class 3")
    assert (runtime.model.spec.image.height, runtime.model.spec.image.width) == (6, 5)
    images = np.random.default_rng(1).integers(0, 256, (7, 6, 5, channels), dtype=np.uint8)
    scale = 1 if kind == TensorProto.UINT8 else 255
    expected = images.reshape(7, 30, channels).mean(axis=1) / scale @ matrix
    tolerance = 2**-10 if kind == TensorProto.FLOAT16 else 1e-6
    np.testing.assert_allclose(runtime(images), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("shape", "kind", "num_classes", "message"),
    [
        (("N", 3, "H", "W"), TensorProto.FLOAT, 4, "export it with a fixed height, width and channels"),
        (("N", 3, 6, 5), TensorProto.DOUBLE, 4, "takes float64; images must be uint8"),
        (("N", 6, 5, 2), TensorProto.FLOAT, 4, "images have 1 or 3 channels"),
        (("N", 3, 6, 5), TensorProto.FLOAT, 1, "a classifier's is \\[N, K\\]"),
    ],
)
def test_a_foreign_net_that_is_no_image_classifier_is_refused(write_foreign, shape, kind, num_classes, message):
    with pytest.raises(Refusal, match=message):
        OnnxSession(write_foreign(shape, kind, num_classes))


def test_a_file_that_is_no_onnx_is_refused_in_one_line(tmp_path):
    (tmp_path / "plain.onnx").write_bytes(b"text")
    with pytest.raises(Refusal, match=r"is not a valid ONNX file") as refusal:
        load_runtime(tmp_path / "plain.onnx")
    assert "\n" not in str(refusal.value)
    with pytest.raises(Refusal, match="No such file"):
        load_runtime(tmp_path / "missing.onnx")
    with pytest.raises(Refusal, match=r"neither an \.onnx nor an \.engine"):
        load_runtime(tmp_path / "plain.pt")


def test_only_providers_that_load_are_asked_for_and_nothing_is_printed(write_onnx):
    assert loadable_providers()[-1] == "CPUExecutionProvider"
    _, path = write_onnx()
    program = f"from pathlib import Path; from export.runtimes.load import load_runtime as f; f(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_named_device_that_does_not_start_is_refused_not_served_on_the_cpu(monkeypatch, write_onnx):
    _, path = write_onnx()
    monkeypatch.setattr(onnx_session, "loadable_providers", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(onnx_session, "provider_options", lambda name, device: {})
    real = onnx_session.ort.InferenceSession

    def falls_back(content, options, providers):  # as ONNX Runtime does, after printing it
        return real(content, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnx_session.ort, "InferenceSession", falls_back)
    with pytest.raises(Refusal, match="CUDAExecutionProvider does not start here"):
        load_runtime(path, device=0)
    with pytest.raises(Refusal, match="CUDAExecutionProvider does not start here"):
        OnnxSession(path, providers=("CUDAExecutionProvider",))
    assert load_runtime(path).description == "ONNX Runtime, CPUExecutionProvider"  # nothing was named


def test_a_new_batch_size_starts_no_search_of_algorithms_and_fp32_is_no_tf32():
    options = onnx_session.provider_options("CUDAExecutionProvider", 1)
    assert options == {"device_id": "1", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def test_on_cuda_every_session_sees_batches_of_one_size_alone(monkeypatch, write_onnx, images):
    """With the CPU in the device's place: it plans convolutions anew for each other size."""
    _, path = write_onnx()
    expected, seen = OnnxSession(path)(images(11)), {}
    real = onnx_session.ort.InferenceSession

    class Played:
        def __init__(self, content, options, providers):
            self._session = real(content, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return ["CUDAExecutionProvider"]

        def run(self, outputs, feeds):
            (fed,) = feeds.values()
            seen.setdefault(id(self), []).append(len(fed))
            return self._session.run(outputs, feeds)

        def __getattr__(self, name):
            return getattr(self._session, name)

    monkeypatch.setattr(onnx_session.ort, "InferenceSession", Played)
    session = OnnxSession(path, providers=("CUDAExecutionProvider",))
    for num in (1, 8, 3, 11, 8, 5, 1, 4):
        np.testing.assert_allclose(session(images(11)[:num]), expected[:num], rtol=1e-4, atol=1e-5)
    assert sorted(map(tuple, seen.values())) == [(1, 1), (4, 4), (8, 8, 8), (16,)]
