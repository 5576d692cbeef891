"""How a block was called: everything but its hidden states, and the same call for other samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModelError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

BY_HEAD = "alibi"  # an argument of (samples times heads, 1, length), in Bloom and Falcon


@dataclass(frozen=True)
class Place:
    """A module that has parameters in common with a block, where those are used another time.

    Attributes:
        module: that is called.
        names: parameter in the block -> what the module calls it; those that it does not have are left out.
    """

    module: nn.Module
    names: Mapping[str, str]


@dataclass
class Call:
    """How a block was called: everything but its hidden states.

    Attributes:
        dim: of hidden states as the model has them, that counts samples. Here samples always come first.
        visit: how many calls of the block came before it in the same forward pass.
        place: that was called instead of the block.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dim: int = 0
    visit: int = 0
    place: Place | None = None

    def run(self, block: nn.Module, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output hidden states for other input hidden states, and other parameters by name."""
        if weights is None:
            return self.samples_first(self.whole(block, hidden))
        module, values = block, dict(weights)
        if self.place is not None:
            names = self.place.names
            module, values = self.place.module, {names[n]: v for n, v in weights.items() if n in names}
        arguments = (self.as_called(hidden.clone()), *self.args)
        return self.samples_first(torch.func.functional_call(module, values, arguments, self.kwargs))

    def whole(self, block: nn.Module, hidden: Tensor) -> Any:
        """All that the block puts out for other input hidden states, as the model has it."""
        module = block if self.place is None else self.place.module
        hidden = self.as_called(hidden.clone())  # it may begin with a layer that works in place
        return module(hidden, *self.args, **self.kwargs)

    def as_called(self, hidden: Tensor) -> Tensor:
        """Hidden states, samples first, as the model has them."""
        return hidden.movedim(0, self.dim).contiguous() if self.dim else hidden

    def samples_first(self, output: Any) -> Tensor:
        """The hidden states in a block's output, samples first."""
        return hidden_of(output).movedim(self.dim, 0)

    def resized(self, size: int, count: int) -> Call:
        """The same call for `count` samples instead of `size`: tensors with an entry per sample repeat their first."""
        args = tuple(_resized(a, size, count) for a in self.args)
        kwargs = {k: _resized(v, size, count, k == BY_HEAD) for k, v in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)


def _resized(value: Any, size: int, count: int, by_head: bool = False) -> Any:
    if by_head and isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] % size == 0:
        return value[: value.shape[0] // size].repeat(count, 1, 1)
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size > 1:
        return value[:1].expand(count, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(_resized(v, size, count) for v in value)
    if isinstance(value, Mapping):
        return _like(value, {name: _resized(inner, size, count) for name, inner in value.items()})
    return value


def _like(value: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """Other entries in a mapping of the same kind: a model may ask for more than its entries."""
    return entries if type(value) is dict else type(value)(entries)  # type: ignore[call-arg]


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
    return replace(calls[0], args=tuple(args), kwargs=kwargs)


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
    elif isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise ValueError("an argument has other entries from batch to batch")
        return _like(first, {name: _mixed([value[name] for value in values], sizes, places) for name in first})
    if not all(_same(first, value) for value in values):
        raise ValueError("an argument differs from batch to batch")
    return first


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple.

    Raises:
        UnsupportedModelError: they are somewhere else.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor):
        raise UnsupportedModelError(
            f"a block puts out a {type(first).__name__} instead of hidden states, so it cannot be run on its own; use "
            "a method that does not learn by reconstruction, such as gptq"
        )
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
        and a.place == b.place
        and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))
        and all(_same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a is b or (a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a))
    return a is b or bool(a == b)
