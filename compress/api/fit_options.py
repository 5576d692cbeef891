"""What `fit` is asked for: a budget, a quantizer, and the options between which it chooses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from compress.config.options import PATTERNS, errors_in, unknown
from compress.config.pipeline import FORMATS, METHODS, SIZE, walk
from compress.config.runtimes import runtime_named
from compress.config.schemes import no_scheme, options_of
from compress.errors import ConfigError, Problem, UsageError
from compress.passes.base import LinearPass
from compress.planning.places import size_in_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.config.pipeline import Pipeline

DEFAULT_OPTIONS = ("w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64")


@dataclass(frozen=True)
class Budget:
    """The most that may be taken: one of both.

    Attributes:
        size: bytes of the file of weights.
        bits: stored bits for each weight of the layers that are chosen for.
    """

    size: int | None = None
    bits: float | None = None

    def said(self) -> dict[str, float]:
        """The one that is given, by name."""
        return {"bits": self.bits} if self.bits is not None else {"size": self.size or 0}


def budget_of(size: str | int | None, bits: float | None) -> Budget:
    """A budget as it was given.

    Raises:
        UsageError: none, both, or no size.
    """
    if (size is None) == (bits is None):
        both = "" if size is None else ", not both"
        raise UsageError(f"give a budget, --size such as 1.2GB or --bits such as 3.2{both}")
    if bits is not None:
        if not (math.isfinite(bits) and bits > 0):
            raise UsageError(f"bits {bits}: must be more than 0")
        return Budget(bits=bits)
    if isinstance(size, str) and not re.fullmatch(SIZE, size):
        raise UsageError(f"size {size!r} is not a size such as 1.2GB, 800MiB or 500000B")
    found = size_in_bytes(size) if isinstance(size, str) else int(size or 0)
    if found < 1:
        raise UsageError(f"size {size}: must be more than 0")
    return Budget(size=found)


def quantizer_in(steps: Pipeline) -> LinearPass:
    """The one pass of a pipeline, whose options are chosen.

    Raises:
        ConfigError: another number of passes, or another kind of pass.
    """
    found = list(walk(steps))
    able = sorted(n for n, kind in METHODS.items() if issubclass(kind, LinearPass) and "bits" in _names(kind))
    if len(found) != 1 or found[0][2].key not in able:
        there = ", ".join(pass_.key for _, _, pass_ in found) or "none"
        said = f"must be one quantizer that works on single matrices ({', '.join(able)}), for which fit chooses; there "
        raise ConfigError([Problem("passes", f"{said}{'is' if len(found) < 2 else 'are'} {there}")])
    path, _, pass_ = found[0]
    for option in ("overrides", "embeddings"):
        if getattr(pass_, option, None):
            instead = (
                "`exclude` leaves layers out" if option == "overrides" else "`include` takes in embedding and head"
            )
            raise ConfigError([Problem(f"{path}.{option}", f"is what fit writes; leave it away ({instead})")])
    return cast("LinearPass", pass_)


def with_options(base: LinearPass, options: Sequence[str | Mapping[str, Any]]) -> dict[str, LinearPass]:
    """What each option is called -> the quantizer with it.

    Raises:
        ConfigError: every impossible option.
        UsageError: fewer than two of them, or one twice.
    """
    problems: list[Problem] = []
    found: dict[str, LinearPass] = {}
    for option in options:
        label = option if isinstance(option, str) else ", ".join(f"{name}={value}" for name, value in option.items())
        names = _names(type(base)) - PATTERNS - {"embeddings"}
        values = options_of(option, names) if isinstance(option, str) else dict(option)
        if values is None:
            problems.append(Problem(label, no_scheme(names)))
            continue
        wrong = list(unknown(type(base), values, names))
        made = replace(base, **{name: value for name, value in values.items() if name in names})
        wrong += [] if wrong else errors_in(made)
        problems += [Problem(f"{label}.{error.option}", error.message) for error in wrong]
        if any(made == other for other in found.values()):
            problems.append(Problem(label, "is given twice"))
        found[label] = made
    if problems:
        raise ConfigError(problems, "options")
    if len(found) < 2:
        raise UsageError("there is nothing to choose: give at least two options, such as w2g64,w4g64")
    return found


def suited(steps: Pipeline, runtime: str, options: Sequence[str | Mapping[str, Any]]) -> tuple[Pipeline, list[str]]:
    """A pipeline that writes what a runtime reads, and those of the default options with which that computes.

    Args:
        steps: of one quantizer.
        runtime: by name.
        options: as they were given.

    Raises:
        UsageError: no such runtime, or options of which it cannot be told whether they suit it.
        ConfigError: another number of passes, or another kind of pass.
    """
    where, pass_ = runtime_named(runtime), quantizer_in(steps)
    names = _names(type(pass_))
    schemes = [options_of(option, names) if isinstance(option, str) else None for option in options]
    known = [(str(o), s) for o, s in zip(options, schemes, strict=True) if s is not None and "grid" not in s]
    if len(known) < len(options):
        raise UsageError(f"--for {runtime}: options must be bits and columns that share a scale, such as w4g64")
    fits = [(o, s) for o, s in known if s["bits"] in where.bits and where.takes_group(s.get("group_size"))]
    if tuple(options) != DEFAULT_OPTIONS and len(fits) < len(known):
        wrong = next(o for o, s in known if (o, s) not in fits)
        raise UsageError(
            f"--for {runtime}: option {wrong}: {runtime} runs {where.widths} bits, and takes {where.sizes} columns "
            "that share a scale"
        )
    if "symmetric" in names and all(s["bits"] in where.symmetric for _, s in fits):
        pass_ = replace(pass_, symmetric=True)  # type: ignore[call-arg]
    export = steps.export
    if where.format and where.format not in [exporter.key for exporter in export]:
        export = (*export, FORMATS[where.format]())
    return replace(steps, passes=((pass_,),), export=export), [option for option, _ in fits]


def differing(passes: Mapping[str, LinearPass]) -> dict[str, dict[str, Any]]:
    """Label -> the options in which the passes differ."""
    each = list(passes.values())
    names = [f.name for f in fields(each[0]) if any(getattr(p, f.name) != getattr(each[0], f.name) for p in each)]
    return {label: {name: getattr(pass_, name) for name in names} for label, pass_ in passes.items()}


def _names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


__all__ = ["DEFAULT_OPTIONS", "Budget", "budget_of", "differing", "quantizer_in", "suited", "with_options"]
