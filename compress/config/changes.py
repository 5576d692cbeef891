"""`--set passes[0].gptq.bits=3`: values of a pipeline, changed on the command line before it is read."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from compress.config.lines import document
from compress.config.schemes import options_of
from compress.config.words import shown
from compress.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACE = "--set"  # what messages call the command line
KEY = re.compile(r"[A-Za-z_][\w-]*(\[\d+\])*(\.[A-Za-z_][\w-]*(\[\d+\])*)*")
STEP = re.compile(r"\[(\d+)\]|([A-Za-z_][\w-]*)")
IN_SCHEME = ("bits", "group_size")  # what a scheme is short for
NAMED = ("passes", "blockwise", "export")  # lists whose entries are a name with options


def changed(values: Any, changes: Sequence[str]) -> Any:
    """A pipeline's plain values with others in their place.

    Args:
        values: as a file has them; they are not changed themselves.
        changes: each KEY=VALUE, a key such as `passes[0].gptq.bits`, a value as in a file; the last wins.

    Raises:
        ConfigError: every key that leads nowhere, and every value that cannot be read.
    """
    made, problems = copy.deepcopy(values), list[Problem]()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not KEY.fullmatch(key):
            problems.append(Problem("", f"{change!r} is not KEY=VALUE, such as 'passes[0].gptq.bits=3'"))
            continue
        read = document(text, PLACE)
        problems += [Problem(key, problem.message) for problem in read.problems]
        wrong = put(made, key, read.values)
        problems += [Problem(key, wrong)] if wrong else []
    if problems:
        raise ConfigError(problems, PLACE)
    return made


def put(values: Any, key: str, value: Any) -> str | None:
    """Put a value into a pipeline's plain values, which are changed; or say why its key leads nowhere."""
    if not KEY.fullmatch(key):
        return "is no key of a pipeline, such as passes[0].gptq.bits"
    return _put(values, [int(number) if number else name for number, name in STEP.findall(key)], value)


def _put(values: Any, steps: list[str | int], value: Any) -> str | None:
    """Put a value where the steps lead; or say why they lead nowhere."""
    here, path, parent = values, "", ""
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(step, int):
            wrong = _entry(here, path, step, last)
            if wrong:
                return wrong
            if last:
                here[step : step + 1] = [value]
                return None
            if isinstance(here[step], str) and parent in NAMED:  # `- rtn` is short for `- rtn: {}`
                here[step] = {here[step]: {}}
            here, path = here[step], f"{path}[{step}]"
            continue
        if not isinstance(here, dict):
            return f"{path or 'the pipeline'} is {shown(here)}, which has no keys"
        named = isinstance(steps[number - 1], int) and parent in NAMED
        if number and named and step not in here:
            return f"{path} is {', '.join(map(str, here))}, not {step}"
        if last:
            _make_room(here, step)
            here[step] = value
            return None
        if here.get(step) is None:
            here[step] = {}
        here, path, parent = here[step], f"{path}.{step}" if path else step, step
    return None


def _entry(here: Any, path: str, step: int, last: bool) -> str | None:
    """Why a list has no such entry; one behind the last may be added."""
    if not isinstance(here, list):
        return f"{path} is no list"
    if step < len(here) + last:
        return None
    return f"the last entry is {path}[{len(here) - 1}]" if here else f"{path} has no entries"


def _make_room(options: dict[str, Any], name: str) -> None:
    """Bits and group size are said once: by themselves, or by `scheme`."""
    if name in IN_SCHEME and (spelled := options_of(options.get("scheme"), IN_SCHEME)):
        del options["scheme"]
        options |= spelled
    if name == "scheme":
        for short in IN_SCHEME:
            options.pop(short, None)


__all__ = ["changed", "put"]
