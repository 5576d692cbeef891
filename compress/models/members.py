"""Modules of torch that hold several matrices and multiply with them themselves: attention, and recurrent layers.

Such a matrix is a site of its own. It is called as a layer in its place would be: `in_proj_weight` of `attention` is
the site `attention.in_proj`, and `weight_ih_l0` of `lstm` is `lstm.ih_l0`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
PACKED_FROM = "packed_from"  # the attribute of a module, of which matrices are packed, that says what its class was
OUT = "out_proj"  # a layer of attention, whose weight is read and which is never called


def is_attention(module: nn.Module) -> bool:
    """Whether it is attention as torch has it."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is a recurrent layer or cell as torch has it."""
    kinds = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    made = getattr(module, PACKED_FROM, type(module))
    return any(issubclass(made, kind) and made.forward is kind.forward for kind in kinds)


def members(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(what a matrix is called as a site, its name in the module) of every matrix that a module reads itself."""
    there = [leaf for leaf, value in module._parameters.items() if value is not None and value.dim() == 2]
    if is_attention(module):
        yield from ((leaf.removesuffix("_weight"), leaf) for leaf in there if leaf in PROJECTIONS)
    elif is_recurrent(module):
        yield from ((leaf.removeprefix("weight_"), leaf) for leaf in there if leaf.startswith("weight_"))


__all__ = ["OUT", "PACKED_FROM", "is_attention", "is_recurrent", "members"]
