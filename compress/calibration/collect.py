"""Everything that hooks into a running model: the only file that registers hooks, and every hook is removed again."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.calibration.statistics import Need, Statistics
from compress.errors import CompressError, NonFiniteError


class _Stop(Exception):
    """Ends a forward pass once what was wanted is known."""


@dataclass
class Call:
    """How a block was called: everything but its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for other input hidden states."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(first, Tensor)
    return first


def arrival(forward: Callable[[], Any], block: nn.Module) -> tuple[Tensor, Call]:
    """Run `forward` until it reaches `block`; the hidden states and other arguments it arrives with."""
    caught: list[tuple[Tensor, Call]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_split(args, kwargs))
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Stop):
            forward()
    finally:
        handle.remove()
    if not caught:
        raise NonFiniteError("the first block was never reached by the calibration data")
    return caught[0]


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    # A live key/value cache among the arguments would grow at every visit and silently corrupt the calibration.
    clean = {k: v for k, v in kwargs.items() if not _is_cache(v) and k != "hidden_states"}
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden, Call(tuple(None if _is_cache(a) else a for a in args[1:]), clean)


def _is_cache(value: Any) -> bool:
    return any(base.__name__ == "Cache" for base in type(value).__mro__)


def is_chain(forward: Callable[[], Any], blocks: list[nn.Module]) -> bool:
    """Whether each block's input was seen to be the output of the one before, all called alike, each exactly once.

    Only then may blocks be run one after the other without the model around them.
    """
    # A tensor changed in place stays the same object; its version tells.
    visits: list[tuple[int, Any, Any, Call]] = []
    outputs: list[tuple[Tensor, int]] = []
    handles = []
    for i, block in enumerate(blocks):

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
            hidden, call = _split(args, kwargs)
            visits.append((i, hidden, getattr(hidden, "_version", None), call))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            hidden = hidden_of(output)
            outputs.append((hidden, hidden._version))

        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if [i for i, *_ in visits] != list(range(len(blocks))) or not isinstance(visits[0][1], Tensor):
        return False
    fed = all(
        hidden is output and version == then
        for (_, hidden, version, _), (output, then) in zip(visits[1:], outputs, strict=False)
    )
    return fed and all(_alike(visits[0][3], call) for *_, call in visits[1:])


def _alike(a: Call, b: Call) -> bool:
    return (
        len(a.args) == len(b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))
        and all(_same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)


def statistics(
    modules: Mapping[str, nn.Module], needs: Mapping[str, Need], forwards: Iterable[Callable[[], Any]]
) -> dict[str, Statistics]:
    """Sum statistics of the inputs of modules over several forward passes.

    Modules fed by the very same tensor share one `Statistics` object: whether they are is seen at their first call, and
    a shared sum is then updated once a pass, by the first of them. If the first pass reached every module exactly once,
    later ones end as soon as all have been reached: what comes after could add nothing.
    """
    found: dict[str, Statistics] = {}
    leaders: dict[str, str] = {}
    last: dict[str, tuple[Tensor, int]] = {}  # leader -> the tensor it saw last (held: identity means something)
    reached: Counter[str] = Counter()
    once = False

    def same(name: str, x: Tensor) -> bool:
        seen, version = last.get(name, (None, 0))
        return seen is x and version == x._version

    def see(name: str, x: Tensor) -> None:
        if name not in found:
            need = needs[name]
            leaders[name] = next((n for n in last if same(n, x) and needs[n] == need), name)
            found[name] = found.get(leaders[name]) or Statistics(x.shape[-1], need)
        leader = leaders[name]
        if leader == name:
            found[name].update(x, name)
            last[name] = x, x._version
        elif not same(leader, x):
            raise CompressError(
                f"{name} and {leader} were fed by one tensor at first and by different ones later: statistics "
                "would be wrong. Models whose wiring changes from batch to batch are not supported"
            )

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))
            reached[name] += 1
            if once and len(reached) == len(modules):
                raise _Stop

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, m in modules.items()]
    try:
        for number, forward in enumerate(forwards):
            reached.clear()
            with suppress(_Stop):
                forward()
            once = all(reached[name] == 1 for name in modules) if number == 0 else once
    finally:
        last.clear()  # the hooks refer to it, and each other, until the next garbage collection
        for handle in handles:
            handle.remove()
    return found


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
