"""The stage that merges: parents opened and compared, every tensor merged piece by piece, the result the new original.

From then on the artifact's source is the merged checkpoint, so passes that compare with the original compare with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sources import WrittenSource
from compress.config.lines import line_of
from compress.config.pipeline import walk
from compress.engine.merge.aligning import Aligner
from compress.engine.merge.making import make as make_delta
from compress.engine.merge.merger import Merger
from compress.engine.merge.parents import open_parent
from compress.engine.merge.trials import Trials
from compress.engine.placement import MadeDelta, set_value, tie, value_of
from compress.engine.sweep import generator_for
from compress.errors import ConfigError, DataError, Problem, UsageError
from compress.io.keys import key_of
from compress.passes.merge.base import MergePass
from compress.passes.merge.delta_pass import DeltaPass
from compress.passes.merge.grid_search import chosen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.config.pipeline import Pipeline
    from compress.engine.placement import Context
    from compress.models.graph import Graph


def check(pipeline: Pipeline, base: Artifact, file: str = "pipeline") -> list[str]:
    """Open everything that is merged, and refuse what does not fit; reads headers, no weight.

    Returns:
        What identifies the content of each model, in order.

    Raises:
        ConfigError: every misfit at once.
    """
    found, problems = [], []
    for path, _, pass_ in walk(pipeline):
        for i, model in enumerate(pass_.models if isinstance(pass_, MergePass) else ()):
            assert isinstance(pass_, MergePass)
            try:
                found.append(open_parent(model, base, pass_).source.fingerprint())
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
    for path, _, pass_ in walk(pipeline):
        judged = isinstance(pass_, MergePass) and pass_.judged and not graph.is_language_model
        if judged and data is not None and data.labels is None:
            raise DataError(
                f"{file}: {path} goes by accuracy on the calibration data, which has no labels; give a file with a "
                "tensor `labels`, or (inputs, labels) from Python"
            )


def merge(
    context: Context, number: int, pass_: MergePass, key: str, data: Dataset | None
) -> tuple[str, dict[str, Any]]:
    """Run one merge: the artifact's source is the merged checkpoint from then on.

    Args:
        context: with the base as it stands.
        number: of the stage.
        pass_: what is done.
        key: of everything before.
        data: the calibration data, for what learns from it.

    Returns:
        The key of the stage, and facts for the report.
    """
    artifact, ledger, unit = context.artifact, context.ledger, f"s{number:02d}"
    parents = [open_parent(model, context.given, pass_) for model in pass_.models]
    key = key_of(key, number, pass_.key, pass_.options(), [p.source.fingerprint() for p in parents])
    aligner = Aligner(pass_, context, parents, number) if pass_.aligns else None
    parents = aligner.aligned() if aligner else parents
    merger = Merger(pass_, artifact, parents, context, number)

    def tried(variant: MergePass, found: Any, name: str) -> Artifact:
        return merger.made(f"{unit}-trial", name, lambda: (replace(merger, pass_=variant), found))

    def learned() -> tuple[Merger, Any]:
        generator = generator_for(context.seed, number, 0, "")
        blocks = {name: block for name, (block, *_) in merger.places.items()}
        models = Trials(context, parents, merger.names(), tried, data, unit, key, generator, blocks)
        settled = replace(merger, pass_=chosen(pass_, models)) if pass_.choose else merger
        found = settled.pass_.learn(models) if settled.pass_.learns else None
        if aligner:
            models.notes["aligned"] = aligner.facts()
        if models.notes and not known:
            facts["notes"] = models.notes
            ledger.commit_row(f"{unit}-facts", key, facts)  # before the file, whose presence says that all is done
        ledger.forget(f"{unit}-trial")
        return settled, found

    facts: dict[str, Any] = {"pass": pass_.key, "models": list(pass_.models), "tensors": len(merger.names())}
    known = ledger.load_row(f"{unit}-facts", key)
    facts |= known or {}
    delta = make_delta(merger, f"{unit}-delta", key, learned) if isinstance(pass_, DeltaPass) else None
    context.artifact = merger.made(f"{unit}-merged", key, learned, delta)
    if context.resident:
        _set(context, merger.names())
    if delta is not None:
        assert isinstance(context.artifact.source, WrittenSource)
        context.delta = MadeDelta(delta.file, context.artifact.source.file)
        facts["delta"] = delta.facts()
    return key, facts


def _set(context: Context, names: Sequence[str]) -> None:
    """Put what was merged into a model in memory; what is tied stays tied."""
    for name in names:
        set_value(context.graph.model, name, value_of(context, name))
    tie(context.graph)
