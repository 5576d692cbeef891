"""Whether a pipeline fits a model, and the data that it names is enough and can be read, before it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.api.data import Reader
from compress.calibration.rows import rows_in
from compress.calibration.texts import LOCAL, SELF, is_images, suffix_of
from compress.calibration.tokens import count_tokens, too_few
from compress.config.lines import line_of
from compress.config.pipeline import GIVEN
from compress.config.reading import idle_options
from compress.engine.merge.checks import check_models
from compress.errors import ConfigError, DataError, Problem
from compress.models.tokenizers import load_tokenizer
from compress.planning import plan
from compress.planning.places import places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.calibration.texts import Split
    from compress.checkpoint.opening import OpenedModel
    from compress.config.pipeline import DataSection, Pipeline

# Tokens that `demo` has with every tokenizer, which are not counted: reading it takes seconds.
DEMO_TOKENS: dict[Split, int] = {"calibration": 1 << 16, "evaluation": 1 << 15}


def check_on(steps: Pipeline, model: OpenedModel, file: str = "pipeline") -> list[str]:
    """Check a pipeline against a model, as far as that takes no weights; returns and raises what `check_amounts` does.

    Raises:
        UsageError: for everything that the model has no place for.
    """
    opened = model.of_towers(steps.towers)
    where = places(steps.device, steps.max_memory)
    plan.make(steps, opened.artifact.graph, opened.dtypes, file, where=where)
    check_models(steps, opened.artifact, file)
    return check_amounts(steps, opened, file)


def check_amounts(steps: Pipeline, opened: OpenedModel, file: str = "pipeline") -> list[str]:
    """Count the tokens of local texts, each only until there are enough, and look at rows with images and sounds.

    Returns:
        Sentences on what rows hold, on what was not counted, and on options that change nothing.

    Raises:
        ConfigError: every source that cannot be read, or has too few.
    """
    sections = [("calibration", steps.calibration), ("evaluate", steps.evaluate)]
    notes = [f"{path}.{idle}" for path, section in sections if section for idle in idle_options(section)]
    problems: list[Problem] = []
    reader = Reader(opened.tokenizer, opened.artifact.graph.model, opened.folder)
    for path, source, section, split in _needed(steps):
        if source != GIVEN and reader.takes_rows(source, section.field):
            try:
                notes.append(f"{path}: {_rows_found(source, section, reader)}")
            except DataError as error:
                problems.append(Problem(path, str(error), line_of(steps.lines, path)))
            continue
        known = source == "demo" and section.samples * section.length <= DEMO_TOKENS[split]
        if known or source in (GIVEN, SELF) or is_images(source) or not opened.artifact.graph.takes_tokens:
            continue
        if source != "demo" and suffix_of(source) not in LOCAL:
            notes.append(f"{path}: the tokens of {source} are counted only when it is run")
            continue
        try:
            wanted = section.length * max(1, section.samples)
            tokenizer = load_tokenizer(opened.tokenizer, f"{split} text")
            found = count_tokens(source, tokenizer, wanted, split, section.field, section.protocol)
            if found < wanted:
                raise DataError(too_few(source, found, section.samples, section.length))
        except DataError as error:
            problems.append(Problem(path, str(error), line_of(steps.lines, path)))
    if problems:
        raise ConfigError(problems, file)
    return notes


def _rows_found(source: str, section: DataSection, reader: Reader) -> str:
    """What the rows of a file hold that a run would read, in words.

    Raises:
        DataError: a row that cannot be read, as far as that is known without decoding images and sounds.
    """
    processing = reader.processing(source)
    rows, count = rows_in(source, section.samples, section.field)
    processing.check(rows)
    found = {"images": [m for row in rows for m in row.images], "sounds": [m for row in rows for m in row.sounds]}
    media = [f"{len(each)} {what}" for what, each in found.items() if each]
    texts = sum(row.text is not None or row.messages is not None for row in rows)
    labels = sum(row.label is not None for row in rows)
    media += [f"{number} {what}" for what, number in (("texts", texts), ("labels", labels)) if number]
    return f"{len(rows)} of {count} rows of {source}, with {', '.join(media)}"


def _needed(steps: Pipeline) -> Iterator[tuple[str, str, DataSection, Split]]:
    """(path, source, section, split) of every source that a run would read."""
    sections: list[tuple[str, DataSection | None, Split]] = [("evaluate", steps.evaluate, "evaluation")]
    if any(pass_.calibrated for stage in steps.passes for pass_ in stage):
        sections.insert(0, ("calibration", steps.calibration, "calibration"))
    for path, section, split in sections:
        for name, source in section.sources.items() if section else ():
            assert section is not None
            yield f"{path}.source.{name}" if name else f"{path}.source", source, section, split
