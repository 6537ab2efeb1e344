from xml.etree import ElementTree

import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.cli import run_command
from export.draw import DrawConfig, command, draw, read_rows
from export.graphs.graph import to_onnx
from fold.graph import fold
from fold.lower import lower


def products_by_running(net, x):
    """As PyTorch counts them: two operations each."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2


def test_rows_have_the_shapes_weights_and_products_of_the_net(make_net, make_spec, images):
    net = fold(make_net(depth=16))
    rows = {row.name: row for row in read_rows(to_onnx(net, make_spec(depth=16), {}))}
    conv = rows["group1.block1.conv"]
    assert (conv.operator, conv.output, conv.num_weights) == ("Conv", "N 8 4 4", 8 * 16 * 9 + 8)
    assert conv.products == 8 * 16 * 9 * 4 * 4
    assert sum(row.products for row in rows.values()) == products_by_running(net, torch.from_numpy(images(1)))
    assert rows["fc"].products == 16 * 10


def test_a_node_that_reads_two_others_is_tied_to_both(make_net, make_spec):
    rows = read_rows(to_onnx(lower(fold(make_net()), "split"), make_spec(), {}))
    sums = [row for row in rows if row.operator == "Add"]
    assert len(sums) == 5
    assert all([rows[source].operator for source in row.reads] == ["Conv", "Conv"] for row in sums)
    arcs = ElementTree.fromstring(draw(rows, "net")).findall("{*}path")
    assert len(arcs) == sum(len(row.reads) for row in rows)


@pytest.mark.parametrize("text", ["<>&", "plain"])
def test_the_drawing_is_xml_with_every_name(make_net, make_spec, text):
    model = to_onnx(fold(make_net()), make_spec(), {})
    words = [element.text for element in ElementTree.fromstring(draw(read_rows(model), text)).findall("{*}text")]
    assert words[0].startswith(f"{text}: {len(model.graph.node)} nodes")
    assert {node.name for node in model.graph.node} <= set(words)


def test_the_command_draws_ours_and_somebody_elses(write_onnx, write_foreign, capsys):
    for _, path in (write_onnx(), (None, write_foreign())):
        assert run_command(command, DrawConfig, argv=[str(path)]) == 0
        assert f"{len(onnx.load(path).graph.node)} nodes" in capsys.readouterr().out
        assert path.with_suffix(".svg").read_text().startswith("<svg ")
