"""What the matrices of torch's attention are multiplied with, from what the module is called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.lazy import torch
from compress.models.members import OUT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

INPUTS = ("query", "key", "value")


def input_of(module: nn.Module, leaf: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of one matrix of an attention module; None where its rows have no common one.

    Args:
        module: an `nn.MultiheadAttention`.
        leaf: the last part of the name of a site.
        args, kwargs: what it is called with.
    """
    given = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
    query, key, value = (given[name] for name in INPUTS)
    if leaf == OUT:
        return _attended(module, args, kwargs)
    if leaf == "in_proj":
        same: Tensor | None = query if query is key and key is value else None
        return same
    own: Tensor = {"q_proj": query, "k_proj": key, "v_proj": value}[leaf]
    return own


def _attended(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What arrives at the output projection: what the module gives when that changes nothing."""
    out = module.get_submodule(OUT)
    weight, bias = out._parameters["weight"], out._parameters["bias"]
    assert weight is not None
    values: dict[str, Any] = out._parameters
    values["weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    values["bias"] = None if bias is None else torch.zeros_like(bias)
    try:
        made: Tensor = module.forward(*args, **kwargs)[0]  # without the hooks, of which the caller is one
    finally:
        values["weight"], values["bias"] = weight, bias
    return made


__all__ = ["input_of"]
