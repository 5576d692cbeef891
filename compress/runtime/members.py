"""Matrices that a module of torch reads itself, packed in memory: attention and recurrent layers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.members import PACKED_FROM, members
from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.encodings import Spec


class PackedMatrix(PackedModule):
    """Stands for a parameter of its owner, which is given the dequantized matrix whenever it reads that."""

    like: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype):
        """`dtype`: of the parameter; it follows `model.to(...)` as a parameter does."""
        super().__init__(spec, bias=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def value(self) -> Tensor:
        """(out, in), in the type the model has."""
        return self.dequantize().to(self.like.dtype)


class _PackedRecurrent:
    """Goes before a recurrent class: keeps a list of its matrices for no longer than a call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made: Any = self
        made._init_flat_weights()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            forget_matrices(made)

    def _update_flat_weights(self) -> None:
        """They are there: see `forward`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        made: Any = self
        super()._apply(fn, recurse)  # type: ignore[misc]
        forget_matrices(made)
        return self


def forget_matrices(layer: nn.RNNBase) -> None:
    """Keep nothing in the list that a recurrent layer has of its matrices and biases."""
    layer._flat_weights = [None] * len(layer._flat_weights_names)
    layer._flat_weight_refs = [None] * len(layer._flat_weights_names)


def is_member(model: nn.Module, name: str) -> bool:
    """Whether a site is a matrix that its module reads itself."""
    owner, _, child = name.rpartition(".")
    return any(child == each for each, _ in members(model.get_submodule(owner)))


def pack_member(model: nn.Module, name: str, spec: Spec) -> None:
    """Put an empty packed matrix, on the device of the parameter, in the place of a parameter."""
    path, _, child = name.rpartition(".")
    owner = model.get_submodule(path)
    leaf = dict(members(owner))[child]
    old = owner._parameters.pop(leaf)
    assert old is not None
    with torch.device(old.device):
        made = PackedMatrix(spec, old.dtype)
    kind = type(owner)
    reads = {leaf: property(partial(_value_of, child=child))}
    if not hasattr(kind, PACKED_FROM):
        own = (_PackedRecurrent, kind) if isinstance(owner, nn.RNNBase) else (kind,)
        reads[PACKED_FROM] = kind  # type: ignore[assignment]
        kind = type(f"Packed{kind.__name__}", own, reads)
    else:
        kind = type(kind.__name__, (kind,), reads)
    owner.__class__ = kind
    owner.add_module(child, made)
    owner._is_hf_initialized = True  # type: ignore[assignment]  # its class, or its parent's, would fill the parameter
    if isinstance(owner, nn.RNNBase):
        forget_matrices(owner)


def _value_of(owner: nn.Module, child: str) -> Tensor:
    made = owner._modules[child]
    assert isinstance(made, PackedMatrix)
    return made.value


__all__ = ["PackedMatrix", "is_member", "pack_member"]
