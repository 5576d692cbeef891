"""Channels whose order is free in networks of convolutions and linear layers, found by following them through a trace.

A layer makes new channels, the next one reads them, and what works on each channel by itself lets them through: norms,
activations, pooling. Where two are added they share one order, as in a residual stream. Whatever is not known to let
them through, and what goes out, keeps its order.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.nn import functional

from compress.lazy import torch
from compress.models.channel_orders import ChannelOrders
from compress.models.symmetry import Units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BY_CHANNEL: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.Dropout2d),
)
POOLING: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)
FUNCTIONS = {
    *(functional.relu, torch.relu, functional.gelu, functional.silu, functional.leaky_relu, functional.hardswish),
    *(torch.tanh, torch.sigmoid, functional.tanh, functional.sigmoid, functional.dropout),
}
POOLING_FUNCTIONS = {
    *(functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.max_pool2d),
}
ORDER_FREE_METHODS = {"relu", "tanh", "sigmoid", "contiguous"}
TOGETHER = {
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    torch.add,
    torch.mul,
    "add",
    "mul",
    "add_",
    "mul_",
}
ASKING = {"size", "dim"}  # of shapes, which the order of channels does not change


def trace(model: nn.Module, owner: str, tied: Mapping[str, str]) -> Iterator[Units]:
    """What of one module of a model may be put in another order; nothing where it cannot be traced.

    Args:
        model: that holds it.
        owner: the module's full name.
        tied: parameter -> the name its value is kept under.
    """
    module = model.get_submodule(owner)
    given = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in given if p.default is not inspect.Parameter.empty}
    try:
        traced = fx.Tracer().trace(module, concrete_args=defaults or None)
    except Exception:  # the model's own code, which may do anything with what stands in for its inputs
        return iter(())
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    found = _Channels(dict(module.named_modules()), ChannelOrders(tensors)).of(traced)
    prefix = f"{owner}." if owner else ""
    return (_renamed_units(units, prefix, tied) for units in found)


def _renamed_units(units: Units, prefix: str, tied: Mapping[str, str]) -> Units:
    names = ((place, f"{prefix}{place.tensor}") for place in units.places)
    return Units(tuple(replace(place, tensor=tied.get(name, name)) for place, name in names))


@dataclass(frozen=True)
class _Signal:
    """The channels of an intermediate result: `group` is their number, `layout` where they stand.

    In `images` they are the second dimension, in `features` the last, in `rows` the second and last, each a run of
    neighbours as flattening leaves them.
    """

    group: int
    layout: str


@dataclass
class _Channels:
    """Follows channels from node to node."""

    modules: dict[str, nn.Module]
    orders: ChannelOrders

    def of(self, traced: fx.Graph) -> Iterator[Units]:
        """Follow the channels through a trace."""
        signals: dict[fx.Node, _Signal | None] = {}
        for node in traced.nodes:
            arrived = [s for n in node.all_input_nodes if (s := signals[n]) is not None]
            signals[node] = self._through(node, arrived)
        return self.orders.free()

    def _through(self, node: fx.Node, arrived: list[_Signal]) -> _Signal | None:
        target: Any = node.target
        if node.op == "get_attr":  # a parameter that is used by itself
            self.orders.alone.add(id(self.orders.tensors.get(target)))
            return None
        if node.op == "call_module":
            return self._module(target, self.modules[target], arrived, single=len(node.args) == 1 and not node.kwargs)
        if node.op in ("call_function", "call_method"):
            return self._function(node, target, arrived)
        return self._stop(arrived)

    def _module(self, name: str, module: nn.Module, arrived: list[_Signal], single: bool) -> _Signal | None:
        signal, kind = arrived[0] if arrived else None, type(module)
        if not single:
            return self._stop(arrived)
        if type(module) is nn.Conv2d and module.groups == 1:
            self._read(name, signal, ("images",))
            return self._made(name, module.out_channels, "images")
        if type(module) is nn.Linear and (signal is None or signal.layout != "images"):
            self._read(name, signal, ("features", "rows"))
            return self._made(name, module.out_features, "features")
        if signal is None:
            return None
        images = signal.layout == "images"
        if kind in NORMS or (images and _by_channel(module)) or (not images and _of_last(module)):
            return self._along(name, signal)
        if kind in BY_CHANNEL or (images and kind in POOLING):
            return signal
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flat(signal)
        return self._stop(arrived)

    def _function(self, node: fx.Node, target: Any, arrived: list[_Signal]) -> _Signal | None:
        if not arrived or target in ASKING or (target is getattr and node.args[1] in ("shape", "ndim")):
            return None
        signal, inputs = arrived[0], len(node.all_input_nodes)
        if target in TOGETHER and len(arrived) == inputs:
            return self._together(arrived) if inputs == 2 else signal
        if target in FUNCTIONS or target in ORDER_FREE_METHODS:
            return signal
        if target in POOLING_FUNCTIONS and signal.layout == "images":
            return signal
        if target in (torch.flatten, "flatten") and node.args[1:] in ((1,), (1, -1)) and not node.kwargs:
            return self._flat(signal)
        if target in ("view", "reshape") and _keeps_samples(node):
            return self._flat(signal)
        if target in ("mean", torch.mean) and signal.layout == "images" and _over_positions(node):
            return replace(signal, layout="rows")
        return self._stop(arrived)

    def _together(self, arrived: list[_Signal]) -> _Signal | None:
        first, second = arrived
        if first.layout != second.layout or self.orders.sizes[first.group] != self.orders.sizes[second.group]:
            return self._stop(arrived)
        self.orders.join(first.group, second.group)
        return first

    def _flat(self, signal: _Signal) -> _Signal | None:
        if signal.layout == "features":  # of several positions the features would not stay neighbours
            return self._stop([signal])
        return replace(signal, layout="rows")

    def _read(self, name: str, signal: _Signal | None, layouts: tuple[str, ...]) -> None:
        if signal is not None:
            if signal.layout not in layouts:
                self._stop([signal])
            self.orders.place(f"{name}.weight", 1, signal.group)

    def _made(self, name: str, channels: int, layout: str) -> _Signal:
        signal = _Signal(self.orders.new(channels), layout)
        self._along(name, signal)
        return signal

    def _along(self, name: str, signal: _Signal) -> _Signal:
        """What a layer has for each channel moves with it."""
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if getattr(self.modules[name], leaf, None) is not None:
                self.orders.place(f"{name}.{leaf}", 0, signal.group)
        return signal

    def _stop(self, signals: list[_Signal]) -> _Signal | None:
        """What is not known to let channels through: they keep their order."""
        self.orders.fixed |= {signal.group for signal in signals}
        return None


def _by_channel(module: nn.Module) -> bool:
    """Whether a convolution works on each channel by itself."""
    return type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels


def _of_last(module: nn.Module) -> bool:
    """Whether a norm is over the last dimension alone."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1


def _keeps_samples(node: fx.Node) -> bool:
    """Whether a view leaves the first dimension and flattens all others: x.view(x.size(0), -1)."""
    shape = node.args[1:]
    if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
        return False
    first = shape[0]
    if first.target == "size":
        return first.args == (node.args[0], 0)
    if first.target is not operator.getitem or first.args[1] != 0:
        return False
    whole = first.args[0]
    return isinstance(whole, fx.Node) and whole.target in (getattr, "size") and whole.args[0] is node.args[0]


def _over_positions(node: fx.Node) -> bool:
    """Whether a mean is over height and width and leaves (samples, channels)."""
    over: Any = node.kwargs.get("dim", node.args[1] if len(node.args) == 2 else ())
    return isinstance(over, list | tuple) and list(over) in ([2, 3], [-2, -1]) and not node.kwargs.get("keepdim")
