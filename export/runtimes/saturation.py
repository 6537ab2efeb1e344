"""Whether eight-bit products can overflow 16 bits: by a file's weights, and on this processor.

Processors without VNNI multiply unsigned by signed bytes and add two products in 16 bits, with saturation. The
kernel chooses which two, so a filter is safe if no two of its weights can do it: 255 (w + v) within 16 bits.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from export.model_file.onnx_reader import PASSES_ON, Node, read_graph, read_int8_constants
from export.runtimes.onnx_session import quiet_session

LARGEST_PAIR = 128  # 255 · 128 = 32,640 fits in 16 bits, 255 · 129 does not

# Node → (position of its weights, axis of their filters).
_INTEGER_PRODUCTS = {
    "QLinearConv": (3, 0), "ConvInteger": (1, 0),
    "QLinearMatMul": (3, -1), "MatMulInteger": (1, -1), "DynamicQuantizeMatMul": (1, -1),
}  # fmt: skip
# Runtimes fuse these with a DequantizeLinear before their second input, also where nodes of PASSES_ON lie between.
_FLOAT_PRODUCTS = {"Conv": 0, "MatMul": -1, "Gemm": -1}
# Integer nodes that multiply no weights.
_HARMLESS = {
    "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSoftmax",
}  # fmt: skip

# MatMulInteger of "a" uint8 [1, 64] and "b" int8 [64, 16]; tests/export/runtimes/test_saturation.py makes it.
_PROBE = bytes.fromhex(
    "080812003a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201705a130a0161120e0a0c080212080a02"
    "08010a0208405a130a0162120e0a0c080312080a0208400a02081062130a0179120e0a0c080612080a0208010a0208104204"
    "0a00100d"
)


def may_saturate(path: Path, content: bytes) -> list[str]:
    """The nodes of an ONNX file whose sums cannot be shown to stay in 16 bits; [] if all can.

    Computed from the weights alone; claims in the metadata are ignored.
    """
    graph, constants = read_graph(path, content), read_int8_constants(content)
    makers = {name: node for node in graph.nodes for name in node.outputs}
    return [node.name or node.outputs[0] for node in graph.nodes if _may_saturate(node, makers, constants)]


def _may_saturate(node: Node, makers: dict[str, Node], constants: dict[str, np.ndarray | None]) -> bool:
    if node.kind in _INTEGER_PRODUCTS:
        at, axis = _INTEGER_PRODUCTS[node.kind]
        name = node.inputs[at] if len(node.inputs) > at else ""
    elif node.kind in _FLOAT_PRODUCTS:
        axis = 0 if node.numbers.get("transB") else _FLOAT_PRODUCTS[node.kind]
        name, maker = "", makers.get(node.inputs[1]) if len(node.inputs) > 1 else None
        for _ in makers:  # no more steps than nodes: a damaged graph may be a circle
            name = next(iter(maker.inputs), "") if maker else ""
            if maker is None or maker.kind not in PASSES_ON:
                break
            maker, axis = makers.get(name), None
        if maker is None or maker.kind != "DequantizeLinear":
            return False
    else:  # how other integer nodes multiply is unknown
        is_integer = node.kind.startswith(("QLinear", "QGemm", "QAttention")) or "Integer" in node.kind
        return is_integer and node.kind not in _HARMLESS
    weight = constants.get(name)
    if weight is None or weight.ndim < 2:  # nothing is known about weights that are not int8 constants of the file
        return True
    # Without an axis, because it was transposed or reshaped, any two of its weights may be in one filter.
    filters = weight[None] if axis is None else np.moveaxis(weight, axis, 0)
    filters = filters.reshape(len(filters), -1).astype(np.int64)
    return bool((largest_pair(filters) > LARGEST_PAIR).any())


def warning(path: Path, content: bytes) -> str | None:
    """A warning about a file whose answers this processor may compute wrongly; None if it cannot."""
    if not (nodes := may_saturate(path, content)) or not saturates():
        return None
    return (
        f"{path.name} may be answered wrongly here: this processor adds eight-bit products in 16 bits, and "
        f"{len(nodes)} of its layers cannot be shown not to saturate, first {nodes[0]}; "
        "export it again with export/to_onnx.py --precision int8, or serve the fp32 form"
    )


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor's sum of 64 products 255 · 127 is too small: one layer is run to find out."""
    session = quiet_session(_PROBE, intra_op_num_threads=1)
    found = session.run(None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)})[0]
    return bool((np.asarray(found) != 64 * 255 * 127).any())


def largest_pair(filters: np.ndarray) -> np.ndarray:
    """[N_o, N] → [N_o]: the largest magnitude of a sum of two weights of one sign, or of one where there is one."""
    if filters.shape[1] < 2:
        return np.abs(filters).max(axis=1)
    positive, negative = (np.partition(np.maximum(part, 0), -2, axis=1)[:, -2:].sum(1) for part in (filters, -filters))
    return np.maximum(positive, negative)
