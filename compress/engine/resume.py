"""What an interrupted run had finished, where it goes on, and what of it is of no use any longer, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNIT = re.compile(
    r"s(?P<stage>\d+)(?:-(?P<survey>survey-)?(?:b(?P<block>\d+)(?:-\d+)?|(?P<layer>\d+)|(?P<other>.+)))?$"
)


@dataclass(frozen=True)
class Dependencies:
    """What the results of a run depend on.

    Attributes:
        facts: of the whole run: what it is called -> its value. One that means nothing to a reader is a hash.
        stages: of each in order `name`, `options` and `code`.
    """

    facts: Mapping[str, Any]
    stages: Sequence[Mapping[str, Any]]

    def first_change(self, before: Dependencies) -> tuple[int, str] | None:
        """The first stage whose results are others than before, and why; None where nothing that was there changed."""
        for name, value in self.facts.items():
            was = before.facts.get(name)
            if was != value:
                return 0, f"{name} changed" if is_hash(value) else f"{name} is {value}, and was {was}"
        for number, (now, was) in enumerate(zip(self.stages, before.stages, strict=False)):
            if now["name"] != was["name"]:
                return number, f"pass {number + 1} is {now['name']}, and was {was['name']}"
            for part in ("options", "code"):
                if now[part] != was[part]:
                    return number, f"the {part} of {now['name']} changed"
        return None


def is_hash(value: Any) -> bool:
    """Whether a value is a SHA-256, or several."""
    values = value if isinstance(value, list) else [value]
    return all(each is None or (isinstance(each, str) and len(each) == 64) for each in values)


@dataclass
class Resume:
    """Listens to the ledger until the first unit that is not done, and then says once what was.

    Args:
        stages: what the stages are called.
        blocks: how many blocks the model has at the start.
    """

    stages: Sequence[str]
    blocks: int
    found: list[str] = field(default_factory=list)
    listening: bool = True

    def changed(self, before: Dependencies, now: Dependencies, units: Sequence[str]) -> None:
        """Say which of the finished units of a former run are done again, and why."""
        found = now.first_change(before)
        if found is None:
            return
        stage, reason = found
        matches = [match for unit in units if (match := UNIT.match(unit))]
        everything = stage == 0
        if any(int(match["stage"]) >= stage for match in matches) or (everything and "original" in units):
            place = "starting over" if everything else f"starting over from {now.stages[stage]['name']} on"
            LOGGER.warning("%s: %s since the run that was interrupted", place, reason)

    def loaded(self, unit: str, found: bool) -> None:
        """A unit of work was looked for."""
        if self.listening and found:
            self.found.append(unit)
        elif self.listening:
            self._say(self.place(unit))

    def all_done(self) -> None:
        """Every pass has run; the result has yet to be written."""
        if self.listening:
            self._say("writing the result")

    def state_loaded(self, unit: str) -> None:
        """The state of a training that was interrupted was found."""
        match = UNIT.match(unit)
        name = self.stages[int(match["stage"])] if match and int(match["stage"]) < len(self.stages) else "training"
        LOGGER.info("resuming: %s goes on from the state that was last kept", name)

    def text(self, place: str) -> str:
        """`original measured, gptq blocks 0 to 7 of 12 done, going on with gptq block 8`."""
        said = ["original measured"] if "original" in self.found else []
        matches = [match for unit in self.found if (match := UNIT.match(unit))]
        for number, name in enumerate(self.stages):
            mine = [match for match in matches if int(match["stage"]) == number]
            if any(match[0] == f"s{number:02d}" for match in mine):
                said.append(f"{name} done")
                continue
            for survey in (True, False):
                blocks = [int(m["block"]) for m in mine if m["block"] and bool(m["survey"]) == survey]
                if blocks:
                    said.append(f"{name} {'survey of ' if survey else ''}{_block_range(blocks)} of {self.blocks} done")
            for kind, count in (("layer", "layer"), ("other", "step")):
                done = sum(1 for m in mine if m[kind])
                if done:
                    said.append(f"{done} {count if done == 1 else f'{count}s'} of {name} done")
        return ", ".join([*said, f"going on with {place}"])

    def _say(self, place: str) -> None:
        self.listening = False
        if self.found:
            LOGGER.info("resuming: %s", self.text(place))

    def place(self, unit: str) -> str:
        """What a unit of work is, in words."""
        match = UNIT.match(unit)
        if match is None or int(match["stage"]) >= len(self.stages):
            return "measuring the original"
        name = self.stages[int(match["stage"])]
        if match[0] == f"s{match['stage']}":
            return f"measuring after {name}"
        survey = "survey of " if match["survey"] else ""
        return f"{name} {survey}block {int(match['block'])}" if match["block"] else name


def _block_range(blocks: Sequence[int]) -> str:
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
