"""What an interrupted run had finished, and where it goes on, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Sequence

UNIT = re.compile(r"s(?P<stage>\d+)(?:-(?P<survey>survey-)?(?:b(?P<block>\d+)|(?P<layer>\d+)|(?P<other>.+)))?$")


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
