"""The file of a sweep: one pipeline, and a grid of values that are put into it, each combination a pipeline.

pipeline: gptq-w3                  # a file, a ready-made one, or the pipeline itself
grid:
  passes[0].gptq.bits: [2, 3, 4]   # keys as `--set` takes them
  seed: [0, 1]
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.changes import changed, put
from compress.config.lines import MOST_LETTERS, document, line_of
from compress.config.reading import file_of, load_pipeline
from compress.config.words import known, shown
from compress.errors import ConfigError, Problem
from compress.io.small_file import read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from compress.config.pipeline import Pipeline

KEYS = ("pipeline", "grid")
MOST_COMBINATIONS = 1000
MOST_LETTERS_OF_VALUE = 40  # in the name of a folder
OF_RESULT = ("passes", "export", "evaluate", "lines", "description")  # what the first stages do not depend on


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        values: key of the grid -> value.
        pipeline: with these values.
        shares: how many of its first stages another combination has too.
    """

    name: str
    values: Mapping[str, Any]
    pipeline: Pipeline
    shares: int = 0


def load_sweep(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> list[Combination]:
    """The combinations of a sweep, the last key of the grid varying fastest.

    Args:
        source: a file, or a mapping of the same shape.
        changes: of the pipeline, before the values of the grid are put into it; those of `load_pipeline`.

    Raises:
        ConfigError: every mistake at once: of the file, of the grid, and of each pipeline that it makes.
    """
    file, lines, values = "sweep", dict[str, int](), source
    if not isinstance(source, Mapping):
        file = str(source)
        read = document(read_text(Path(source), MOST_LETTERS), file)
        if read.problems:
            raise ConfigError(read.problems, file)
        lines, values = read.lines, read.values
    problems = list(_mistakes(values))
    if problems:
        raise ConfigError([Problem(p.path, p.message, line_of(lines, p.path)) for p in problems], file)
    assert isinstance(values, Mapping)
    base = changed(_plain(values["pipeline"]), changes)
    choices = _choices(values["grid"])
    pipelines = _pipelines(base, choices, lines, file)
    names = _names(values["grid"], choices)
    shares = [_shared_stages(each, (other for other in pipelines if other is not each)) for each in pipelines]
    return [Combination(*each) for each in zip(names, choices, pipelines, shares, strict=True)]


def _mistakes(values: Any) -> Iterator[Problem]:
    """What is wrong with the file itself."""
    if not isinstance(values, Mapping):
        yield Problem("", "a sweep is a mapping with `pipeline:` and `grid:`")
        return
    for key in values:
        if key not in KEYS:
            yield Problem(str(key), f"unknown key; {known(key, KEYS)}")
    if not isinstance(values.get("pipeline"), str | Path | Mapping):
        yield Problem("pipeline", "must be a pipeline: a file, the name of a ready-made one, or its content")
    grid = values.get("grid")
    if not isinstance(grid, Mapping) or not grid:
        yield Problem("grid", "must be keys with lists of values, such as {passes[0].gptq.bits: [2, 3, 4]}")
        return
    for key, listed in grid.items():
        path = f"grid.{key}"
        if not isinstance(listed, list | tuple) or not listed:
            yield Problem(path, f"{shown(listed)} is no list of values to try, such as [2, 3, 4]")
            continue
        twice = [value for value, count in Counter(map(_written, listed)).items() if count > 1]
        if twice:
            yield Problem(path, f"{twice[0]} appears twice")
    count = prod(len(listed) for listed in grid.values() if isinstance(listed, list | tuple))
    if count > MOST_COMBINATIONS:
        yield Problem("grid", f"has {count} combinations, and a sweep at most {MOST_COMBINATIONS}; try fewer values")


def _plain(pipeline: Any) -> Any:
    """A pipeline as plain values."""
    if isinstance(pipeline, Mapping):
        return copy.deepcopy(dict(pipeline))
    file = file_of(pipeline)
    load_pipeline(file)  # its own mistakes are said with their lines
    return document(read_text(file, MOST_LETTERS), str(file)).values


def _choices(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _pipelines(base: Any, choices: Iterable[Mapping[str, Any]], lines: Mapping[str, int], file: str) -> list[Pipeline]:
    """The pipeline of each choice.

    Raises:
        ConfigError: every mistake of all of them, each once.
    """
    problems: dict[Problem, None] = {}
    made = []
    for values in choices:
        own = copy.deepcopy(base)
        wrong = {key: said for key, value in values.items() if (said := put(own, key, copy.deepcopy(value)))}
        problems |= dict.fromkeys(
            Problem(f"grid.{key}", said, line_of(lines, f"grid.{key}")) for key, said in wrong.items()
        )
        if wrong:
            continue
        try:
            made.append(load_pipeline(own))
        except ConfigError as error:
            problems |= dict.fromkeys(_placed(problem, values, lines) for problem in error.problems)
    if problems:
        raise ConfigError(list(problems), file)
    return made


def _placed(problem: Problem, values: Mapping[str, Any], lines: Mapping[str, int]) -> Problem:
    """A mistake of one of the pipelines where it stands in the file of the sweep: in the grid, or in the pipeline."""
    key = next((key for key in values if problem.path.startswith(key)), None)
    path = f"pipeline.{problem.path}" if key is None else f"grid.{key}"
    said = problem.message if key in (None, problem.path) else f"{problem.path}: {problem.message}"
    return Problem(path, said, line_of(lines, path))


def _names(grid: Mapping[str, Sequence[Any]], choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of folders that say in what each choice differs from the others."""
    varied = [key for key, listed in grid.items() if len(listed) > 1] or list(grid)
    short = _short_keys(varied)
    names = ["_".join(f"{short[key]}-{_said(values[key])}" for key in varied) for values in choices]
    count = Counter(name.lower() for name in names)  # some file systems do not tell large letters from small ones
    return [name if count[name.lower()] == 1 else f"{name}_{i}" for i, name in enumerate(names, start=1)]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by as few of its last words as tell it from the others: `bits`, or `gptq-bits` beside `rtn-bits`."""
    words = {key: re.findall(r"\w+", key) for key in keys}

    def tells(own: list[str], last: int) -> bool:
        return not own[-last].isdigit() and [other[-last:] for other in words.values()].count(own[-last:]) == 1

    least = {key: next((n for n in range(1, len(own)) if tells(own, n)), len(own)) for key, own in words.items()}
    return {key: "-".join(own[-least[key] :]) for key, own in words.items()}


def _said(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str | Mapping) for item in value):
        text = "+".join(map(_said, value))
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        text = f"{name}-{_written(options)}" if options else name
    else:
        text = value if isinstance(value, str) else _written(value)
    return re.sub(r"[^\w.+]+", "-", text)[:MOST_LETTERS_OF_VALUE].strip("-.") or "none"


def _written(value: Any) -> str:
    return json.dumps(value, default=str)


def _shared_stages(own: Pipeline, others: Iterable[Pipeline]) -> int:
    """How many of its first stages any other pipeline has too, that starts from the same."""
    most = 0
    for other in others:
        if any(value != getattr(other, name) for name, value in vars(own).items() if name not in OF_RESULT):
            continue
        alike = [a == b for a, b in zip(own.passes, other.passes, strict=False)]
        most = max(most, alike.index(False) if False in alike else len(alike))
    return most


__all__ = ["Combination", "load_sweep"]
