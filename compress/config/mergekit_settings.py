"""Settings of a mergekit configuration: numbers that may differ by depth and by the names of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Settings:
    """Looks settings up in `parameters:`, the nearest first.

    Attributes:
        problem: is told the path and what is wrong there.
    """

    problem: Callable[[str, str], None]

    def switch(self, name: str, where: Sequence[Mapping[str, Any]]) -> bool | None:
        """A setting that is true or false; None where there is none."""
        found = next((w[name] for w in where if name in w), None)
        if found is None or isinstance(found, bool):
            return found
        self.problem(f"parameters.{name}", "must be true or false for the whole model")
        return None

    def value(self, name: str, where: Sequence[Mapping[str, Any]], default: float | None) -> Any:
        """A setting as a number, a list over depth, or a list of {match, value}; None where there is none.

        Theirs are looked up in the model's parameters, then in those for all; the first filter that is part of a
        tensor's name wins, and a tensor that no filter fits goes on to the next place. Ours: the last match wins.
        """
        found: list[dict[str, Any]] = []
        for settings in where:
            if name not in settings:
                continue
            for pattern, value in self._cases(name, settings[name]):
                found.append({"match": pattern, "value": value})
                if pattern == "*":
                    return value if len(found) == 1 else found[::-1]
        if not found:
            return default
        if default is None:
            self.problem(f"parameters.{name}", "has filters only; add a last entry without one, for all other tensors")
            return None
        return [{"match": "*", "value": default}, *found[::-1]]

    def _cases(self, name: str, setting: Any) -> Iterator[tuple[str, Any]]:
        """(pattern, value) in their order."""
        entries = setting if isinstance(setting, list) and any(isinstance(e, dict) for e in setting) else [setting]
        for entry in entries:
            case = entry if isinstance(entry, dict) else {"value": entry}
            value, part = case.get("value"), case.get("filter")
            numbers: list[Any] = value if isinstance(value, list) else [value]
            if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
                self.problem(f"parameters.{name}", f"{value!r} is not a number or a list of numbers")
                continue
            value = [float(n) for n in numbers] if isinstance(value, list) else float(numbers[0])
            yield ("*" if part in (None, "*") else f"*{_literal(str(part))}*"), value


def _literal(text: str) -> str:
    """A part of a name as a shell wildcard that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
