"""What is refused before anything is merged: models that do not fit the base, and data without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint.sources import ChangedSource, FolderSource
from compress.config.lines import line_of
from compress.config.pipeline import walk
from compress.engine.merge import alike
from compress.engine.merge.parents import open_parent, vocabulary_names
from compress.errors import ConfigError, DataError, Problem, UsageError
from compress.passes.merge.average import Average
from compress.passes.merge.base import MergePass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.sources import Source
    from compress.config.pipeline import Pipeline
    from compress.models.graph import Graph


def check_models(pipeline: Pipeline, base: Artifact, file: str = "pipeline") -> list[Source]:
    """Open everything that is merged, and refuse what does not fit; reads headers, no weight.

    Returns:
        The values of each model, in order.

    Raises:
        ConfigError: every misfit at once.
    """
    found: list[Source] = []
    problems: list[Problem] = []

    def refuse(place: str, message: str) -> None:
        problems.append(Problem(place, message, line_of(pipeline.lines, place)))

    for path, pass_ in _merges(pipeline):
        differing = set[str]()
        for i, model in enumerate(pass_.models):
            try:
                parent = open_parent(model, base, pass_)
                found.append(parent.source)
                other = _other_meaning(base, parent, pass_)
                differing |= other.keys()
                _refuse_other_meaning(model, other, pass_)
            except UsageError as error:
                refuse(f"{path}.models[{i}]", str(error))
        for name in pass_.accept if not problems else ():
            if not any(_is_named(name, field) for field in differing):
                said = f"they differ in {', '.join(sorted(differing))}" if differing else "they differ in nothing"
                refuse(f"{path}.accept", f"{name}: no model differs from the base in it; {said}")
    if problems:
        raise ConfigError(problems, file)
    return found


def open_alike(model: str, base: Artifact) -> Artifact:
    """A fine-tune of a base, whose every tensor may be compared with the base's.

    Raises:
        UsageError: it cannot be read, is of another make, or its tensors mean something else.
    """
    everything = Average(models=(model,))
    parent = open_parent(model, base, everything)
    other = _other_meaning(base, parent, everything)
    other.pop(alike.TOKENIZER, None)
    if other:
        said = ", ".join(f"{field} ({ours} in the base, {theirs} here)" for field, (ours, theirs) in other.items())
        raise UsageError(f"{model} differs from the base in {said}, and not in its tensors alone; give its own base")
    return parent


def check_data(pipeline: Pipeline, data: Dataset | None, graph: Graph, file: str = "pipeline") -> None:
    """Refuse calibration data that a merge cannot be judged on.

    Raises:
        DataError: a classifier's, without labels; windows of one token, which predict nothing.
    """
    for path, pass_ in _merges(pipeline):
        if pass_.judged and graph.is_language_model and data is not None and data.inputs.shape[-1] < 2:
            raise DataError(f"{file}: {path} goes by the loss on the calibration data: at least two tokens are needed")
        judged = pass_.judged and not graph.is_language_model
        if judged and data is not None and data.labels is None:
            raise DataError(
                f"{file}: {path} goes by accuracy on the calibration data, which has no labels; give a file with a "
                "tensor `labels`, or (inputs, labels) from Python"
            )


def _other_meaning(base: Artifact, parent: Artifact, pass_: MergePass) -> dict[str, tuple[str, str]]:
    """Where a model means something else by tensors that compare: name of the field -> (base, model)."""
    ours, theirs = (getattr(artifact.graph.model, "config", None) for artifact in (base, parent))
    found = alike.differences(ours, theirs) if parent.graph is not base.graph else {}
    tables = vocabulary_names(base.graph)
    folders = [folder for artifact in (base, parent) if (folder := _folder_of(artifact.source)) is not None]
    if len(folders) == 2 and folders[0] != folders[1] and any(pass_.selects(name, in_block=True) for name in tables):
        other = alike.other_tokens(*folders)
        found |= {} if other is None else {alike.TOKENIZER: other}
    return found


def _folder_of(source: Source) -> Path | None:
    """The folder of a model whose tensors are read, changed on the way or not; of an adapter, its base's."""
    while isinstance(source, ChangedSource):
        source = source.before
    return source.folder if isinstance(source, FolderSource) else None


def _refuse_other_meaning(model: str, found: Mapping[str, tuple[str, str]], pass_: MergePass) -> None:
    other = {field: values for field, values in found.items() if not any(_is_named(n, field) for n in pass_.accept)}
    if other:
        said = ", ".join(f"{field} ({ours} in the base, {theirs} here)" for field, (ours, theirs) in other.items())
        names = ", ".join(sorted({*pass_.accept, *other}))
        raise UsageError(
            f"{model} differs from the base in {said}: its weights fit, but they mean something else. Merge fine-tunes "
            f"of one model; to merge it all the same, say accept: [{names}]"
        )


def _is_named(name: str, field: str) -> bool:
    """Whether `accept` names a field: whole, or by what stands behind the last dot."""
    return name in (field, field.rpartition(".")[2])


def _merges(pipeline: Pipeline) -> Iterator[tuple[str, MergePass]]:
    """Path and pass of every merge."""
    return ((path, pass_) for path, _, pass_ in walk(pipeline) if isinstance(pass_, MergePass))
