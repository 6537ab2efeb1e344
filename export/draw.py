"""python export/draw.py plain.onnx: the graph that a runtime gets, node by node, as an SVG."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import run_command
from common.files import write_whole

if TYPE_CHECKING:
    import onnx

EXAMPLES = (
    "python export/draw.py plain.onnx                       # writes plain.svg beside it",
    "python export/draw.py models/fashion-mnist.onnx --out graph.svg",
)
ROW, TOP, WIDTH = 20, 64, 860  # pixels
COLUMNS = {"node": 90, "operator": 330, "output": 470, "weights": 680, "share of the products": 715}
# A card of its own, so that the page around it may be light or dark.
STYLE = """
rect.card { fill: #ffffff; stroke: #d0d7de } text { font: 13px sans-serif; fill: #1f2328 }
text.title { font: bold 15px sans-serif } text.head { fill: #59636e } text.number { text-anchor: end }
path { fill: none; stroke: #8c959f } circle { fill: #0969da } rect.bar { fill: #54aeff }
@media (prefers-color-scheme: dark) {
  rect.card { fill: #161b22; stroke: #3d444d } text { fill: #e6edf3 } text.head { fill: #9198a1 }
  rect.bar { fill: #1f6feb } circle { fill: #58a6ff }
}
"""


@dataclass(frozen=True)
class DrawConfig:
    onnx: Annotated[Path, "an ONNX classifier, of this project or not"]
    out: Annotated[Path | None, "file to write (default: the same name with .svg)"] = None


@dataclass(frozen=True)
class NodeRow:
    """One node of the graph."""

    name: str
    operator: str
    output: str  # the shape of its output, "N 32 28 28"; "" if it is not known
    reads: tuple[int, ...]  # indices of the rows that it reads
    num_weights: int
    products: int  # multiplications for one image


def command(config: DrawConfig) -> int:
    """Draw an ONNX graph: operators, shapes, weights and where the work is."""
    from export.graphs.onnx_file import read_onnx

    file = read_onnx(config.onnx)
    rows = read_rows(file.model)
    out = write_whole(config.out or config.onnx.with_suffix(".svg"), draw(rows, file.name).encode())
    print(f"wrote {out}: {len(rows)} nodes, {sum(row.products for row in rows):,} products for one image")
    return 0


def read_rows(model: "onnx.ModelProto") -> list[NodeRow]:
    """The nodes in the order in which they run."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {  # a free size is 0
        value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    written: dict[str, int] = {}
    rows = []
    for index, node in enumerate(model.graph.node):
        output = shapes.get(node.output[0], ())
        sizes = [weights[name] for name in node.input if name in weights]
        # A convolution's weight [N_o, N_i, ...] multiplies at every place of its output, a matrix once.
        places = {"Conv": prod(output[2:]), "QLinearConv": prod(output[2:]), "Gemm": 1, "MatMul": 1}
        rows.append(
            NodeRow(
                name=node.name or node.output[0],
                operator=node.op_type,
                output=" ".join(str(size or "N") for size in output),
                reads=tuple(dict.fromkeys(written[name] for name in node.input if name in written)),
                num_weights=sum(map(prod, sizes)),
                products=max(map(prod, sizes), default=1) * places.get(node.op_type, 0),
            )
        )
        written |= dict.fromkeys(node.output, index)
    return rows


def draw(rows: list[NodeRow], title: str) -> str:
    """The SVG: a line for each node, and arcs to the nodes that it reads."""
    total, largest = sum(row.products for row in rows), max(row.products for row in rows)
    height = TOP + ROW * len(rows) + 12
    heading = f"{title}: {len(rows)} nodes, {sum(row.num_weights for row in rows):,} weights, {total:,} products"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        _text(20, 26, heading, "title"),
        *(_text(x, 50, name, "head number" if name == "weights" else "head") for name, x in COLUMNS.items()),
        *(line for index, row in enumerate(rows) for line in _draw_row(index, row, total, largest)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _draw_row(index: int, row: NodeRow, total: int, largest: int) -> Iterator[str]:
    x, y = 70, TOP + ROW * index + 8
    for source in row.reads:
        start, bulge = TOP + ROW * source + 8, min(60, 10 * (index - source)) if index - source > 1 else 0
        yield f'<path d="M {x} {start} C {x - bulge} {start}, {x - bulge} {y}, {x} {y}"/>'
    yield f'<circle cx="{x}" cy="{y}" r="3"/>'
    for column, value in zip(COLUMNS, (row.name, row.operator, row.output), strict=False):
        yield _text(COLUMNS[column], y + 4, value)
    if row.num_weights:
        yield _text(COLUMNS["weights"], y + 4, f"{row.num_weights:,}", "number")
    if row.products:
        left, width = COLUMNS["share of the products"], 70 * row.products / largest
        yield f'<rect class="bar" x="{left}" y="{y - 6}" width="{width:.1f}" height="12"/>'
        yield _text(WIDTH - 15, y + 4, f"{100 * row.products / total:.1f} %", "number")


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={kind!r}" if kind else ""}>{escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(run_command(command, DrawConfig, examples=EXAMPLES))
