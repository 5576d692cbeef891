"""How a block was called: everything but its hidden states, and the same call for other samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

BY_HEAD = "alibi"  # an argument of (samples times heads, 1, length), in Bloom and Falcon


@dataclass
class Call:
    """How a block was called: everything but its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output hidden states for other input hidden states, and other parameters by name."""
        if weights is None:
            return hidden_of(self.whole(block, hidden))
        hidden = hidden.clone()
        return hidden_of(torch.func.functional_call(block, dict(weights), (hidden, *self.args), self.kwargs))

    def whole(self, block: nn.Module, hidden: Tensor) -> Any:
        """All that the block puts out for other input hidden states."""
        return block(hidden.clone(), *self.args, **self.kwargs)  # it may begin with a layer that works in place

    def resized(self, size: int, count: int) -> Call:
        """The same call for `count` samples instead of `size`: tensors with an entry per sample repeat their first."""
        args = tuple(_resized(a, size, count) for a in self.args)
        return Call(args, {k: _resized(v, size, count, k == BY_HEAD) for k, v in self.kwargs.items()})


def _resized(value: Any, size: int, count: int, by_head: bool = False) -> Any:
    if by_head and isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] % size == 0:
        return value[: value.shape[0] // size].repeat(count, 1, 1)
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size > 1:
        return value[:1].expand(count, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(_resized(v, size, count) for v in value)
    return value


def mixed(calls: Sequence[Call], sizes: Sequence[int], places: Sequence[tuple[int, int]]) -> Call:
    """The call for samples of several batches, each with the arguments that it came with.

    Args:
        calls: of every batch.
        sizes: how many samples each has.
        places: (batch, row) of every sample.

    Raises:
        ValueError: an argument differs from batch to batch, and has no entry for each sample.
    """
    if len({(len(call.args), tuple(call.kwargs)) for call in calls}) > 1:
        raise ValueError("other arguments")
    args = (_mixed([call.args[i] for call in calls], sizes, places) for i in range(len(calls[0].args)))
    kwargs = {name: _mixed([call.kwargs[name] for call in calls], sizes, places) for name in calls[0].kwargs}
    return Call(tuple(args), kwargs)


def _mixed(values: Sequence[Any], sizes: Sequence[int], places: Sequence[tuple[int, int]]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(values) > 1 and all(_same(first, value) for value in values):  # it has no entry for each sample, then
            alike = first.dim() > 0 and bool((first == first[:1]).all())
            return _resized(first, sizes[0], len(places)) if alike else first
        if len(shapes) == 1 and all(v.dim() and len(v) == size for v, size in zip(values, sizes, strict=True)):
            return torch.stack([values[batch][row] for batch, row in places])
    elif isinstance(first, tuple | list):
        return tuple(_mixed(inner, sizes, places) for inner in zip(*values, strict=True))
    elif isinstance(first, dict):
        return {name: _mixed([value[name] for value in values], sizes, places) for name in first}
    if not all(_same(first, value) for value in values):
        raise ValueError("an argument differs from batch to batch")
    return first


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(first, torch.Tensor)
    return first


def split_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    """The hidden states of a call, and everything else in it."""
    # A live key/value cache among the arguments would grow at every visit and silently corrupt the calibration.
    clean = {k: v for k, v in kwargs.items() if not _is_cache(v) and k != "hidden_states"}
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden, Call(tuple(None if _is_cache(a) else a for a in args[1:]), clean)


def _is_cache(value: Any) -> bool:
    return any(base.__name__ == "Cache" for base in type(value).__mro__)


def same_call(a: Call, b: Call) -> bool:
    """Whether two calls have equal arguments."""
    return (
        len(a.args) == len(b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))
        and all(_same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)
