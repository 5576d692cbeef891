"""How the blocks of a model are called, one after the other: whether they may be run without the model around them.

They may where each block's input is the output of the one before, and nothing else that a block is given depends on
what the blocks before it made. Blocks of several kinds (attention to all that was, or through a window) are given masks
and positions of their kind; what each is given is found without running any of them, by a model in which every block
passes on what arrives. Where a model wants more of its blocks (T5 hands the position biases that its first block makes
on to the others) they are run, and it is tried whether other hidden states would change what each is given.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.calibration.calls import same_call, split_arguments
from compress.calibration.collect import Stop, watched
from compress.errors import NonFiniteError
from compress.lazy import nn, torch

CHANGED = 0.75  # times the hidden states: others, and of about their size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from compress.calibration.calls import Call


@dataclass(frozen=True)
class Kinds:
    """What blocks are given beside hidden states.

    Attributes:
        of: for each block the first that is given the same.
        alone: it is known without running any block.
    """

    of: tuple[int, ...]
    alone: bool = True


def kinds_of_calls(forward: Callable[[], Any], model: nn.Module, names: Sequence[str]) -> Kinds | None:
    """What blocks are given beside hidden states; None where they cannot be run without the model around them.

    Args:
        forward: runs the model.
        model: that holds the blocks.
        names: of the blocks, in order.
    """
    blocks = [model.get_submodule(name) for name in names]
    # A tensor changed in place stays the same object; its version tells.
    visits: list[tuple[int, Any, Any, Call]] = []
    outputs: list[tuple[Any, Any]] = []

    def enter(i: int, hidden: Any, call: Call) -> None:
        visits.append((i, hidden, getattr(hidden, "_version", None), call))

    def leave(_: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        outputs.append((hidden, getattr(hidden, "_version", None)))

    watched(forward, blocks, enter, leave)
    if [i for i, *_ in visits] != list(range(len(blocks))) or not isinstance(visits[0][1], torch.Tensor):
        return None
    fed = all(
        hidden is output and version == then
        for (_, hidden, version, _), (output, then) in zip(visits[1:], outputs, strict=False)
    )
    if not fed:
        return None
    calls = [call for *_, call in visits]
    kinds = tuple(next(j for j in range(i + 1) if same_call(calls[j], call)) for i, call in enumerate(calls))
    if len(set(kinds)) == 1:
        return Kinds(kinds)
    for alone in (True, False):
        found = _calls_alone(forward, model, names) if alone else _calls_running(forward, model, names, change=True)
        if found is not None and all(same_call(a, b) for a, b in zip(calls, found[1], strict=True)):
            return Kinds(kinds, alone)
    return None


def arrivals_by_kind(
    forward: Callable[[], Any], model: nn.Module, names: Sequence[str], kinds: Kinds
) -> tuple[Tensor, dict[int, Call]]:
    """What arrives at the first block, and how the first block of each kind is called; no block is run if that will do.

    Args as of `kinds_of_calls`, which returned `kinds`.
    """
    alone = kinds.alone
    found = _calls_alone(forward, model, names) if alone else _calls_running(forward, model, names, change=False)
    if found is None:
        raise NonFiniteError("the first block was never reached by the calibration data")
    hidden, calls = found
    return hidden, {kind: calls[kind] for kind in dict.fromkeys(kinds.of)}


@contextmanager
def answering(model: nn.Module, names: Sequence[str], form: Callable[[Tensor], Any], last: Tensor) -> Iterator[None]:
    """While open, blocks pass on what arrives, and the last of them answers with hidden states that are known.

    Args:
        model: that holds the blocks.
        names: of the blocks, in order.
        form: hidden states as a block puts them out.
        last: what the last block makes.
    """
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name, block in before.items():
            known = last if name == names[-1] else None
            model.set_submodule(name, _stand_in(block, lambda *_: None, form, known))
        yield
    finally:
        for name, block in before.items():
            model.set_submodule(name, block)


def _calls_alone(
    forward: Callable[[], Any], model: nn.Module, names: Sequence[str]
) -> tuple[Tensor, list[Call]] | None:
    """The hidden states that reach the first block, and how each is called, while all pass on what arrives."""
    arrived: list[tuple[Any, Call]] = []

    def enter(hidden: Any, call: Call) -> None:
        arrived.append((hidden, call))
        if len(arrived) == len(names):
            raise Stop

    # A model may want more of a block than its hidden states.
    with _passing_on(model, names, enter), suppress(Stop, AttributeError, TypeError, ValueError, LookupError):
        forward()
    if len(arrived) != len(names) or not isinstance(arrived[0][0], torch.Tensor):
        return None
    return arrived[0][0], [call for _, call in arrived]


def _calls_running(
    forward: Callable[[], Any], model: nn.Module, names: Sequence[str], change: bool
) -> tuple[Tensor, list[Call]] | None:
    """The hidden states that reach the first block, and how each is called. `change`: each passes on other ones."""
    blocks = [model.get_submodule(name) for name in names]
    arrived: list[tuple[Any, Call]] = []

    def enter(_: int, hidden: Any, call: Call) -> None:
        arrived.append((hidden, call))

    watched(forward, blocks, enter, lambda _, hidden: CHANGED * hidden if change else None)
    if len(arrived) != len(names) or not isinstance(arrived[0][0], torch.Tensor):
        return None
    return arrived[0][0], [call for _, call in arrived]


@contextmanager
def _passing_on(model: nn.Module, names: Sequence[str], enter: Callable[[Any, Call], None]) -> Iterator[None]:
    """While open, blocks return what arrives, whatever their weights; a model still finds what else they have."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name, block in before.items():
            model.set_submodule(name, _stand_in(block, enter))
        yield
    finally:
        for name, block in before.items():
            model.set_submodule(name, block)


def _stand_in(
    block: nn.Module,
    enter: Callable[[Any, Call], None],
    form: Callable[[Tensor], Any] = lambda hidden: hidden,
    known: Tensor | None = None,
) -> nn.Module:
    """In the place of a block: says what arrives, and puts that out, or what is known of its output."""

    class StandIn(nn.Module):  # made here: torch is imported when it is first needed
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden, call = split_arguments(args, kwargs)
            enter(hidden, call)
            return form(hidden if known is None else known)

        def __getattr__(self, name: str) -> Any:
            return getattr(block, name)

    return StandIn()
