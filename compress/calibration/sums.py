"""Statistics of the inputs of many modules while they are summed up: what is fed by one tensor is summed up once.

Which modules are fed alike shows in the first forward pass, call by call: a module may be called several times in one
pass (a layer that is used again and again, a projection of the token before), and each of its calls counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from compress.calibration.grouped import statistics_for
from compress.calibration.ranges import Range
from compress.calibration.statistics import Statistics
from compress.errors import CompressError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.calibration.windows import Windows


@dataclass
class Sums:
    """Statistics while they are summed up.

    Attributes:
        windows: of the modules that are convolutions.
        found: statistics of every module and expert that was reached.
        leaders: module -> the first of those that are fed by the same tensors.
        last: module -> the tensor it saw last (held: identity means something), its version, and its number.
        calls: module -> the numbers of the tensors that it was called with in this forward pass.
        first: nothing but the first forward pass was seen yet, so who is fed alike is a guess.
        drifting: the modules of which it must be known how far their inputs are from the original model's.
        remembering: the original model is running, in front of the forward pass that is compared with it.
        originals: module -> what it was called with there, as far as it has not been compared.
    """

    needs: Mapping[str, Need]
    windows: Mapping[str, Windows | None]
    ranged: Collection[str]
    before: int
    found: dict[str, Statistics] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    last: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    first: bool = True
    drifting: Collection[str] = ()
    remembering: bool = False
    originals: dict[str, list[Tensor]] = field(default_factory=dict)
    _numbers: int = 0

    def see(self, name: str, x: Tensor) -> None:
        """A module was given an input."""
        if self.remembering:
            self._remember(name, x)
            return
        mine = self.calls.setdefault(name, [])
        mine.append(self._number(x))
        self.last[name] = x, x._version, mine[-1]
        leader = self.leaders.get(name) or (self._leader_of(name) if self.first else name)
        self.leaders[name] = leader  # one that is first reached later on has no share in earlier sums
        if name not in self.found:
            self.found[name] = self.found[leader] if leader != name else self._begun(name, x)
        if leader == name:
            original = self._original(name, x)
            others = repeat(None) if original is None else self._rows(name, original)
            for part, other in zip(self._rows(name, x), others, strict=False):
                self.found[name].update(part, name, other)
            if (seen := self.found[name].range) is not None:
                seen.update(x)
        elif not self.first and mine != self.calls.get(leader, [])[: len(mine)]:
            raise _other_wiring(name, leader)

    def behind(
        self, originals: Iterable[Callable[[], Any]], forwards: Iterable[Callable[[], Any]]
    ) -> Iterator[Callable[[], Any]]:
        """Each forward pass behind that of the original model, whose inputs are remembered to compare with."""
        for original, forward in zip(originals, forwards, strict=True):
            yield partial(self._run_behind, original, forward)

    def _run_behind(self, original: Callable[[], Any], forward: Callable[[], Any]) -> None:
        self.originals.clear()
        self.remembering = True
        try:
            original()
        finally:
            self.remembering = False
        forward()

    def _remember(self, name: str, x: Tensor) -> None:
        """Keep an input of the original model, a copy: what comes later may change it in place."""
        if name in self.drifting and self.leaders.get(name, name) == name:
            self.originals.setdefault(name, []).append(x.detach().clone())

    def _original(self, name: str, x: Tensor) -> Tensor | None:
        """The original model's input in the place of this one; None where that is not asked for."""
        if name not in self.drifting:
            return None
        kept = self.originals.get(name)
        if not kept or kept[0].shape != x.shape:
            raise CompressError(f"{name} is called in another way than in the original model; use propagation: 0 there")
        return kept.pop(0)

    def _rows(self, name: str, x: Tensor) -> Iterable[Tensor]:
        """An input as the rows that a matrix is multiplied with, a part at a time."""
        window = self.windows[name]
        return window.rows(x) if window else [x]

    def _number(self, x: Tensor) -> int:
        """The number of the very tensor that some module saw last, or a new one."""
        for seen, version, number in self.last.values():
            if seen is x and version == x._version:
                return number
        self._numbers += 1
        return self._numbers

    def _leader_of(self, name: str) -> str:
        """The first module of the same kind that was called with the same tensors in this forward pass."""
        mine, kind = self.calls[name], self._kind(name)
        alike = (n for n in self.leaders if self.calls.get(n) == mine and self._kind(n) == kind)
        return next((n for n in alike if self.leaders[n] == n), name)

    def _kind(self, name: str) -> tuple[Need, Windows | None, bool, bool]:
        return self.needs[name], self.windows[name], name in self.ranged, name in self.drifting

    def _begun(self, name: str, x: Tensor) -> Statistics:
        window = self.windows[name]
        width = window.columns(x) if window else x.shape[-1]
        made = statistics_for(width, self.needs[name], x.device, window.groups if window else 1, name in self.drifting)
        if name in self.ranged:
            made.range = Range(self.before * (x.numel() // x.shape[-1] // len(x)))
        return made

    def see_expert(self, name: str, x: Tensor) -> None:
        """An expert was sent tokens."""
        if name not in self.found:
            self.found[name] = Statistics(x.shape[-1], self.needs[name], x.device)
        self.found[name].update(x, name)

    def settle(self) -> bool:
        """A forward pass has ended.

        Returns:
            Whether its sums hold. If not, it was the first, modules that began alike went apart in it, and it has to
            be run again: who is fed alike is known now, and the sums are zero again.

        Raises:
            CompressError: modules that were fed alike are not any longer.
        """
        calls, self.calls = self.calls, {}
        self.last.clear()
        apart = [n for n, leader in self.leaders.items() if calls.get(n) != calls.get(leader)]
        if not self.first:
            if apart:
                raise _other_wiring(apart[0], self.leaders[apart[0]])
            return True
        self.first = False
        if not apart:
            return True
        together: dict[object, str] = {}
        self.leaders = {n: together.setdefault((self._kind(n), tuple(calls[n])), n) for n in self.leaders}
        self.found.clear()
        return False

    def check(self) -> None:
        """Look whether all inputs were finite."""
        for name, found in self.found.items():
            if self.leaders.get(name, name) == name:
                found.check(name)


def _other_wiring(name: str, leader: str) -> CompressError:
    return CompressError(
        f"{name} and {leader} were fed by one tensor at first and by different ones later: statistics "
        "would be wrong. Models whose wiring changes from batch to batch are not supported"
    )
