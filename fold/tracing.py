"""From a module to its graph, by torch.fx.

fx keeps a known layer as one node with its name, so a Dirac convolution stays whole; the batch size stays open, and no
input is needed. torch.export would split such layers into their arithmetic, fix shapes, and take ten times as long.
"""

import operator
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from common.refusal import one_line
from fold.nodes import Graph, needed
from fold.operations import FUNCTIONS, LAYERS, OF_FUNCTIONS, Builder, NotListed, Ref
from train.layers import ncrelu

# Their arguments may depend on the input's shape, because only the batch size may be open in their results.
VIEWS = ("view", "reshape")
# These may compute with shapes; the results must end in views or assertions.
OF_SHAPES = ("size", "getattr", "getitem", "dim", "eq", "ne", "gt", "lt", "ge", "le", "mul", "add", "sub", "floordiv")
# These may give a value the larger shape of a constant beside it.
SPREADING = ("add", "sub", "mul", "div", "truediv")
# These may give the memory of their input.
SHARING = ("contiguous", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "flatten", "getitem", *VIEWS)
IN_PLACE = ("iadd", "isub", "imul", "itruediv")


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# fx itself would take x += y for x + y, which leaves the x that others may read as it was.
Proxy = type("Proxy", (fx.Proxy,), {f"__{name}__": _in_place(name) for name in IN_PLACE})


class Tracer(fx.Tracer):
    """Keeps the layers of `LAYERS` whole, by their exact class: a subclass may compute something else."""

    deepest = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in OF_FUNCTIONS and (type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.deepest = self.path_of_module(m)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # a parameter is known: what a forward computes from it is a number, not a trace


def trace(net: nn.Module, example: Tensor | None = None) -> Graph:
    """The graph of `net` in float64, as it computes in evaluation mode; `net` stays as it was.

    `example` is a batch for the net. Raises TypeError that names all operations that fold/operations.py does not
    list or that depend on the batch, and if Python's control flow depends on values.
    """
    _refuse_hooks(net)
    # While it traces, fx computes what depends only on parameters: in float64, on a copy.
    traced = _trace_module(deepcopy(net).double())
    walk = _Walk(traced, {} if example is None else _shapes(traced, example))
    for node in traced.graph.nodes:
        walk.take(node)
    if walk.refused:
        raise TypeError(f"cannot be folded: {', '.join(walk.refused)}")
    return Graph(needed(walk.builder.nodes, str(walk.result)))


def _trace_module(net: nn.Module) -> fx.GraphModule:
    tracer = Tracer(autowrap_functions=(ncrelu,))  # under whatever name a module imported it
    try:
        with torch.no_grad():
            return fx.GraphModule(net, tracer.trace(net))
    except Exception as error:  # whatever the net's own code raises for a value without numbers
        where = f"{tracer.deepest or 'the net'} ({type(error).__name__}: {one_line(error, 150)})"
        raise TypeError(
            f"cannot be traced, at or after {where}: a forward's control flow must not depend on values or shapes"
        ) from error


class _Walk:
    """Takes fx's nodes in order: writes each to the graph, or records why the graph cannot express it."""

    def __init__(self, traced: fx.GraphModule, shapes: Mapping[str, Any]) -> None:
        self.builder, self.traced, self.shapes = Builder(), traced, shapes
        self.values: dict[fx.Node, Any] = {}
        self.refused: list[str] = []
        self.of_shapes: set[fx.Node] = set()
        self.result: Any = None

    def take(self, node: fx.Node) -> None:
        # Path and class of the layer that the node is, or of the module whose forward calls it.
        stack: dict[Any, tuple[str, type]] = node.meta.get("nn_module_stack") or {"": ("", nn.Module)}
        self.builder.path, kind = list(stack.values())[-1]
        try:
            self.values[node] = self._value(node)
        except (NotListed, TypeError, ValueError, AttributeError, IndexError) as error:
            listed = f"{kind.__name__}: " if kind in LAYERS or kind in OF_FUNCTIONS else ""
            reason = f"{listed}{error}" if isinstance(error, NotListed) else f"{node.name}: {one_line(error, 100)}"
            self.refused.append(f"{self.builder.path or node.name} ({reason})")
            # Go on with one of the inputs, so that one message names everything that is refused.
            refs = (self.values[source] for source in node.all_input_nodes)
            self.values[node] = next((value for value in refs if isinstance(value, Ref)), Ref("input"))

    def _value(self, node: fx.Node) -> Any:
        match node.op:
            case "placeholder":
                return self._input(node)
            case "get_attr":
                value: Any = operator.attrgetter(str(node.target))(self.traced)
                return value.detach() if isinstance(value, Tensor) else value
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
        if (write := LAYERS.get(type(layer))) is None:
            raise NotListed(type(layer).__name__)
        if len(args) != 1 or node.kwargs or not isinstance(args[0], Ref):
            raise NotListed("more than one input")
        return write(self.builder, layer, args[0])

    def _function(self, node: fx.Node) -> Any:
        name, args, kwargs = _name_of(node), self._known(node.args), self._known(node.kwargs)
        is_method = node.op == "call_method"
        sources = [source for source in node.all_input_nodes if self._is_traced(source)]
        if not sources:  # only parameters and numbers, known in float64
            target = cast("Callable[..., Any]", node.target)
            return getattr(args[0], str(target))(*args[1:], **kwargs) if is_method else target(*args, **kwargs)
        if name == "_assert":
            return None
        shape = self.shapes.get(node.name)
        is_tensor = shape is None or isinstance(shape, _Shape)  # without an example a value counts as a tensor
        if name in OF_SHAPES and not (name in FUNCTIONS and _holds_ref(args) and is_tensor):
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
        if _overwrites(node):
            _refuse_late_readers(node)
        if name in ("truediv", "div") and not kwargs and isinstance(args[1], int | float | Tensor):
            name, args = "mul", (args[0], 1 / torch.as_tensor(args[1], dtype=torch.float64))
        if name not in FUNCTIONS:
            raise NotListed(name)
        return FUNCTIONS[name](self.builder, *args, **kwargs)

    def _view(self, node: fx.Node, source: Ref) -> Ref:
        before, after = (self.shapes.get(name) for name in (cast("fx.Node", node.args[0]).name, node.name))
        if before is None or after is None:
            raise NotListed("a view: give an example batch")
        if tuple(before) == tuple(after):
            return source
        if len(after) != 2 or after[0] != before[0]:
            raise NotListed(
                f"a view of {list(before)} as {list(after)}, only flattening all but the batch is supported"
            )
        return self.builder.add("flatten", source)

    def _is_traced(self, node: fx.Node) -> bool:
        return isinstance(self.values[node], Ref) or node in self.of_shapes or _holds_ref(self.values[node])

    def _known(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.values[node])


def _holds_ref(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(part, Ref) for part in cast("list[Any]", value))


class _Shape(tuple[int, ...]):
    """The shape of a node's tensor, as opposed to a shape that a node computed."""

    __slots__ = ()


def _shapes(traced: fx.GraphModule, example: Tensor) -> dict[str, Any]:
    """For each fx node the `_Shape` of its tensor on `example`, or its value if that is not a tensor."""
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = _Shape(value.shape) if isinstance(value, Tensor) else value
            return value

    try:
        with torch.no_grad():  # in-place layers may change the input and the net: both are copied
            Recorder(deepcopy(traced)).run((example.double() if example.is_floating_point() else example).clone())
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = list(example.shape)
        raise TypeError(f"the net does not take an example of shape {shape}: {one_line(error, 150)}") from error
    return found


def _name_of(node: fx.Node) -> str:
    """A function's name as in FUNCTIONS; outside PyTorch and Python, with the name of its module before it."""
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    target = cast("Callable[..., Any]", node.target)
    name = str(getattr(target, "__name__", target))
    name = name[1:] if name in IN_PLACE else name
    home = str(getattr(target, "__module__", None) or "torch").split(".")[0]
    if target is ncrelu or home in ("torch", "_operator", "builtins", "math"):
        return name if name.startswith("_") else name.removesuffix("_")
    return f"{home}.{name}"


def _overwrites(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return node.kwargs.get("inplace") is True or name in IN_PLACE or name.endswith("_")


def _refuse_late_readers(node: fx.Node) -> None:
    """Refuses to overwrite a value that is read again later, or a view of it: a graph has no order of side effects."""

    def shares(other: fx.Node) -> bool:
        return other.op in ("call_function", "call_method") and (_name_of(other) in SHARING or _overwrites(other))

    owner = node.all_input_nodes[0]
    while shares(owner):
        owner = owner.all_input_nodes[0]
    same = [owner]  # grows by those that share the memory of the ones before
    for value in same:
        same += [user for user in value.users if user < node and shares(user) and user.all_input_nodes[0] is value]
    if late := {reader for value in same for reader in value.users if node < reader}:
        raise NotListed(f"{node.name} overwrites a value that {len(late)} others read: leave inplace out")


def _refuse_hooks(net: nn.Module) -> None:
    """Refuses hooks and forwards of single instances, which a trace would omit silently, and training mode."""
    modules = cast("list[tuple[str, Any]]", list(net.named_modules()))  # pyright: ignore[reportUnknownArgumentType]
    if found := [
        name or "the net"
        for name, module in modules
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]:
        raise TypeError(f"cannot be folded: {', '.join(found)} have hooks or a forward of their own; remove them first")
    by_mode = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]
    if training := [name for name, module in modules if isinstance(module, by_mode) and module.training]:
        raise TypeError(f"cannot be folded: {', '.join(training[:5])} in training mode; call net.eval() first")
