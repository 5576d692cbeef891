"""Channels of the residual stream of transformers, whose order is free where everything that touches them is known.

Embeddings begin the stream, every attention and MLP reads it and adds to it, norms scale it channel by channel, and the
head reads it at the end: one order for all of these, over the whole model. It is an exact symmetry because LayerNorm
and RMSNorm take sums over all channels, which no order changes.

Every parameter of a model must be named by its family, and every module must compute by code that is known; where
anything is left over, or what comes out of the model is the stream itself, the stream keeps its order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.models.channel_orders import ChannelOrders
from compress.models.symmetry import is_code_of, is_transposed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from typing import Any

    from torch import nn

    from compress.models.symmetry import Units

STREAM, POOLED, HEAD, TOKENS = "stream", "pooled", "head", "tokens"
SHARED_CODE = ("torch.nn.", "transformers.modeling_layers", "transformers.activations", "transformers.pytorch_utils")


@dataclass(frozen=True)
class Streams:
    """What the parameters of a family have along the channels of its stream; by the ends of their modules' names.

    Attributes:
        rows: layers that add to the stream, and norms over it. Their rows and biases lie along it.
        columns: layers that read it, tables of embeddings, and parameters whose last axis lies along it.
        neither: what has nothing of it: norms within a head, biases over tokens.
        between: layers from one set of channels to another, (rows, columns), such as those of a head.
        unless: set of channels -> modules of which it takes one; without, they are the stream itself.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    neither: tuple[str, ...] = ()
    between: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    unless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def ends(self) -> dict[str, tuple[str | None, str | None]]:
        """Name -> what lies along the rows, and along the columns."""
        return {
            **dict.fromkeys(self.rows, (STREAM, None)),
            **dict.fromkeys(self.columns, (None, STREAM)),
            **dict.fromkeys(self.neither, (None, None)),
            **self.between,
        }


def residual_units(model: Any, streams: Streams, code: Collection[str], tied: Mapping[str, str]) -> Iterator[Units]:
    """The channels of the stream, and those between it and the outputs; nothing where anything is not known.

    Args:
        model: of transformers.
        streams: of its family.
        code: the folders of `transformers.models` whose modules the family knows.
        tied: parameter -> the name its value is kept under.
    """
    places = _places(model, streams)
    if places is None or not _only_known(model, code) or not _ends_in_head(model, places):
        return iter(())
    kept = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    orders, groups = ChannelOrders(kept, both_axes=True), dict[str, int]()
    for name, along in places.items():
        name = tied.get(name, name)
        for axis, channels in along.items():
            size = kept[name].shape[axis]
            group = groups.setdefault(channels, len(groups))
            if group == len(orders.sizes):
                orders.new(size)
            if orders.sizes[group] != size:
                return iter(())
            orders.place(name, axis, group)
    return orders.free()


def _places(model: nn.Module, streams: Streams) -> dict[str, dict[int, str]] | None:
    """Parameter -> axis -> which channels lie along it; None where a parameter is not known."""
    modules, ends, found = dict(model.named_modules()), streams.ends(), dict[str, dict[int, str]]()
    lacking = {c: STREAM for c, makers in streams.unless.items() if not any(_ended(name, makers) for name in modules)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        itself, of_owner = _ended(name, ends), _ended(owner, ends)
        if itself is None and of_owner is None:
            return None
        rows, columns = ends[itself or of_owner or ""]
        first, last = (1, 0) if itself is None and is_transposed(modules[owner]) else (0, 1)
        if itself is not None:
            first, last = 0, parameter.dim() - 1
        if parameter.dim() == 1:  # a bias, or the scale of a norm
            columns, first = None, 0
        along = {axis: lacking.get(c, c) for axis, c in ((first, rows), (last, columns)) if c is not None}
        found[name] = along
    return found


def _ended(name: str, ends: Collection[str]) -> str | None:
    """The longest of some ends that a name has."""
    parts = name.split(".")
    return next((end for i in range(len(parts)) if (end := ".".join(parts[i:])) in ends), None)


def _only_known(model: nn.Module, code: Collection[str]) -> bool:
    """Whether every module computes as torch's own do, or by the code of a family."""
    return all(
        is_code_of(module, code) or type(module).forward.__module__.startswith(SHARED_CODE)
        for module in model.modules()
    )


def _ends_in_head(model: Any, places: Mapping[str, Mapping[int, str]]) -> bool:
    """Whether what comes out of a model is made by a layer that reads channels, and not the channels themselves."""
    inside = f"{model.base_model_prefix}."
    return model.base_model is not model and any(
        along and name.endswith(".weight") and not name.startswith(inside) for name, along in places.items()
    )
