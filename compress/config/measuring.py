"""The data that `compress eval` measures on: what its options say, or what the folder's own run measured on."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from compress.config.lines import document
from compress.config.pipeline import GIVEN, DataSection
from compress.config.reading import read_evaluation
from compress.errors import UsageError
from compress.io.manifest import MANIFEST
from compress.io.small_file import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from compress.config.pipeline import Evaluation

PIPELINE = "pipeline.yaml"  # in every result


def measured_on(model: Path, sources: Sequence[str], options: Mapping[str, Any]) -> Evaluation:
    """The section that options make.

    Args:
        model: what is measured; a result has a pipeline, which says what it was measured on.
        sources: one, or several as NAME=SOURCE; none for what the result was measured on.
        options: those of an `evaluate:` section but its source; None for what is not said.

    Raises:
        UsageError: every mistake at once.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if sources:
        return read_evaluation({"source": _named(sources), **given})
    own = _own(model)
    if own is None:
        return read_evaluation(given)
    if GIVEN in own.sources.values():
        raise UsageError(f"{model} was measured on data {GIVEN}, which no file holds; give data with --source")
    said = {field.name: getattr(own, field.name) for field in fields(DataSection)}
    return read_evaluation({**{name: value for name, value in said.items() if value is not None}, **given})


def _own(model: Path) -> Evaluation | None:
    """What the run of a result measured on, or of the result that an export lies in."""
    folder = model.parent if model.is_file() else model
    if not (folder / MANIFEST).is_file():
        return None
    file = next((place / PIPELINE for place in (folder, folder.resolve().parent) if (place / PIPELINE).is_file()), None)
    section = None if file is None else document(read_text(file), str(file)).values.get("evaluate")
    return read_evaluation(section) if isinstance(section, dict) else None


def _named(sources: Sequence[str]) -> str | dict[str, str]:
    """One source, or several by name."""
    pairs = [source.partition("=") for source in sources]
    if len(sources) == 1 and not pairs[0][1]:
        return sources[0]
    found = {name: source for name, equals, source in pairs if equals and name and source}
    if len(found) != len(sources):
        raise UsageError(
            "--source: of several, each has a name of its own: --source maths=a.jsonl --source code=b.jsonl"
        )
    return found
