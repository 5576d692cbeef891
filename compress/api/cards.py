"""Model cards, written into a result and into each export in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.packed_layout import spec_at
from compress.config.pipeline import FORMATS
from compress.io.atomic import write_text
from compress.io.manifest import CARD
from compress.models.architecture import auto_class
from compress.models.origin import OWN, hub_ids, said_by, shared_terms
from compress.passes import MergePass
from compress.report import card
from compress.report.finished import read_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.sources import Source
    from compress.config.pipeline import Pipeline
    from compress.report.report import Report


def write_cards(folder: Path, report: Report, pipeline: str, top: Mapping[str, Any], config: Any) -> None:
    """Write the cards of a result that is whole but for them.

    Args:
        folder: the result.
        report: of its run.
        pipeline: as the result has it.
        top: what hubs read of it.
        config: of the model, as transformers reads it.
    """
    loader = auto_class(config)
    there = [exporter for key, exporter in FORMATS.items() if (folder / key).is_dir()]
    for exporter in there:
        write_text(folder / exporter.key / CARD, card.export_card(report, top, loader, exporter))
    write_text(folder / CARD, card.card(report, pipeline, top, loader, there))


def write_export_card(result: Path, export: Path, key: str, config: Any) -> None:
    """Write the card of one export of a finished result, with what the result's own card says of its origin."""
    top = {"library_name": "transformers", "tags": ["compress"], **said_by(result, OWN)}
    write_text(export / CARD, card.export_card(read_report(result), top, auto_class(config), FORMATS[key]))


def top_of(steps: Pipeline, artifact: Artifact, model: str, sources: Sequence[Source]) -> dict[str, Any]:
    """What hubs read of a result.

    Args:
        steps: what was done.
        artifact: the result.
        model: what the user calls the model.
        sources: its values and, of a merge, those of the others; what their cards say alike holds for the result.
    """
    merges = [pass_ for stage in steps.passes for pass_ in stage if isinstance(pass_, MergePass)]
    names = [model, *(str(name) for merge in merges for name in merge.models)]
    folders = dict.fromkeys(file.parent for source in sources for file in source.files())
    terms = shared_terms([said_by(folder) for folder in folders])
    specs = {name: spec_at(artifact, name) for name in artifact.committed}
    return card.head(steps, specs, terms, [each for name in names for each in hub_ids(name)], bool(merges))
