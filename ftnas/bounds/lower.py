"""From the calls of a trace to operations whose errors can be bounded; everything else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ftnas.bounds.ops import Activation, Add, Affine, Average, Concat, Constant, MaxPool, Move, Norm, Op, Scale, Window
from ftnas.bounds.trace import BATCH, label

Module = Callable[[str, Any], Op]

CONSTANTS: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Hardtanh: 1.0, nn.Tanh: 1.0, nn.Softsign: 1.0, nn.Softplus: 1.0, nn.CELU: 1.0,
    nn.Sigmoid: 0.25, nn.Hardsigmoid: 1 / 6, nn.LogSigmoid: 1.0, nn.Softshrink: 1.0, nn.ELU: 1.0, nn.LeakyReLU: 1.0,
}  # fmt: skip
"""Increasing activation functions and their Lipschitz constants K, at slopes and alphas of at most 1."""

FUNCTIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "relu6": nn.ReLU6, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softsign": nn.Softsign, "logsigmoid": nn.LogSigmoid, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip
"""The same as functions and methods without arguments of their own."""

MOVED = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
SMOOTH = 40.0
"""Threshold of a Softplus from which its jump, log(1 + exp(-threshold)) / beta, is lost in float64; in float32 20."""

RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "detach", "clone"})
ADDS = frozenset({"add", "add_", "iadd", "sub", "isub"})
FACTORS = frozenset({"mul", "mul_", "imul", "truediv", "div", "itruediv"})


def lower(node: fx.Node, module: nn.Module | None, values: dict[str, Tensor]) -> tuple[Op, list[fx.Node]]:
    """Return the operation of a call and the values that it reads.

    Args:
        node: A call of a module, a function or a method.
        module: The module that it calls.
        values: What every call gave on zeros.

    Raises:
        ValueError: One line: it is refused, by name.
    """
    read = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
    if module is not None:
        return _module(label(node), module, node, values), read
    return _function(label(node), node, values, read)


def _module(name: str, module: nn.Module, node: fx.Node, values: dict[str, Tensor]) -> Op:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"layer {name!r} has hooks or a forward of its own, which are not bounded; remove them")
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return _affine(name, module)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return _norm(name, module, values[node.name].dim())
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices:
            raise ValueError(f"layer {name!r} returns indices too, which is not bounded")
        return _max_pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if isinstance(module, nn.AvgPool2d):
        if module.divisor_override is not None:
            raise ValueError(
                f"layer {name!r} has a divisor of its own, which is not bounded; use divisor_override=None"
            )
        size, stride = _pair(module.kernel_size), _pair(module.stride)
        return Average(module.forward, _overlap(size, stride), settings(module))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive(module.forward, node, values)
    if isinstance(module, MOVED):
        return _reshape(name, node, values)
    return _activation(name, module, next(iter(values.values())).dtype)


def _function(name: str, node: fx.Node, values: dict[str, Tensor], read: list[fx.Node]) -> tuple[Op, list[fx.Node]]:
    """Return the operation of a function or a method."""
    args: Any = node.args
    if name in FUNCTIONS:
        return _activation(name, FUNCTIONS[name](), next(iter(values.values())).dtype), read
    if name in RESHAPES:
        return _reshape(name, node, values), read
    if name in ADDS or name in FACTORS:
        return _arithmetic(name, node, values)
    if name in ("cat", "concat"):
        dim = _option(node, 1, "dim", 0)
        parts = list(args[0])
        dim = dim + values[node.name].dim() if dim < 0 else dim
        if dim == 0:
            raise ValueError(f"{node.name!r} concatenates over the batch, which is not bounded")
        return Concat(dim), parts
    if name == "getitem":
        return _slice(node), read
    if name == "pad":
        return _pad(node), read
    if name in ("new_zeros", "new_ones", "zeros_like"):
        return Constant(values[node.name][:1].double()), []
    if name == "mean" and _over_map(node):
        return _adaptive(
            lambda x: x.mean(dim=(2, 3), keepdim=bool(_option(node, 2, "keepdim", False))), node, values
        ), read
    if name == "adaptive_avg_pool2d":
        size = _option(node, 1, "output_size", None)
        return _adaptive(lambda x: F.adaptive_avg_pool2d(x, size), node, values), read
    if name == "max_pool2d":
        return _functional_max_pool(node), read
    if name == "avg_pool2d" and _option(node, 6, "divisor_override", None) is None:
        size = _pair(_option(node, 1, "kernel_size", None))
        stride = _option(node, 2, "stride", None)
        rest: Any = args[1:]
        options: Any = dict(node.kwargs)
        overlap = _overlap(size, _pair(stride or size))
        return Average(lambda x: F.avg_pool2d(x, *rest, **options), overlap, f"{rest} {options}"), read
    if name == "dropout" and _option(node, 2, "training", True) is False:
        return _reshape(name, node, values), read
    known = ", ".join(sorted({*FUNCTIONS, *RESHAPES, *ADDS, *FACTORS} | {"cat", "pad", "mean over the map", "pooling"}))
    raise ValueError(f"function {name!r} ({node.name}) is not bounded; of functions {known} are")


def _affine(name: str, module: nn.Linear | nn.Conv2d) -> Affine:
    weight = module.weight.detach().double().clone()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double().clone()
    window = None
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ValueError(f"layer {name!r} pads by {module.padding_mode!r}; only zeros are bounded")
        padding = module.padding if isinstance(module.padding, str) else _pair(module.padding)
        window = Window(_pair(module.stride), padding, _pair(module.dilation), module.groups)
    if not parametrize.is_parametrized(module, "weight"):
        return Affine(weight, bias, window, weight, torch.ones_like(bias))
    made: Any = module.parametrizations
    constants = ", ".join(f"{type(part).__name__} {settings(part)}" for step in made.weight for part in step.modules())
    return Affine(weight, bias, window, None, torch.ones_like(bias), constants)


def _norm(name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, dims: int) -> Norm:
    if module.running_var is None or module.running_mean is None:
        raise ValueError(f"layer {name!r} normalises by the batch, so that samples see each other; no bound")
    factor = (module.running_var.double() + module.eps).rsqrt()
    factor = factor if module.weight is None else factor * module.weight.detach().double()
    shift = -module.running_mean.double() * factor
    shift = shift if module.bias is None else shift + module.bias.detach().double()
    shape = (1, -1, *[1] * (dims - 2))
    return Norm(factor.view(shape), shift.view(shape), f"eps={module.eps}")


def _activation(name: str, module: nn.Module, dtype: torch.dtype) -> Activation:
    kind = type(module)
    slopes = {nn.LeakyReLU: "negative_slope", nn.ELU: "alpha", nn.CELU: "alpha"}
    lipschitz = CONSTANTS.get(kind)
    if isinstance(module, nn.PReLU):
        raise ValueError(f"layer {name!r} is a PReLU, whose slopes are weights and not bounded; use LeakyReLU")
    if lipschitz is None:
        known = ", ".join(sorted(kind.__name__ for kind in CONSTANTS))
        raise ValueError(
            f"layer {name!r} is a {kind.__name__}, which is not bounded; Linear, Conv2d, BatchNorm, pooling and "
            f"{known} are"
        )
    if isinstance(module, nn.Softplus):
        return _softplus(name, module, dtype)
    if kind in slopes:
        slope = float(getattr(module, slopes[kind]))
        if slope < 0:
            raise ValueError(f"layer {name!r} has {slopes[kind]} {slope}, so that it is not increasing; no bound")
        lipschitz = max(lipschitz, slope) if kind is not nn.CELU else lipschitz
    if getattr(module, "inplace", False):
        return Activation(_out_of_place(module), lipschitz, kind.__name__, settings(module))
    return Activation(module.forward, lipschitz, kind.__name__, settings(module))


def _softplus(name: str, module: nn.Softplus, dtype: torch.dtype) -> Activation:
    """Return log(1 + exp(beta x)) / beta itself: in the model's dtype the jump at its threshold is lost in rounding."""
    least = SMOOTH if dtype == torch.float64 else 20.0
    if module.threshold < least:
        raise ValueError(
            f"layer {name!r} has threshold {module.threshold}, where it jumps down; no bound below a threshold of "
            f"{least:g} in {str(dtype).removeprefix('torch.')}"
        )
    beta, threshold = module.beta, max(module.threshold, SMOOTH)
    return Activation(lambda x: F.softplus(x, beta, threshold), 1.0, "Softplus", settings(module))


def settings(module: nn.Module) -> str:
    """Return the plain attributes of a module that is no state, in words; not whether it works in place."""
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "inplace")}
    kept = sorted((k, v) for k, v in plain.items() if isinstance(v, (bool, int, float, str, tuple)))
    return " ".join(f"{key}={value!r}" for key, value in kept)


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x.clone())


def _max_pool(size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> MaxPool:
    return MaxPool(
        _pair(size), _pair(stride if stride is not None else size), _pair(padding), _pair(dilation), ceil_mode
    )


def _functional_max_pool(node: fx.Node) -> MaxPool:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    size, stride, padding, dilation, ceil_mode, indices = (
        _option(node, number, name, default)
        for number, (name, default) in enumerate(zip(names, (None, None, 0, 1, False, False), strict=True), start=1)
    )
    if indices or size is None:
        raise ValueError(f"function {node.name!r} is not bounded; max_pool2d without indices is")
    return _max_pool(size, stride, padding, dilation, bool(ceil_mode))


def _adaptive(function: Callable[[Tensor], Tensor], node: fx.Node, values: dict[str, Tensor]) -> Average:
    first: Any = node.args[0]
    source, out = values[first.name].shape, values[node.name].shape
    sizes = zip(source[2:], out[2:] if len(out) == 4 else (1, 1), strict=True)
    return Average(function, math.prod(shared_windows(*pair) for pair in sizes))


def shared_windows(source: int, out: int) -> int:
    """Return in how many of the ``out`` windows of an adaptive pooling over ``source`` values one of them can be."""
    windows = [(n * source // out, -(-(n + 1) * source // out)) for n in range(out)]
    return max(sum(low <= value < high for low, high in windows) for value in range(source))


def _over_map(node: fx.Node) -> bool:
    dims = _option(node, 1, "dim", None)
    return isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3}


def _reshape(name: str, node: fx.Node, values: dict[str, Tensor]) -> Move:
    out = values[node.name].shape
    if len(out) < 2 or out[0] != BATCH:
        raise ValueError(f"{name!r} ({node.name}) mixes the batch with the values of a sample, which is not bounded")
    rest = tuple(out[1:])
    return Move(lambda x: x.reshape(len(x), *rest))


def _slice(node: fx.Node) -> Move:
    index: Any = node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, (slice, int)) or part is Ellipsis for part in index)
    if not plain or index[0] != slice(None):
        raise ValueError(f"{node.name!r} is no plain slice of the values of a sample, which is not bounded")
    return Move(lambda x: x[index], repr(index))


def _pad(node: fx.Node) -> Move:
    pads, mode, value = (
        _option(node, i, n, d) for i, n, d in ((1, "pad", ()), (2, "mode", "constant"), (3, "value", 0))
    )
    if mode != "constant" or value:
        raise ValueError(f"{node.name!r} pads by {mode!r} {value or 0}; only zeros are bounded")
    return Move(lambda x: F.pad(x, pads), repr(tuple(pads)))


def _arithmetic(name: str, node: fx.Node, values: dict[str, Tensor]) -> tuple[Op, list[fx.Node]]:
    """Return a sum of two values, or what a number does to one."""
    if node.kwargs or len(node.args) != 2:
        raise ValueError(f"{node.name!r} has options that are not bounded")
    left: Any = node.args[0]
    right: Any = node.args[1]
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if both:
        same = values[left.name].shape == values[right.name].shape
        if name in ADDS and "sub" not in name and same:
            return Add(), [left, right]
        raise ValueError(
            f"{node.name!r} joins two values by {name} of other shapes or kinds; only equal ones added are bounded"
        )
    value, number = (left, right) if isinstance(left, fx.Node) else (right, left)
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError(f"{node.name!r} joins a value with a {type(number).__name__}; only numbers are bounded")
    factor, shift = 1.0, 0.0
    flipped = value is right
    if name in FACTORS:
        if "div" in name and (flipped or number == 0):
            raise ValueError(f"{node.name!r} divides by a value or by 0, which is not bounded")
        factor = 1.0 / number if "div" in name else float(number)
    elif "sub" in name:
        factor, shift = (-1.0, float(number)) if flipped else (1.0, -float(number))
    else:
        shift = float(number)
    plain = torch.ones((), dtype=torch.float64, device=values[node.name].device)
    return Scale(plain * factor, plain * shift, f"{factor!r} {shift!r}"), [value]


def _option(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _overlap(size: tuple[int, int], stride: tuple[int, int]) -> int:
    return math.prod(-(-k // s) for k, s in zip(size, stride, strict=True))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
