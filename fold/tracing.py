"""From a module to its graph, by torch.fx.

fx keeps a layer that it knows as one node with its name, so a Dirac convolution is seen whole; the
batch stays open, and no input is needed. torch.export takes such layers apart into their arithmetic,
fixes shapes, and needs ten times as long.
"""

import operator
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fold.nodes import Graph
from fold.operations import FUNCTIONS, LAYERS, Builder, NotListed, Ref
from train.layers import ncrelu

# Views: their shapes may come from the input's, because only the batch may be open in what they make.
VIEWS = ("view", "reshape")
# What may compute with shapes; the results must end in views or assertions.
OF_SHAPES = ("size", "getattr", "getitem", "dim", "eq", "ne", "gt", "lt", "ge", "le", "mul", "add", "sub", "floordiv")


# What may give a value the larger shape of a constant beside it.
SPREADING = ("add", "iadd", "sub", "mul", "imul", "div", "truediv")


class Tracer(fx.Tracer):
    """Layers that a graph knows stay whole, by their exact class: a subclass may compute something else."""

    deepest = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.deepest = self.path_of_module(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # a parameter is known: what a forward makes of it is a number, not a trace


def trace(net: nn.Module, example: Tensor | None = None) -> Graph:
    """The graph of `net` in float64, as it computes in evaluation mode; `net` stays as it was.

    `example` is a batch that the net takes. Raises TypeError, all in one message, where an operation is not
    listed in fold/operations.py, or depends on the batch; and where Python's control flow depends on values.
    """
    _refuse_hooks(net)
    # fx computes what depends on parameters alone while it traces: in float64, on a copy.
    traced = trace_module(deepcopy(net).double())
    shapes = {} if example is None else _shapes(traced, example)
    walk = _Walk(traced, shapes)
    for node in traced.graph.nodes:
        walk.take(node)
    if walk.refused:
        raise TypeError(f"cannot be folded: {', '.join(walk.refused)}")
    return Graph(_needed(walk))


def trace_module(net: nn.Module) -> fx.GraphModule:
    """The net as fx sees it; its nodes are where `Graph.nodes` come from."""
    tracer = Tracer(autowrap_functions=(ncrelu,))  # under whatever name a module imported it
    try:
        with torch.no_grad():
            return fx.GraphModule(net, tracer.trace(net))
    except Exception as error:  # whatever the net's own code raises when it meets a value that is not there
        line = " ".join(str(error).split())[:150]
        where = f"{tracer.deepest or 'the net'} ({type(error).__name__}: {line})"
        raise TypeError(
            f"cannot be traced, at or after {where}: a forward's control flow must not depend on values or shapes"
        ) from error


class _Walk:
    """fx's nodes, one after the other: what each is in the graph, or why it has no place there."""

    def __init__(self, traced: fx.GraphModule, shapes: Mapping[str, Any]) -> None:
        self.builder, self.traced, self.shapes = Builder(), traced, shapes
        self.values: dict[fx.Node, Any] = {}
        self.refused: list[str] = []
        self.of_shapes: set[fx.Node] = set()
        self.result: Any = None

    def take(self, node: fx.Node) -> None:
        self.builder.path = _path(node)
        try:
            self.values[node] = self._value(node)
        except NotListed as reason:
            self.refused.append(f"{self.builder.path or node.name} ({reason})")
            self.values[node] = _like_first(node, self.values)
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            self.refused.append(f"{self.builder.path or node.name} ({node.name}: {' '.join(str(error).split())[:100]})")
            self.values[node] = _like_first(node, self.values)

    def _value(self, node: fx.Node) -> Any:
        match node.op:
            case "placeholder":
                return self._input(node)
            case "get_attr":
                return _attribute(self.traced, str(node.target))
            case "output":
                self.result = self._known(node.args[0])
                if not isinstance(self.result, Ref):
                    raise NotListed(f"the output is {type(self.result).__name__}, not one tensor [N, classes]")
                return None
            case "call_module":
                return self._layer(node)
            case _:
                return self._function(node)

    def _input(self, node: fx.Node) -> Any:
        if node.args:  # has a default
            return node.args[0]
        if self.builder.nodes:
            raise NotListed("a second input")
        self.builder.path = "input"
        shape = self.shapes.get(node.name)
        return self.builder.add("input", rank=None if shape is None else len(shape))

    def _layer(self, node: fx.Node) -> Any:
        layer, args = self.traced.get_submodule(str(node.target)), self._known(node.args)
        write = LAYERS.get(type(layer))
        if write is None:
            raise NotListed(type(layer).__name__)
        if len(args) != 1 or node.kwargs or not isinstance(args[0], Ref):
            raise NotListed(f"{type(layer).__name__} of more than one input")
        _refuse_late_inplace(node, changed=getattr(layer, "inplace", False))
        try:
            return write(self.builder, layer, args[0])
        except NotListed as reason:
            raise NotListed(f"{type(layer).__name__}: {reason}") from reason

    def _function(self, node: fx.Node) -> Any:
        name, args, kwargs = _name_of(node), self._known(node.args), self._known(node.kwargs)
        sources = [source for source in node.all_input_nodes if self._is_traced(source)]
        if not sources:
            return _compute(node, args, kwargs)
        if name == "_assert":
            return None
        shape = self.shapes.get(node.name)
        if name in OF_SHAPES and not (name in FUNCTIONS and _holds_ref(args) and _is_tensor(shape)):
            if isinstance(shape, _Shape):
                raise NotListed(name)
            if shape is None:
                raise NotListed(f"{name} of a shape: give an example batch")
            self.of_shapes.add(node)
            return shape
        if name in VIEWS:
            return self._view(node, args[0])
        if any(source in self.of_shapes for source in sources):
            raise NotListed(f"{name} computes with the batch's shape")
        if name in SPREADING and len(sources) == 1 and shape != self.shapes.get(sources[0].name):
            raise NotListed(f"{name} of a constant that gives a value more channels or pixels")
        if name in SPREADING and shape is None and any(isinstance(part, Tensor) and part.numel() > 1 for part in args):
            raise NotListed(f"{name} of a constant for each channel: give an example batch")
        if name in ("truediv", "div") and isinstance(args[1], int | float | Tensor):
            return FUNCTIONS["mul"](self.builder, args[0], 1 / args[1])
        if name not in FUNCTIONS:
            raise NotListed(name)
        inplace = kwargs.get("inplace") is True or name in ("iadd", "imul") or str(node.target).endswith("_")
        _refuse_late_inplace(node, changed=inplace)
        return FUNCTIONS[name](self.builder, *args, **kwargs)

    def _view(self, node: fx.Node, source: Ref) -> Ref:
        before, after = (self.shapes.get(name) for name in (cast("fx.Node", node.args[0]).name, node.name))
        if before is None or after is None:
            raise NotListed("a view: give an example batch")
        if tuple(before) == tuple(after):
            return source
        if len(after) != 2 or after[0] != before[0]:
            raise NotListed(f"a view of {list(before)} as {list(after)}: all but the batch made flat alone")
        return self.builder.add("flatten", source)

    def _is_traced(self, node: fx.Node) -> bool:
        return isinstance(self.values[node], Ref) or node in self.of_shapes or _holds_ref(self.values[node])

    def _known(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.values[node])


def _holds_ref(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(part, Ref) for part in cast("list[Any]", value))


def _is_tensor(shape: Any) -> bool:
    """Shapes recorded of tensors are torch.Size; without an example nothing is recorded, and a tensor is taken."""
    return shape is None or isinstance(shape, _Shape)


class _Shape(tuple[int, ...]):
    """The shape of a tensor that a node gave, not a shape that it computed."""

    __slots__ = ()


def _shapes(traced: fx.GraphModule, example: Tensor) -> dict[str, Any]:
    """For each fx node the `_Shape` of its tensor on `example`, or its value where it is no tensor."""
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = _Shape(value.shape) if isinstance(value, Tensor) else value
            return value

    # In-place layers may change what they read: a copy of both.
    batch = example.double() if example.is_floating_point() else example
    try:
        with torch.no_grad():
            Recorder(deepcopy(traced)).run(batch.clone())
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        line = " ".join(str(error).split())[:150]
        raise TypeError(f"the net does not take an example of shape {list(example.shape)}: {line}") from error
    return found


def _like_first(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Something to go on with, so that one message names all that is refused."""
    return next((values[source] for source in node.all_input_nodes if isinstance(values[source], Ref)), Ref("input"))


def _path(node: fx.Node) -> str:
    """Where in the user's net a node belongs: its layer, or the module whose forward calls it."""
    if node.op == "call_module":
        return str(node.target)
    stack: dict[Any, tuple[Any, Any]] = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _name_of(node: fx.Node) -> str:
    """A function's name as in FUNCTIONS; one of somebody else's module keeps its module's name before it."""
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    target = cast("Callable[..., Any]", node.target)
    name = str(getattr(target, "__name__", target))
    home = str(getattr(target, "__module__", None) or "torch").split(".")[0]
    if target is ncrelu or home in ("torch", "_operator", "builtins", "math"):
        return name if name.startswith("_") else name.removesuffix("_")
    return f"{home}.{name}"


def _attribute(traced: fx.GraphModule, path: str) -> Any:
    value: Any = operator.attrgetter(path)(traced)
    return value.detach() if isinstance(value, Tensor) else value


def _compute(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """A node that reads parameters and numbers alone, computed in float64."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def _refuse_late_inplace(node: fx.Node, *, changed: bool) -> None:
    """A value that is overwritten must not be read again: a graph has no order of side effects."""
    source = node.all_input_nodes[0]
    if changed and any(reader is not node and node < reader for reader in source.users):
        raise NotListed(f"{node.name} overwrites a value that {len(source.users) - 1} others read: leave inplace out")


def _refuse_hooks(net: nn.Module) -> None:
    """Hooks and forwards of one instance run beside the trace: they would be left out in silence."""
    modules = cast("list[tuple[str, Any]]", list(net.named_modules()))  # pyright: ignore[reportUnknownArgumentType]
    found = [
        name or "the net"
        for name, module in modules
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]
    if found:
        raise TypeError(f"cannot be folded: {', '.join(found)} have hooks or a forward of their own; remove them first")
    training = [name for name, module in modules if _depends_on_mode(module) and module.training]
    if training:
        raise TypeError(f"cannot be folded: {', '.join(training[:5])} in training mode; call net.eval() first")


def _depends_on_mode(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]


def _needed(walk: _Walk) -> tuple[Any, ...]:
    """The nodes that the output reads, and it last."""
    nodes = {node.name: node for node in walk.builder.nodes}
    needed, rest = set[str](), [str(walk.result)]
    while rest:
        name = rest.pop()
        if name not in needed:
            needed.add(name)
            rest += nodes[name].inputs
    return tuple(node for node in walk.builder.nodes if node.name in needed)
