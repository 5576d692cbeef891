"""What is refused before anything is merged: models that do not fit the base, and data without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.config.lines import line_of
from compress.config.pipeline import walk
from compress.engine.merge.parents import open_parent
from compress.errors import ConfigError, DataError, Problem, UsageError
from compress.passes.merge.base import MergePass

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    found, problems = [], []
    for path, pass_ in _merges(pipeline):
        for i, model in enumerate(pass_.models):
            try:
                found.append(open_parent(model, base, pass_).source)
            except UsageError as error:
                place = f"{path}.models[{i}]"
                problems.append(Problem(place, str(error), line_of(pipeline.lines, place)))
    if problems:
        raise ConfigError(problems, file)
    return found


def check_data(pipeline: Pipeline, data: Dataset | None, graph: Graph, file: str = "pipeline") -> None:
    """Refuse calibration data that a merge cannot be judged on.

    Raises:
        DataError: a classifier's, without labels.
    """
    for path, pass_ in _merges(pipeline):
        judged = pass_.judged and not graph.is_language_model
        if judged and data is not None and data.labels is None:
            raise DataError(
                f"{file}: {path} goes by accuracy on the calibration data, which has no labels; give a file with a "
                "tensor `labels`, or (inputs, labels) from Python"
            )


def _merges(pipeline: Pipeline) -> Iterator[tuple[str, MergePass]]:
    """Path and pass of every merge."""
    return ((path, pass_) for path, _, pass_ in walk(pipeline) if isinstance(pass_, MergePass))
