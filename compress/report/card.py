"""The model card of a result, and of each export in it: what it is, where it is from, how it is run, what was lost."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from compress.models.hub import is_hub_id
from compress.report.report import caption, markdown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.config.pipeline import Pipeline
    from compress.encodings import Spec
    from compress.export import Exporter
    from compress.report.report import Report

OWN = ("python", 'import compress\nfrom transformers import LOADER\n\nmodel = LOADER.from_pretrained("FOLDER")')
OWN_NOTE = "It stays packed in memory."


def head(
    steps: Pipeline, specs: Mapping[str, Spec], terms: Mapping[str, Any], parents: Sequence[str], merges: bool
) -> dict[str, Any]:
    """What hubs read of a model.

    Args:
        steps: what was done.
        specs: how every layer that was worked on is stored.
        terms: licence and the like, of what it was made of.
        parents: what it was made of, by their names on the hub.
        merges: whether other models were merged into it.
    """
    widths = {spec.form.bits for spec in specs.values() if spec.form is not None}
    kind = "merge" if merges else "quantized" if widths else None
    found = {**terms, "library_name": "transformers", "tags": ["compress", *_tags(steps, widths, merges)]}
    if parents:
        found |= {"base_model": list(dict.fromkeys(parents)), **({"base_model_relation": kind} if kind else {})}
    return found


def card(
    report: Report, pipeline: str, top: Mapping[str, Any], loader: str, exporters: Sequence[type[Exporter]] = ()
) -> str:
    """README.md of a result.

    Args:
        report: of the run.
        pipeline: as the result has it.
        top: what hubs read of it, from `head`.
        loader: the class of transformers that loads it.
        exporters: of the exports in it.
    """
    inside = "".join(
        f"`{each.key}` holds the same in another format:\n\n{_code(each.used, f'./{each.key}', loader)}\n"
        for each in exporters
    )
    return (
        f"{_top(top)}\n# {_name(report)}, compressed\n\n{_code(OWN, '.', loader)}\n{OWN_NOTE}\n\n{inside}"
        f"{_measured(report)}\n## Pipeline\n\n```yaml\n{pipeline}```\n"
    )


def export_card(report: Report, top: Mapping[str, Any], loader: str, exporter: type[Exporter]) -> str:
    """README.md of an export, which may be carried away from the result. Takes what `card` does."""
    return (
        f"{_top(top)}\n# {_name(report)}, compressed, as {exporter.key}\n\n{_code(exporter.used, '.', loader)}\n"
        f"{_measured(report)}"
    )


def _name(report: Report) -> str:
    """What the model is called: on the hub, or where it lay by its folder alone."""
    return report.model if is_hub_id(report.model) else PurePath(report.model).name


def _tags(steps: Pipeline, widths: set[int], merges: bool) -> list[str]:
    methods = [pass_.key for stage in steps.passes for pass_ in stage]
    bits = [f"{bits}-bit" for bits in sorted(widths)] if len(widths) == 1 else []
    return list(dict.fromkeys([*methods, *bits, *(["merge"] if merges else [])]))


def _top(top: Mapping[str, Any]) -> str:
    return f"---\n{ModelCardData(**top).to_yaml()}\n---\n"


def _code(used: tuple[str, str], folder: str, loader: str) -> str:
    language, code = used
    return f"```{language}\n{code.replace('FOLDER', folder).replace('LOADER', loader)}\n```\n"


def _measured(report: Report) -> str:
    said = caption(report)
    fallbacks = "".join(f"- {text}\n" for text in report.fallbacks) or "None.\n"
    notes = "".join(f"- {text}\n" for text in report.notes)
    notes = f"\n## Notes on the source\n\n{notes}" if notes else ""
    return f"{markdown(report)}\n{said[0].upper()}{said[1:]}.\n\n## Fallbacks\n\n{fallbacks}{notes}"
