"""The experts of a mixture in a graph: each takes the tokens that were sent to it, and adds what it makes of them.

A model's own code looks, while it runs, which experts are wanted. A graph cannot; so every expert stands in it, with as
many rows as it is sent tokens, which may be none.

Shapes: T tokens, k experts of each, E experts, H width of the model, O out and I in features of a matrix of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.export.onnx.placed import LINEAR, placed
from compress.models.experts import CHOICES, keeps_transposed, mixtures, says_how

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir as ir
    from torch import Tensor

    from compress.export.onnx.ops import Ops
    from compress.models.graph import Graph

TAKE, ADD = "Take", "Add"  # placeholders: the tokens of an expert; what it made of them, added up


def place_experts(graph: Graph, packed: Collection[str]) -> None:
    """Put what a graph can hold in the place of the modules of experts of a model.

    Args:
        graph: of the model, which is changed.
        packed: names of the sites that are packed.
    """
    whole = {site.parameter for site in graph.sites if site.is_expert and site.name in packed}
    for name, module in mixtures(graph.model).items():
        if says_how(module):
            graph.model.set_submodule(name, PlacedExperts(name, module, whole))


class PlacedExperts(nn.Module):
    """Computes what a module of experts does, one expert after the other, in the order of their numbers."""

    def __init__(self, name: str, experts: nn.Module, packed: Collection[str]):
        super().__init__()
        self.name, self.packed, self.transposed = name, packed, keeps_transposed(experts)
        self.first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.count = len(getattr(experts, self.first))
        self.rows: dict[str, int] = {}  # of a matrix (out, in), by parameter
        for leaf in (self.first, "down_proj"):
            shape = getattr(experts, leaf).shape
            self.rows[leaf] = shape[2] if self.transposed else shape[1]
        self.__dict__["experts"] = experts  # not one of the modules: what it has keeps its name
        self._modules.update(experts._modules)
        self._parameters.update({k: p for k, p in experts._parameters.items() if f"{name}.{k}" not in packed})

    def forward(self, hidden_states: Tensor, *choice: Tensor, **named: Tensor) -> Tensor:
        """(T, H), experts of each token (T, k), how much they count (T, k) -> (T, H)."""
        chosen, counts = choice if choice else next((named[i], named[w]) for i, w in CHOICES.items() if i in named)
        experts: Any = self.experts
        # One column more: for numbers behind those of the experts, which stand for none.
        blank = hidden_states.new_zeros((hidden_states.shape[0], self.count + 1))
        each = blank.scatter_add(1, chosen, counts.to(hidden_states.dtype))
        total = torch.zeros_like(hidden_states)
        for number in range(self.count):
            site, share = f"{self.name}.{number}", each[:, number]
            tokens = placed(TAKE, (hidden_states, share), site, tuple(hidden_states.shape))
            made = self._product(self.first, number, tokens)
            made = experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
            made = self._product("down_proj", number, made)
            if getattr(experts, "has_post_expert_norm", False):
                made = self.post_expert_norm(made)
            total = placed(ADD, (total, made, share), site, tuple(hidden_states.shape))
        return total

    def _product(self, leaf: str, number: int, x: Tensor) -> Tensor:
        parameter = f"{self.name}.{leaf}"
        if parameter in self.packed:
            made = placed(LINEAR, (x,), f"{parameter}.{number}", (*x.shape[:-1], self.rows[leaf]))
        else:
            matrix = getattr(self, leaf)[number]
            made = x @ (matrix if self.transposed else matrix.T)
        return made + getattr(self, f"{leaf}_bias")[number] if self.experts.has_bias else made


def taken(ops: Ops, x: ir.Value, share: ir.Value) -> ir.Value:
    """(T, H), (T,) how much an expert counts for each token -> the rows of those for which it counts."""
    return ops.op("GatherND", x, _places(ops, share))


def added(ops: Ops, total: ir.Value, made: ir.Value, share: ir.Value) -> ir.Value:
    """(T, H), rows that `taken` took and an expert changed, (T,) -> (T, H), with as much of them as it counts."""
    places = _places(ops, share)
    counts = ops.op("Unsqueeze", ops.op("GatherND", share, places), ops.ints(-1))
    return ops.op("ScatterND", total, places, ops.op("Mul", made, counts), reduction="add")


def _places(ops: Ops, share: ir.Value) -> ir.Value:
    """(rows, 1) int64: where an expert counts."""
    return ops.op("Transpose", ops.op("NonZero", share), perm=[1, 0])
