"""Everything that hooks into a running model: the only file that registers hooks, beside `runtime/cache.py`.

Every hook is removed again, but for those of `quantize_inputs`, which are part of a compressed model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from compress.calibration.attention import input_of
from compress.calibration.calls import hidden_of, split_arguments
from compress.calibration.sums import Sums
from compress.calibration.windows import windows_of
from compress.errors import NonFiniteError
from compress.models.members import is_attention
from compress.runtime.cache import change_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from compress.calibration.calls import Call
    from compress.calibration.experts import FusedParameter, See
    from compress.calibration.statistics import Need, Statistics
    from compress.runtime.cache import ChangeCache

RoundInputs: TypeAlias = "Callable[[Tensor], Tensor]"


class Stop(Exception):
    """Ends a forward pass once what was wanted is known."""


def arrival(forward: Callable[[], Any], block: nn.Module) -> tuple[Tensor, Call]:
    """Run `forward` until it reaches `block`; the hidden states and other arguments it arrives with."""
    caught: list[tuple[Tensor, Call]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(split_arguments(args, kwargs))
        raise Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)  # before inputs are rounded
    try:
        with suppress(Stop):
            forward()
    finally:
        handle.remove()
    if not caught:
        raise NonFiniteError("the first block was never reached by the calibration data")
    return caught[0]


def visits(
    forward: Callable[[], Any],
    blocks: list[nn.Module],
    enter: Callable[[int, Tensor], None],
    leave: Callable[[int, Tensor], None],
) -> list[int]:
    """Run `forward`; each block's number and hidden states are told when it is entered and left.

    Returns:
        The numbers of the blocks in the order they ran.
    """
    seen: list[int] = []

    def entered(i: int, hidden: Any, _: Call) -> None:
        seen.append(i)
        enter(i, hidden)

    watched(forward, blocks, entered, lambda i, hidden: leave(i, hidden_of(hidden)))
    return seen


@dataclass
class Visit:
    """One call of a module.

    Attributes:
        number: of the module.
        hidden: what it was called with, as it was then.
        call: what else it was called with.
        output: what it put out.
    """

    number: int
    hidden: Any
    call: Call
    output: Any = None


def calls_of(forward: Callable[[], Any], modules: Sequence[nn.Module], once: bool = False) -> list[Visit]:
    """Run `forward`, to the end of the first call if there is only one (`once`); every call of some modules."""
    seen: list[Visit] = []
    handles = []
    for i, module in enumerate(modules):

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
            hidden, call = split_arguments(args, kwargs)
            kept = {name: _as_now(value) for name, value in call.kwargs.items()}
            seen.append(Visit(i, _copied(hidden), replace(call, args=tuple(map(_as_now, call.args)), kwargs=kept)))

        def after(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
            made = output[0] if isinstance(output, tuple | list) and output else output
            next(visit for visit in reversed(seen) if visit.number == i).output = made if once else _copied(made)
            if once:
                raise Stop

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        with suppress(Stop):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _copied(value: Any) -> Any:
    """Hidden states as they are now: what comes later may change them in place."""
    return value.clone() if hasattr(value, "clone") else value


def _as_now(value: Any) -> Any:
    """An argument that blocks write to, such as keys and values that later ones read, as it is now."""
    return copy(value) if isinstance(value, MutableMapping | list) else value


def reached(forward: Callable[[], Any], modules: Sequence[nn.Module]) -> list[int]:
    """Run `forward`; the numbers of the modules in the order they were called."""
    seen: list[int] = []
    handles = [m.register_forward_pre_hook(lambda *_, i=i: seen.append(i)) for i, m in enumerate(modules)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def watched(
    forward: Callable[[], Any],
    blocks: list[nn.Module],
    enter: Callable[[int, Any, Call], None],
    leave: Callable[[int, Any], Tensor | None],
) -> None:
    """Run `forward`; each block's number is told with its input, how it is called, and its output.

    What `leave` returns takes the place of the hidden states in that output.
    """
    handles = []
    for i, block in enumerate(blocks):

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
            enter(i, *split_arguments(args, kwargs))

        def after(_: nn.Module, __: Any, output: Any, i: int = i) -> Any:
            several = isinstance(output, tuple | list)
            made = leave(i, output[0] if several else output)
            return made if made is None or not several else type(output)((made, *output[1:]))

        handles += [
            block.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            block.register_forward_hook(after),
        ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Ends:
    """Where a forward pass may end: once everything has been reached that is watched, if nothing is reached again.

    Attributes:
        names: of what is watched.
        once: whether everything is known to be reached exactly once.
        reached: how often each was in this pass.
    """

    names: set[str]
    once: bool
    reached: Counter[str] = field(default_factory=Counter)

    def count(self, name: str) -> None:
        """Something is reached."""
        self.reached[name] += 1
        if self.once and len(self.reached) == len(self.names):
            raise Stop

    def run(self, forwards: Iterable[Callable[[], Any]], holds: Callable[[], bool]) -> None:
        """Run forward passes, the first of which shows whether later ones may end early.

        `holds`: called after each; where it says no, that pass is run again.
        """
        for number, forward in enumerate(forwards):
            self._run(forward)
            self.once = self.once or (number == 0 and all(self.reached[name] == 1 for name in self.names))
            if not holds():
                self._run(forward)
                holds()

    def _run(self, forward: Callable[[], Any]) -> None:
        self.reached.clear()
        with suppress(Stop):
            forward()


def statistics(
    modules: Mapping[str, nn.Module | Sequence[nn.Module]],
    needs: Mapping[str, Need],
    forwards: Iterable[Callable[[], Any]],
    ranged: Collection[str] = (),
    before: int = 0,
    experts: Sequence[FusedParameter] = (),
    all_experts: bool = False,
    once: bool = False,
    drifting: Collection[str] = (),
    originals: Iterable[Callable[[], Any]] = (),
) -> dict[str, Statistics]:
    """Sum statistics of the inputs of modules, and of experts, over several forward passes.

    Every call of a module counts; several modules of one name are one weight, whose inputs are those of all of them.
    Names fed by the very same tensors (convolutions: in the same windows) share one `Statistics` object: a shared sum
    is updated once per tensor, by the first of them. Whether they are is seen in the first pass, which is run again
    where names that began alike went apart later in it. If it reached every module exactly once, later ones end as soon
    as all have been reached: what comes after could add nothing; where that is known beforehand (`once`), the first
    does too. Modules named in `ranged` get the range of their inputs too; `before` samples were run by other processes.

    Of modules named in `drifting` it is summed up, too, how far their inputs are from those that they have in
    `originals`, a forward pass of the original model for each of the others.

    Experts of fused parameters are seen as often as tokens are sent to them; one that never is has no statistics. With
    `all_experts` each is shown all tokens that any of them is sent, and what comes out is still what the router chose.
    """
    several = {name: _listed(each) for name, each in modules.items()}
    windows = {name: windows_of(each[0]) for name, each in several.items()}
    sums = Sums(needs, windows, ranged, before, drifting=drifting)
    ends = _Ends({*modules, *(p.left for p in experts)}, once)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaf = name.rpartition(".")[2]
            x = input_of(module, leaf, args, kwargs) if is_attention(module) else next(iter((*args, *kwargs.values())))
            if x is not None:
                sums.see(name, x)
            if not sums.remembering:
                ends.count(name)

        return hook

    hooked = [(name, module) for name, each in several.items() for module in dict.fromkeys(each)]
    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in hooked]
    try:
        with _watched_experts(experts, sums.see_expert, ends.count, all_experts) if experts else nullcontext():
            ends.run(sums.behind(originals, forwards) if drifting else forwards, sums.settle)
        sums.check()
    finally:
        sums.last.clear()  # the hooks refer to it, and each other, until the next garbage collection
        for handle in handles:
            handle.remove()
    return sums.found


def _listed(modules: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return modules if isinstance(modules, list | tuple) else [cast("nn.Module", modules)]


@contextmanager
def _watched_experts(
    experts: Sequence[FusedParameter], see: See, leave: Callable[[str], None], all_experts: bool
) -> Iterator[None]:
    """While open, `see` is told what experts are multiplied with, and `leave` when a module of experts is done."""
    from compress.calibration.experts import SeenExperts, shown_to_all  # imports torch

    watching, handles = SeenExperts(experts, see, paused=all_experts), []

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watching.paused = False  # but what the router then sends is not counted once more
        try:
            shown_to_all(module, next(iter((*args, *kwargs.values()))))
        finally:
            watching.paused = True

    for name, owner in {p.left: p.owner for p in experts}.items():

        def left(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
            leave(name)

        handles += [owner.register_forward_hook(left)]
        if all_experts:
            handles += [owner.register_forward_pre_hook(show, with_kwargs=True)]
    try:
        with watching:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def output_gradients(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see` is told of the gradient of what each of the modules puts out, as soon as that is known.

    Gradients begin at the first of them: nothing before it need be learned.
    """
    handles = []
    for name, module in modules.items():

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            several = isinstance(output, tuple | list)
            hidden = output[0] if several else output
            # A clone: what follows may change its input in place, which the first of a graph does not allow.
            made = hidden if hidden.requires_grad else hidden.detach().requires_grad_().clone()
            made.register_hook(lambda gradient: see(name, gradient))
            return type(output)((made, *output[1:])) if several else made

        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def around(
    modules: Mapping[str, nn.Module], enter: Callable[[str], None], leave: Callable[[str], None]
) -> Iterator[None]:
    """Call `enter(name)` before and `leave(name)` after each of the modules runs."""
    handles = []
    for name, module in modules.items():

        def before(_: nn.Module, __: Any, name: str = name) -> None:
            enter(name)

        def after(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
            leave(name)

        handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quantized_inputs(grids: Mapping[nn.Module, RoundInputs]) -> Iterator[None]:
    """While open, the input of each module is rounded before the module sees it."""
    handles = [quantize_inputs(module, grid) for module, grid in grids.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed_caches(changes: Mapping[nn.Module, ChangeCache]) -> Iterator[None]:
    """While open, each attention layer keeps what is made of its keys and values."""
    handles = [change_cache(module, change) for module, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantize_inputs(module: nn.Module, grid: RoundInputs) -> RemovableHandle:
    """From now on the input of a module, and of its copies, is rounded before the module sees it."""
    return module.register_forward_pre_hook(_RoundingHook(grid), with_kwargs=True)


@dataclass
class _RoundingHook:
    """A hook that can be copied with its module."""

    grid: RoundInputs

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self.grid(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self.grid(kwargs[first])}
