"""Logits of a language model for some positions at a time: with a large vocabulary a batch's are larger than the model.

A model is stopped where its body (everything before the head) is done. Then the model itself is called once for each
piece of what came out, its body answering with that piece: whatever a family does to its logits is done to them all.

Shapes: B windows of T tokens, H numbers of a hidden state, V tokens of a vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.io.heap import bound_heap
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

WHOLE = 1 << 25  # logits of a batch that are computed at once, while measuring: 128 MB
WHOLE_LEARNED = 1 << 24  # the same while learning, where gradients come on top: 64 MB
MAIN = ("logits", "logits_per_image", "last_hidden_state")
PIECE = 1 << 23  # logits of a piece of a batch that has more: 32 MB


def logits_in(output: Any) -> Tensor:
    """The logits of a model's output; without any, what its last layer makes, else the first tensor in it."""
    if isinstance(output, torch.Tensor):
        return output
    named = (getattr(output, name, None) for name in MAIN)
    found = next((value for value in named if isinstance(value, torch.Tensor)), None)
    return next(tensors_in(output)) if found is None else found


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor of numbers in what a model returns."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)


def words(model: nn.Module) -> int | None:
    """How many token ids a model looks up; None where neither a table nor its configuration says."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        config: Any = getattr(model, "config", None)
        return getattr(config and config.get_text_config(), "vocab_size", None)
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def vocabulary(model: nn.Module) -> int:
    """How many logits a language model has at each position; 0 where it has no head that it names."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if head is None:
        return 0
    rows = int(getattr(head, "out_features", 0))  # first: the weight of a packed head is made when it is asked for
    weight = None if rows else getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    return rows or int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]


def bodies(model: nn.Module) -> tuple[nn.Module, ...]:
    """Modules one of which ends in what the head reads, the outermost first; none where none is known."""
    base: Any = getattr(model, "base_model", model) if vocabulary(model) else model
    inside = base.get_decoder() if hasattr(base, "get_decoder") else base  # OPT calls this one, and not its base
    return tuple(body for body in dict.fromkeys((base, inside)) if body is not model)


def rows_at_once(rows: int, width: int, whole: int | None = None) -> int:
    """For how many positions of `rows` logits are computed at a time: all or a piece.

    Args:
        rows: positions.
        width: logits of each.
        whole: how many logits are not too many for all; WHOLE by default.
    """
    return rows if rows * width <= (whole or WHOLE) else max(1, PIECE // width)


@dataclass(frozen=True)
class Body:
    """A model that was stopped before its head.

    Attributes:
        module: that ended in what the head reads.
        output: what it returned.
        call: runs the model on the same batch again.
    """

    module: nn.Module
    output: Any
    call: Callable[[], Any]

    @property
    def hidden(self) -> Tensor:
        """(B, T, H)."""
        found: Tensor = self.output[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V)."""
        answer = copy.copy(self.output)
        answer.last_hidden_state = hidden[None]
        with runs(self.module, lambda *_, **__: answer):
            return logits_in(self.call())[0]


class _Stop(Exception):
    """What the head reads is known; the rest is not run."""


def stopped(model: nn.Module, call: Callable[[], Any]) -> Body | Tensor:
    """Run a model on a batch and stop before its head; all of its logits where it has no body that is known.

    Args:
        model: a language model.
        call: runs it on the batch.
    """
    entered: list[nn.Module] = []
    found: list[Body] = []

    def stopping(body: nn.Module) -> Callable[..., Any]:
        inner = body.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            outermost = not entered
            entered.append(body)
            output = inner(*args, **kwargs)
            if not outermost or not hasattr(output, "last_hidden_state"):
                return output
            found.append(Body(body, output, call))
            raise _Stop

        return run

    try:
        with ExitStack() as stack:
            for body in bodies(model):
                stack.enter_context(runs(body, stopping(body)))
            return logits_in(call())
    except _Stop:
        return found[0]


def logits_of(
    model: nn.Module,
    call: Callable[[], Any],
    tokens: Tensor,
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor | Iterator[Tensor]:
    """Logits of a batch, whole or in pieces: never very many where the model can be stopped before its head.

    Args:
        model: a language model.
        call: runs it on the batch.
        tokens: (B, T) of the batch.
        hold: while open, parts of the model that are brought into memory stay there.

    Returns:
        (B, T, V), or (n, V) in turn for the positions that predict a token of the batch: all but the last of a window.
    """
    rows = rows_at_once(tokens.numel(), vocabulary(model))
    if rows == tokens.numel():
        return logits_in(call())
    bound_heap()  # pieces come and go, and some of what is made of them stays
    body = stopped(model, call)
    return _pieces(body, rows, hold) if isinstance(body, Body) else body


def pieces(found: Tensor | Iterator[Tensor]) -> Iterator[Tensor]:
    """What `logits_of` gives, in turn also where it is whole."""
    return iter((found,)) if isinstance(found, torch.Tensor) else found


def _pieces(body: Body, rows: int, hold: Callable[[], AbstractContextManager[None]]) -> Iterator[Tensor]:
    with hold():
        for hidden in torch.split(body.hidden[:, :-1].flatten(0, 1), rows):
            yield body.logits(hidden)


@contextmanager
def runs(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a module runs this in the place of its own forward."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


__all__ = [
    "Body", "bodies", "logits_in", "logits_of", "pieces", "rows_at_once", "runs", "stopped", "tensors_in", "vocabulary",
]  # fmt: skip
