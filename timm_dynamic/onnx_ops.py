"""PyTorch functions as ONNX operations: a function is traced to ATen operations, and each is written as ONNX.

All is for eval in float32. The first dimension is the batch: what is written holds for any number of images, whatever
the number that a function was traced with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from .onnx_graph import Graph

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.bool: "bool"}


class Value(NamedTuple):
    """A value in an ONNX graph, and a tensor of its shape and dtype."""

    name: str
    sample: Tensor

    @property
    def given(self) -> tuple[str, str]:
        """Name and dtype, as a graph's outputs are told."""
        return self.name, DTYPES[self.sample.dtype]


class _Call(NamedTuple):
    """One ATen operation: names of ONNX values stand for tensors, `sample` has the shape of what it gives."""

    graph: Graph
    node: fx.Node
    args: tuple[Any, ...]
    options: dict[str, Any]

    def shape(self, which: int = 0) -> list[int]:
        """Shape of an argument."""
        node: Any = self.node.args[which]
        return list(node.meta["val"].shape)

    @property
    def sample(self) -> Any:
        return self.node.meta["val"]

    def arg(self, index: int, name: str, default: Any) -> Any:
        return self.args[index] if len(self.args) > index else self.options.get(name, default)

    def ints(self, *values: int) -> str:
        return self.graph.constant(values, "int64")

    def batched(self, shape: Any, batch: int) -> str:
        """A shape whose first dimension, the batch, is left as it is in the input."""
        return self.ints(batch, *list(shape)[1:])


def translate(graph: Graph, function: Callable[..., Any], *values: Value) -> list[Value]:
    """Write a function of tensors as operations of a graph.

    Args:
        graph: gets the operations, and the weights that the function uses.
        function: of tensors; gives a tensor or several.
        *values: what it is called with.

    Raises:
        ValueError: for an operation that is not known here.
    """
    with torch.no_grad():
        traced = make_fx(functionalize(function, remove="mutations"))(*[value.sample for value in values])
    traced.graph.eliminate_dead_code()
    given = iter(values)
    env: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given).name
        elif node.op == "get_attr":
            env[node] = getattr(traced, node.target).detach()
        elif node.op == "call_function":
            env[node] = _write(graph, node, env)
    out: Any = traced.graph.output_node().args[0]
    found = list(out) if isinstance(out, (tuple, list)) else [out]
    return [Value(_named(graph, env[node]), _like(node.meta["val"])) for node in found]


def _like(sample: Any) -> Tensor:
    return torch.zeros(tuple(sample.shape), dtype=sample.dtype)


def _named(graph: Graph, value: Any) -> Any:
    """A value's name; a tensor becomes a constant."""
    if not isinstance(value, Tensor):
        return value
    return graph.constant(value.contiguous().numpy(), DTYPES[value.dtype])


def _write(graph: Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """One operation: computed now if it only depends on weights, else written into the graph."""
    if not any(isinstance(env[n], (str, list)) for n in node.all_input_nodes):
        known: Any = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        args, options = known
        return node.target(*args, **options)  # type: ignore[operator]
    named: Any = fx.map_arg((node.args, node.kwargs), lambda n: _named(graph, env[n]))
    args, options = named
    if getattr(node.target, "__name__", "") == "getitem":
        return args[0][args[1]]
    packet = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    if packet not in WRITERS:
        raise ValueError(f"no ONNX form of {node.target}: what uses it cannot be exported")
    return WRITERS[packet](_Call(graph, node, args, options))


# Each operation ------------------------------------------------------------------------------------------------------


def _same(call: _Call) -> str:
    return str(call.args[0])


def _plain(kind: str) -> Callable[[_Call], str]:
    """An operation that ONNX has too, of tensors and numbers."""

    def write(call: _Call) -> str:
        operands: list[Any] = list(call.args)
        dtype = next(a.meta["val"].dtype for a in call.node.args if isinstance(a, fx.Node))
        if any(isinstance(a, float) for a in operands) and not dtype.is_floating_point:
            raise ValueError(f"no ONNX form of {call.node.target} of whole numbers and a fraction")
        names = [a if isinstance(a, str) else call.graph.constant(a, DTYPES[dtype]) for a in operands]
        return call.graph.op(kind, *_promoted(call, names))

    return write


def _promoted(call: _Call, names: list[str]) -> list[str]:
    """Operands of one dtype, where they differ."""
    kinds = [n.meta["val"].dtype for n in call.node.args if isinstance(n, fx.Node)]
    if len(kinds) != 2 or kinds[0] == kinds[1]:  # `where` has three
        return names
    common = torch.promote_types(*kinds)
    pairs = zip(names, kinds, strict=True)
    return [name if kind == common else _cast(call.graph, name, common) for name, kind in pairs]


_ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.float64: 11}


def _cast(graph: Graph, name: str, dtype: torch.dtype) -> str:
    return graph.op("Cast", name, to=_ONNX_TYPES[dtype])


def _to_copy(call: _Call) -> str:
    dtype = call.options.get("dtype") or call.sample.dtype
    node: Any = call.node.args[0]
    return call.args[0] if node.meta["val"].dtype == dtype else _cast(call.graph, call.args[0], dtype)


def _rsub(call: _Call) -> str:
    value = call.args[1]
    name = value if isinstance(value, str) else call.graph.constant(value, DTYPES[call.sample.dtype])
    return call.graph.op("Sub", name, call.args[0])


def _silu(call: _Call) -> str:
    return call.graph.op("Mul", call.args[0], call.graph.op("Sigmoid", call.args[0]))


def _convolution(call: _Call) -> str:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
    assert not transposed
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return call.graph.op(
        "Conv",
        *inputs,
        kernel_shape=call.shape(1)[2:],
        strides=list(stride),
        pads=list(padding) * 2,
        dilations=list(dilation),
        group=groups,
    )


def _batch_norm(call: _Call) -> list[str]:
    x, weight, bias, mean, var = call.args[:5]
    channels = call.shape()[1]
    weight = weight or call.graph.constant(np.ones(channels))
    bias = bias or call.graph.constant(np.zeros(channels))
    return [call.graph.op("BatchNormalization", x, weight, bias, mean, var, epsilon=float(call.args[-1]))]


def _group_norm(call: _Call) -> list[str]:
    x, weight, bias, _, channels, _, groups, eps = call.args
    graph, shape = call.graph, call.shape()
    apart = graph.op("Reshape", x, call.ints(0, groups, -1))
    one, zero = graph.constant(np.ones(groups)), graph.constant(np.zeros(groups))
    y = graph.op("InstanceNormalization", apart, one, zero, epsilon=float(eps))
    y = graph.op("Reshape", y, call.batched(shape, 0))
    for kind, name in (("Mul", weight), ("Add", bias)):
        if name is not None:
            y = graph.op(kind, y, graph.op("Reshape", name, call.ints(1, channels, 1, 1)))
    return [y]


def _max_pool(call: _Call) -> list[str]:
    kernel = _pair(call.args[1])
    stride, padding = _pair(call.arg(2, "stride", None) or kernel), _pair(call.arg(3, "padding", 0))
    ceil = int(call.arg(5, "ceil_mode", False))
    return [
        call.graph.op(
            "MaxPool", call.args[0], kernel_shape=kernel, strides=stride, pads=padding * 2, ceil_mode=ceil,
            dilations=_pair(call.arg(4, "dilation", 1)),
        )
    ]  # fmt: skip


def _avg_pool(call: _Call) -> str:
    kernel = _pair(call.args[1])
    stride, padding = _pair(call.arg(2, "stride", None) or kernel), _pair(call.arg(3, "padding", 0))
    ceil, include = int(call.arg(4, "ceil_mode", False)), int(call.arg(5, "count_include_pad", True))
    if ceil and include and not any(padding):
        include = 0  # the window that sticks out is averaged over what it covers, as in PyTorch
    return call.graph.op(
        "AveragePool", call.args[0], kernel_shape=kernel, strides=stride, pads=padding * 2, ceil_mode=ceil,
        count_include_pad=include,
    )  # fmt: skip


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def pool(graph: Graph, x: str) -> str:
    """Global average pool of a value [B, C, H, W] -> [B, C, 1, 1], computed once."""
    known = graph.pool_of(x)
    if known is None:
        known = graph.pools[x] = graph.op("GlobalAveragePool", x)
    return known


def _mean(call: _Call) -> str:
    dims, keepdim, rank = call.args[1], call.arg(2, "keepdim", False), len(call.shape())
    if rank == 4 and sorted(d % rank for d in dims) == [2, 3]:
        y = pool(call.graph, call.args[0])
        return y if keepdim else call.graph.op("Flatten", y, axis=1)
    return _reduce("ReduceMean")(call)


def _reduce(kind: str) -> Callable[[_Call], str]:
    def write(call: _Call) -> str:
        dims = call.args[1] if isinstance(call.args[1], (list, tuple)) else [call.args[1]]
        keep = int(call.arg(2, "keepdim", False))
        return call.graph.op(kind, call.args[0], call.ints(*dims), keepdims=keep)

    return write


def _view(call: _Call) -> str:
    return call.graph.op("Reshape", call.args[0], call.batched(call.sample.shape, 0))


def _expand(call: _Call) -> str:
    if list(call.sample.shape) == call.shape():
        return _same(call)
    return call.graph.op("Expand", call.args[0], call.batched(call.sample.shape, 1))


def _addmm(call: _Call) -> str:
    bias, x, weight = call.args[:3]
    return call.graph.op("Gemm", x, weight, bias)


def _join(kind: str) -> Callable[[_Call], str]:
    def write(call: _Call) -> str:
        axis, parts = call.arg(1, "dim", 0), call.args[0]
        if kind == "stack":
            parts = [call.graph.op("Unsqueeze", part, call.ints(axis)) for part in parts]
        return call.graph.op("Concat", *parts, axis=axis)

    return write


def _split(call: _Call) -> list[str]:
    axis = call.arg(2, "dim", 0)
    sizes = [part.shape[axis] for part in call.sample]
    return call.graph.ops("Split", (call.args[0], call.ints(*sizes)), len(sizes), axis=axis)


def _slice(call: _Call) -> str:
    axis, start, end = call.arg(1, "dim", 0), call.arg(2, "start", None) or 0, call.arg(3, "end", None)
    if list(call.sample.shape) == call.shape():
        return _same(call)
    end = min(end if end is not None else 2**62, 2**62)
    step = call.arg(4, "step", 1)
    return call.graph.op("Slice", call.args[0], *(call.ints(v) for v in (start, end, axis, step)))


def _narrow(call: _Call) -> str:
    axis, start, length = call.args[1:4]
    return call.graph.op("Slice", call.args[0], call.ints(start), call.ints(start + length), call.ints(axis))


def _unsqueeze(call: _Call) -> str:
    return call.graph.op("Unsqueeze", call.args[0], call.ints(call.args[1]))


def _transpose(call: _Call) -> str:
    order = list(range(len(call.shape())))
    a, b = call.args[1:3]
    order[a], order[b] = order[b], order[a]
    return call.graph.op("Transpose", call.args[0], perm=order)


def _softmax(call: _Call) -> str:
    return call.graph.op("Softmax", call.args[0], axis=call.args[1])


def _logit(call: _Call) -> str:
    graph, x, eps = call.graph, call.args[0], call.arg(1, "eps", None)
    if eps is not None:
        x = graph.op("Clip", x, graph.constant(eps), graph.constant(1 - eps))
    return graph.op("Log", graph.op("Div", x, graph.op("Sub", graph.constant(1.0), x)))


def _cumprod(call: _Call) -> str:
    graph, x, axis, count = call.graph, call.args[0], call.args[1], call.shape()[call.args[1]]
    if count == 1:
        return str(x)
    parts = graph.ops("Split", (x, call.ints(*[1] * count)), count, axis=axis)
    for i in range(1, count):
        parts[i] = graph.op("Mul", parts[i - 1], parts[i])
    return graph.op("Concat", *parts, axis=axis)


def _index_select(call: _Call) -> str:
    return call.graph.op("Gather", call.args[0], call.args[2], axis=call.args[1])


def _pad(mode: str) -> Callable[[_Call], str]:
    def write(call: _Call) -> str:
        rank, amounts = len(call.shape()), call.args[1]  # PyTorch: last dimension first, (before, after) each
        before, after = [0] * rank, [0] * rank
        for i in range(len(amounts) // 2):
            before[rank - 1 - i], after[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
        return call.graph.op("Pad", call.args[0], call.ints(*before, *after), mode=mode)

    return write


WRITERS: dict[str, Callable[[_Call], Any]] = {
    **{name: _plain(kind) for name, kind in (
        ("relu", "Relu"), ("sigmoid", "Sigmoid"), ("tanh", "Tanh"), ("hardswish", "HardSwish"), ("add", "Add"),
        ("sub", "Sub"), ("mul", "Mul"), ("div", "Div"), ("mm", "MatMul"), ("ge", "GreaterOrEqual"), ("gt", "Greater"),
        ("le", "LessOrEqual"), ("lt", "Less"), ("where", "Where"), ("bitwise_and", "And"), ("bitwise_or", "Or"),
        ("bitwise_not", "Not"), ("logical_not", "Not"),
    )},
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "as_strided_", "copy_"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    "_to_copy": _to_copy, "rsub": _rsub, "silu": _silu, "convolution": _convolution, "mean": _mean,
    "native_group_norm": _group_norm, "max_pool2d_with_indices": _max_pool, "avg_pool2d": _avg_pool,
    "sum": _reduce("ReduceSum"), "amax": _reduce("ReduceMax"), "expand": _expand, "addmm": _addmm,
    "cat": _join("cat"), "stack": _join("stack"), "split": _split, "slice": _slice, "narrow": _narrow,
    "unsqueeze": _unsqueeze, "transpose": _transpose, "_softmax": _softmax, "cumprod": _cumprod,
    "index_select": _index_select, "logit": _logit,
    "reflection_pad2d": _pad("reflect"), "constant_pad_nd": _pad("constant"),
}  # fmt: skip
