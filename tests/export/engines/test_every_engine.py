"""Each precision, lowering and family: the graph keeps its answers, and tensorrt_rtx builds it without a GPU."""

import pytest

from export.compare import TOLERANCES, compare
from export.eight_bits.calibrate import observe, ranges
from export.eight_bits.qdq import to_qdq_onnx
from export.eight_bits.quantize import answerer
from export.engines.engine import build_engine
from export.graphs.graph import to_onnx
from export.model_file.onnx_reader import read_graph
from fold.graph import fold
from fold.lower import distinct_lowerings, lower

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: its wheels are for Linux and Windows")
pytestmark = pytest.mark.slow

# Weights of random nets use eight bits worse than trained ones, and errors grow with depth: these catch a
# scale or a zero point that is wrong, which leaves an answer with nothing in common (an error of 1 and more).
EIGHT_BITS = {"int8": 0.5, "fp8": 0.6}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "fp8"])
def test_every_lowering_becomes_an_engine(make_net, make_spec, images, row, tmp_path, kind):
    spec, pixels = make_spec(**row), images(24, row.get("size", 8))
    plain = fold(make_net(**row)).float()
    expected = answerer(to_onnx(plain, spec, {}))(pixels)
    for lowering in distinct_lowerings(plain):
        floats = to_onnx(lower(plain, lowering), spec, {}, precision="fp16" if kind == "fp16" else "fp32")
        model = floats
        if kind in EIGHT_BITS:
            model = to_qdq_onnx(floats, ranges(observe(floats, pixels), "min-max"), precision=kind)
        assert read_graph("plain.onnx", model.SerializeToString()).precision == kind
        result = compare(("plain net", expected), (lowering, answerer(model)(pixels)), tolerance=TOLERANCES[kind])
        assert result if kind not in EIGHT_BITS else result.difference.rms < EIGHT_BITS[kind], (lowering, result)
        path = tmp_path / f"{lowering}.onnx"
        path.write_bytes(model.SerializeToString())
        engine = build_engine(path, batch=(1, 4, 16))
        assert len(engine.content) > 1000
        assert (engine.card.precision, engine.card.spec) == (kind, spec)
