"""Whether eight-bit products can leave 16 bits: what a file's weights allow, and what this processor does then.

Processors without VNNI multiply unsigned by signed bytes and add two products in 16 bits, with saturation. Which two is
the kernel's choice, so a filter is safe where no two of its weights can do it: 255 (w + v) within 16 bits.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from export.model_file.header import contents, every_field, unpack
from export.model_file.nodes import read_graph
from export.runtimes.offline import ort

LARGEST_PAIR = 128  # 255 · 128 = 32,640 fits in 16 bits, 255 · 129 does not

# Node → (position of its weights, axis of their filters).
_WEIGHTS = {
    "QLinearConv": (3, 0),
    "ConvInteger": (1, 0),
    "QLinearMatMul": (3, -1),
    "MatMulInteger": (1, -1),
}
_FLOATS = {"Conv": (1, 0), "MatMul": (1, -1)}  # which runtimes fuse with a DequantizeLinear before them
# Integer nodes that multiply no weights.
_HARMLESS = {
    "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSoftmax",
}  # fmt: skip

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5  # field numbers of onnx.proto
_INT8 = 3  # of TensorProto.DataType
# MatMulInteger of two inputs, "a" uint8 [1, 64] and "b" int8 [64, 16]; tests/export/test_saturation.py makes it.
_PROBE = bytes.fromhex(
    "080812003a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201705a130a0161120e0a0c080212080a02"
    "08010a0208405a130a0162120e0a0c080312080a0208400a02081062130a0179120e0a0c080612080a0208010a0208104204"
    "0a00100d"
)


def may_saturate(path: Path, content: bytes) -> list[str]:
    """The nodes of an ONNX file whose sums cannot be shown to stay in 16 bits; [] where all can.

    Read from the weights alone: what the metadata claims is not believed.
    """
    graph = read_graph(path, content)
    makers = {name: node for node in graph.nodes for name in node.outputs}
    stored: dict[str, np.ndarray | None] = {}
    suspects = []
    for node in graph.nodes:
        dequantized = None
        if node.kind in _FLOATS and len(node.inputs) > 1:
            maker = makers.get(node.inputs[_FLOATS[node.kind][0]])
            dequantized = maker.inputs[0] if maker and maker.kind == "DequantizeLinear" else None
        if node.kind in _WEIGHTS:
            at, axis = _WEIGHTS[node.kind]
            name = node.inputs[at] if len(node.inputs) > at else ""
        elif dequantized is not None:
            name, axis = dequantized, _FLOATS[node.kind][1]
        elif _is_integer(node.kind):
            name, axis = "", 0
        else:
            continue
        stored = stored or _eight_bit_weights(content)
        if not _is_safe(stored.get(name), axis):
            suspects.append(node.name or node.outputs[0])
    return suspects


def warning(path: Path, content: bytes) -> str | None:
    """What to say of a file whose answers this processor may compute wrongly; None where it cannot."""
    nodes = may_saturate(path, content)
    if not nodes or not saturates():
        return None
    return (
        f"{path.name} may be answered wrongly here: this processor adds eight-bit products in 16 bits, and "
        f"{len(nodes)} of its layers cannot be shown not to saturate, first {nodes[0]}; "
        "export it again with export/to_onnx.py --precision int8, or serve the fp32 form"
    )


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor's sum of 64 products 255 · 127 is too small: a layer of a millisecond tells."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(_PROBE, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)})[0]
    return bool((np.asarray(found) != 64 * 255 * 127).any())


def largest_pair(filters: np.ndarray) -> np.ndarray:
    """[N_o, N] → [N_o]: the largest magnitude of a sum of two weights of one sign, or of one where there is one."""
    if filters.shape[1] < 2:
        return np.abs(filters).max(axis=1)
    positive, negative = (np.partition(np.maximum(part, 0), -2, axis=1)[:, -2:].sum(1) for part in (filters, -filters))
    return np.maximum(positive, negative)


def _is_integer(kind: str) -> bool:
    """Whether a node may multiply eight-bit numbers in a way that is not known here."""
    return kind not in _HARMLESS and (kind.startswith(("QLinear", "QGemm", "QAttention")) or "Integer" in kind)


def _is_safe(weight: np.ndarray | None, axis: int) -> bool:
    """False for weights that are not int8 constants of the file: nothing is known of them."""
    if weight is None or weight.ndim < 2:
        return False
    filters = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.int64)
    return bool((largest_pair(filters) <= LARGEST_PAIR).all())


def _eight_bit_weights(content: bytes) -> dict[str, np.ndarray | None]:
    """The int8 constants by name, those stored in a way that is not known here as None."""
    found: dict[str, np.ndarray | None] = {}
    for graph in (value for number, value in contents(memoryview(content)) if number == _MODEL_GRAPH):
        for tensor in (value for number, value in contents(graph) if number == _GRAPH_INITIALIZER):
            try:
                name, weight = _int8_tensor(tensor)
            except (ValueError, IndexError):  # damaged: nothing is known of it
                continue
            found[name] = weight
    return found


def _int8_tensor(tensor: memoryview) -> tuple[str, np.ndarray | None]:
    dims, kind, name, raw = [], 0, "", None
    for number, value in every_field(tensor):
        match number, value:  # dims = 1, data_type = 2, name = 8, raw_data = 9
            case 1, int():
                dims.append(value)
            case 1, memoryview():  # all dimensions in one field
                dims += unpack(value)
            case 2, int():
                kind = value
            case 8, memoryview():
                name = str(value, "utf-8")
            case 9, memoryview():
                raw = value
    if kind != _INT8 or raw is None or not dims or len(raw) != int(np.prod(dims)):
        return name, None
    return name, np.frombuffer(raw, np.int8).reshape(dims)
