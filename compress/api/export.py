"""Exporters at work on a finished folder: each writes, reads back, and is run beside the packed model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from compress.api import data as given
from compress.api.cards import write_export_card
from compress.api.output_folder import (
    RESULT,
    clear_result,
    mend,
    publish_folder,
    refuse_changed,
    refuse_foreign,
    working_for,
)
from compress.api.reloaded import plain_tolerance
from compress.calibration.data import Dataset
from compress.calibration.metrics import judge_of
from compress.calibration.surroundings import undisturbed
from compress.config.options import errors_in
from compress.config.pipeline import GIVEN, Evaluation
from compress.errors import ConfigError, DataError, NonFiniteError, Problem, UsageError
from compress.export.compared import Expected, some_tokens
from compress.export.hf import loaded
from compress.export.packed import added_in, open_packed, specs_in
from compress.io.heap import give_back
from compress.io.manifest import replace_file
from compress.models.logits import vocabulary
from compress.models.positions import longest_window
from compress.progress import Bars

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.export import Exporter, PackedFolder
    from compress.export.compared import Expect


@undisturbed()
def export_to(out: str | Path, exporters: Sequence[Exporter], *, bars: Bars | None = None) -> dict[str, dict[str, Any]]:
    """Write a finished folder's model in other containers, from the same codes; nothing is calibrated again.

    Each is written into OUT.work, read back, run beside the packed model where it can be run here, and moved to
    OUT/<key> at the end; one that is there already is replaced. The result is also noted in OUT/report.json.

    Args:
        out: a folder that `run` wrote.
        exporters: in order.
        bars: progress; by default, bars where stderr is a terminal.

    Returns:
        For each exporter what was compared.

    Raises:
        ConfigError: a container that cannot hold this model; nothing is written.
        UsageError: not a finished folder, or another process works in it.
        CheckpointError: the folder is damaged.
        CompressError: what was written is not what was meant.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", f"{folder}/out")
        ...     found = compress.export_to(f"{folder}/out", [compress.Hf()])
        >>> found["hf"]["max_logit_difference"]
        0.0
    """
    folder, bars = Path(out).absolute(), bars or Bars()
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    refuse_changed(folder)
    noted = _report(folder)
    dtype, section = _recorded_evaluation(folder)
    made = open_packed(folder, dtype)
    refuse_exports(made, exporters)
    evaluated = _evaluation_data(made, section, bars)
    found: dict[str, dict[str, Any]] = {}
    for exporter in exporters:
        refuse_foreign(folder / exporter.key)
    with working_for(folder) as work, clear_result(work):
        for exporter in exporters:
            mend(folder / exporter.key)
            with bars.shown():
                found |= write_all(made, [exporter], {exporter.key: work / RESULT}, folder, evaluated, bars)
            write_export_card(folder, work / RESULT, exporter.key, made.artifact.graph.model.config)
            publish_folder(work / RESULT, folder / exporter.key)
        told = {**noted, "verified": noted["verified"] | found}
        replace_file(folder, "report.json", json.dumps(told, indent=1) + "\n")
    return found


def write_all(
    made: PackedFolder,
    exporters: Sequence[Exporter],
    folders: Mapping[str, Path],
    final: Path,
    evaluated: Dataset | None,
    bars: Bars,
) -> dict[str, dict[str, Any]]:
    """Write, read back and compare each; returns what was found of each.

    Args:
        made: the packed model.
        exporters: in order.
        folders: key of each -> where it is written.
        final: OUT, where it will lie as OUT/<key>.
        evaluated: what it is compared with the packed model on.
        bars: progress.
    """
    expect = _expecting(made, evaluated)
    found: dict[str, dict[str, Any]] = {}
    for exporter in exporters:
        folder = folders[exporter.key]
        exporter.write(made, folder, final / exporter.key, bars)
        facts = exporter.verify(made, folder, bars)
        tolerance = exporter.tolerance(specs_in(made))
        if tolerance is not None and expect is not None:
            computes = getattr(torch, exporter.computes) if exporter.computes else made.dtype
            tolerance = max(tolerance, plain_tolerance(made.artifact.graph.model, computes))
            facts |= compared(exporter, made, folder, expect, tolerance)
        found[exporter.key] = facts
    return found


def compared(exporter: Exporter, made: PackedFolder, folder: Path, expect: Expect, tolerance: float) -> dict[str, Any]:
    """What an exported model computes, beside what the packed one does.

    Raises:
        CompressError: too far from it.
    """
    expected = expect(getattr(torch, exporter.computes) if exporter.computes else made.dtype)
    facts: dict[str, Any] = {}
    runner = exporter.runner(made, folder)
    if runner is not None:
        try:
            facts = expected.compare(runner)
        except NonFiniteError as error:
            if not expected.finite:
                raise
            found = exporter.first_nan(folder, expected.inputs)
            raise NonFiniteError(
                f"the exported {exporter.key} gives logits that are NaN or infinite, which the packed model does not"
                f"{found and ': '}{found}; nothing was given its final name"
            ) from error
        del runner  # before the same file is opened once more
        give_back()
        expected.hold(facts, tolerance, exporter.key)
    shipped = exporter.shipped(made, folder)
    if shipped is not None:
        facts["as_shipped"] = expected.compare(shipped)
    return facts


def refuse_exports(made: PackedFolder, exporters: Sequence[Exporter]) -> None:
    """Refuse what cannot be exported, before anything is written.

    Raises:
        ConfigError: every reason at once.
    """
    specs, added = specs_in(made), added_in(made)
    caches = {name: grid.form for name, grid in made.artifact.caches.items()}
    problems = [Problem(f"export.{e.key}.{m.option}", m.message) for e in exporters for m in errors_in(e)]
    for exporter in exporters:
        reasons = exporter.reasons(made.artifact.graph, specs, added, caches)
        problems += [Problem(f"export.{exporter.key}", reason) for reason in reasons]
    if problems:
        raise ConfigError(problems, str(made.folder))


def _expecting(made: PackedFolder, evaluated: Dataset | None) -> Expect | None:
    if evaluated is None:
        return None
    inputs, labels = evaluated.inputs, evaluated.labels
    judge = judge_of(made.artifact.graph.model, labels)

    @cache
    def expected(dtype: torch.dtype) -> Expected:
        ready = inputs.to(dtype) if inputs.is_floating_point() else inputs
        try:
            return Expected.of(loaded(made, made.folder, dtype), ready, labels, judge)
        finally:
            give_back()

    return expected


def _evaluation_data(made: PackedFolder, section: Evaluation | None, bars: Bars) -> Dataset | None:
    """What the pipeline was evaluated on; else, of a language model, arbitrary tokens."""
    graph = made.artifact.graph
    if section is not None:
        try:
            reader = given.Reader(made.folder, graph.model)
            found = given.read_data(section, reader, "evaluation", bars.over)
            return None if found.named else found  # containers are compared on models of one input
        except DataError:
            pass  # a file that is no longer there, or data that was given from Python
    if not graph.is_language_model:
        return None
    words = vocabulary(graph.model)
    return Dataset(some_tokens(words, longest_window(graph.model) or 128))


def _report(folder: Path) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        noted["verified"]["tensors_equal"]
        return noted
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder} is not a finished folder that compress wrote: {error}") from error


def _recorded_evaluation(folder: Path) -> tuple[torch.dtype | None, Evaluation | None]:
    """The type it computed in, and what it was evaluated on, if that can be read again."""
    try:
        written = yaml.safe_load((folder / "pipeline.yaml").read_text(encoding="utf-8"))
        section = written.get("evaluate")
        again = section is not None and section["source"] != GIVEN
        dtype = None if written["dtype"] == "auto" else getattr(torch, written["dtype"])
        return dtype, Evaluation(**section) if again else None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder}/pipeline.yaml is not what a run wrote: {error}") from error
