"""The loss of a language model, and its gradients, without all of a batch's logits at a time.

Logits of some positions are computed, summed up to a loss and forgotten, and computed again where gradients need them.

Shapes: B windows of T tokens, n positions, H numbers of a hidden state, V tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from compress.engine.learned_values import swapped, with_learned
from compress.models.logits import WHOLE_LEARNED, Body, rows_at_once, stopped, vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn

    from compress.engine.context import Context


@dataclass(frozen=True)
class BeforeHead:
    """What the head of a model reads, and all that comes after.

    Attributes:
        model: that was stopped before its head.
        body: what it did before; None where it could not be stopped.
        rows: (B, T, H) that its head reads; its logits (B, T, V) where it could not be stopped.
        outside: parameter -> value, of those that are not in the body, as they were when the model ran.
    """

    model: nn.Module
    body: Body | None
    rows: Tensor
    outside: Mapping[str, Tensor]

    def logits(self, rows: Tensor) -> Tensor:
        """(n, H) -> (n, V) float32."""
        if self.body is None:
            return rows.float()
        with swapped(self.model, self.outside):
            return self.body.logits(rows).float()


def rows_before_head(
    context: Context, batch: Tensor, values: Callable[[Collection[str]], Mapping[str, Tensor]], again: bool
) -> BeforeHead:
    """Run a model that is in memory until its head. The arguments are those of `with_learned`.

    Args:
        context: of the model.
        batch: (B, T) token ids.
        values: names of sites and vectors -> values by parameter name.
        again: recompute what is inside blocks when gradients need it.
    """
    model = context.graph.model
    with with_learned(context.graph, values, again):
        found = stopped(model, lambda: context.forward(batch))
        if not isinstance(found, Body):
            return BeforeHead(model, None, found, {})
        inside = {id(module) for module in found.module.modules()}
        outside = {
            f"{prefix}.{leaf}" if prefix else leaf: value
            for prefix, module in model.named_modules()
            if id(module) not in inside
            for leaf, value in module._parameters.items()
            if value is not None
        }
    return BeforeHead(model, found, found.hidden, outside)


def loss_in_pieces(own: BeforeHead, meant: BeforeHead | Tensor) -> Tensor:
    """The mean loss over positions, differentiable in what the model learns.

    Args:
        own: of the model that learns.
        meant: token ids (B, T) that it is to predict, for the cross entropy; or a model whose predictions it is to
            make, for the divergence from it.
    """
    if isinstance(meant, BeforeHead):
        rows, targets, of_piece = own.rows.flatten(0, 1), meant.rows.flatten(0, 1), _divergence(own, meant)
    else:
        rows, targets, of_piece = own.rows[:, :-1].flatten(0, 1), meant[:, 1:].flatten(), _cross_entropy(own)
    size = rows_at_once(len(rows), vocabulary(own.model), WHOLE_LEARNED)
    total = torch.zeros((), device=rows.device)
    for part, target in zip(torch.split(rows, size), torch.split(targets, size), strict=True):
        total = total + checkpoint(of_piece, part, target, use_reentrant=False)
    return total / len(rows)


def _cross_entropy(own: BeforeHead) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rows, tokens: cross_entropy(own.logits(rows), tokens, reduction="sum")


def _divergence(own: BeforeHead, meant: BeforeHead) -> Callable[[Tensor, Tensor], Tensor]:
    def of_piece(rows: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            there = log_softmax(meant.logits(wanted), -1)
        return kl_div(log_softmax(own.logits(rows), -1), there, reduction="sum", log_target=True)

    return of_piece
