"""A grid over the settings of one pipeline: every combination a run of its own, and all of them beside each other."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import progress
from compress.api.amounts import check_on
from compress.api.output_folder import inputs_of, refuse_destination
from compress.api.run import carry_out
from compress.api.work import prepare
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.opening import open_model
from compress.config.sweep import load_sweep
from compress.config.writing import dump
from compress.engine.sharing_ledger import SharingLedger
from compress.errors import ConfigError, Problem, UsageError
from compress.export.packed import packed_layers
from compress.export.refusals import refuse_missing
from compress.io import lock
from compress.io.atomic import remove_made, write_text
from compress.io.small_file import read_text
from compress.logs import LOGGER
from compress.report import layers, swept
from compress.report.comparison_page import page
from compress.report.finished import Finished
from compress.report.swept import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compress.checkpoint.opening import OpenedModel
    from compress.config.pipeline import Pipeline
    from compress.config.sweep import Combination

TABLE, PAGE, SHARED = "sweep.csv", "sweep.html", "shared.work"
LAYERS = 20  # that differ most, on the page


@dataclass(frozen=True)
class Sweep:
    """What `sweep` made.

    Attributes:
        outcomes: of every combination, in the order of the grid.
        table: file with a row for each.
        page: file with the same as charts; None where nothing was finished, or the library that draws is missing.
    """

    outcomes: Sequence[Outcome]
    table: Path
    page: Path | None

    @property
    def failed(self) -> list[Outcome]:
        """Those that came to no result."""
        return [each for each in self.outcomes if each.finished is None]


@undisturbed()
def sweep(
    settings: str | Path | Mapping[str, Any] | Sequence[Combination],
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    device: str | None = None,
    bars: progress.Bars | None = None,
    on_run: Callable[[Outcome], None] = lambda outcome: None,
) -> Sweep:
    """Run every combination of a grid over the settings of a pipeline, each in a folder of its own in OUT.

    Stages that combinations have in common from the first on are computed once. Killed at any moment, the same call
    goes on: finished runs are not run again. A run that fails does not keep the others from running.

    Args:
        settings: a YAML file, or a mapping of the same shape: `pipeline` (a file, the name of a ready-made one, or its
            content) and `grid`, keys as `--set` takes them with the values to try.
        model: as of `run`.
        out: the folder to write; a folder that no sweep wrote is refused.
        overwrite: replace results in it; see `run`.
        fresh: forget what interrupted runs had finished.
        device: as of `run`.
        bars: as of `run`.
        on_run: is given what became of each run as soon as it has ended.

    Returns:
        What became of each run, and the files that set them beside each other.

    Raises:
        UsageError: before the first run, for everything that can be known of all of them then.

    Example:
        >>> import compress, tempfile
        >>> steps = {"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}
        >>> settings = {"pipeline": steps, "grid": {"passes[0].rtn.bits": [2, 4]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = compress.sweep(settings, "demo", f"{folder}/out")
        >>> [outcome.name for outcome in made.outcomes]
        ['bits-2', 'bits-4']
    """
    combinations = _combinations(settings, device)
    folder, bars = Path(out).absolute(), bars or progress.Bars()
    _refuse_inside(folder, model, settings)
    check_all(combinations, open_model(model), folder, overwrite)
    outcomes = []
    with lock.held(folder):
        if fresh:
            remove_made(folder / SHARED)
        for each in combinations:
            ledger = partial(SharingLedger, shared=folder / SHARED, stages=each.shares)
            outcomes.append(_run(each, model, folder, bars, make_ledger=ledger, overwrite=overwrite, fresh=fresh))
            on_run(outcomes[-1])
            gc.collect()  # a model that was run is gone before the next one comes
        table, drawn = _written(outcomes, folder, str(model))
        made = Sweep(outcomes, table, drawn)
        if not made.failed:
            remove_made(folder / SHARED)
    return made


def check_all(combinations: Sequence[Combination], opened: OpenedModel, folder: Path, overwrite: bool) -> list[str]:
    """Check every combination against the model and its folder, as far as that takes no weights.

    Returns:
        Sentences on data and options, each once.

    Raises:
        UsageError: everything that is wrong with any of them.
    """
    lock.refuse_others(folder)
    notes, problems = dict[str, None](), list[Problem]()
    for each in combinations:
        try:
            _refuse_another(folder / each.name, each.pipeline, opened, overwrite)
            notes |= dict.fromkeys(check_on(each.pipeline, opened))
        except ConfigError as error:
            problems += [Problem(f"{each.name}: {p.path}", p.message) for p in error.problems]
        except UsageError as error:
            problems.append(Problem(each.name, str(error)))
    if problems:
        raise ConfigError(problems, "sweep")
    return list(notes)


def _combinations(
    settings: str | Path | Mapping[str, Any] | Sequence[Combination], device: str | None
) -> list[Combination]:
    made = load_sweep(settings) if isinstance(settings, str | Path | Mapping) else list(settings)
    if device is None:
        return made
    return [replace(each, pipeline=replace(each.pipeline, device=device)) for each in made]


def _refuse_inside(folder: Path, model: str | Path, settings: Any) -> None:
    """Refuse to write among what is read."""
    read = [Path(each) for each in (model, settings) if isinstance(each, str | Path)]
    for path in (path.absolute() for path in read if path.exists()):
        if folder == path or folder in path.parents:
            raise UsageError(f"{folder} is or holds {path}, which is read; write somewhere else")


def _refuse_another(destination: Path, steps: Pipeline, opened: OpenedModel, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or that holds the result of another pipeline."""
    refuse_destination(destination, inputs_of(steps, opened.folders, None), overwrite)
    file = destination / "pipeline.yaml"
    if overwrite or not destination.exists():
        return
    if not file.is_file() or read_text(file) != dump(steps):
        raise UsageError(
            f"{destination} is not the result of this run, but of one with other settings; choose another -o, or give "
            "--overwrite"
        )


def _run(each: Combination, model: str | Path, folder: Path, bars: progress.Bars, **options: Any) -> Outcome:
    """Run one combination, or find it finished; whatever goes wrong is an outcome too."""
    destination = folder / each.name
    try:
        work = prepare(each.pipeline, model, destination, overwrite=options["overwrite"], bars=bars)
        report = carry_out(work, destination, **options)
        found = layers.layers(packed_layers(destination), layers.notes_of(destination))
        return Outcome(each.name, each.values, Finished(each.name, report, found))
    except Exception as error:
        LOGGER.debug("%s failed", each.name, exc_info=error)
        return Outcome(each.name, each.values, None, error)


def _written(outcomes: Sequence[Outcome], folder: Path, model: str) -> tuple[Path, Path | None]:
    """The table, and the page where it can be drawn."""
    write_text(folder / TABLE, swept.as_csv(outcomes))
    finished = [each.finished for each in outcomes if each.finished is not None]
    missing = list(refuse_missing("matplotlib", "page"))
    for reason in missing if finished else ():
        LOGGER.warning("%s is not drawn: %s", folder / PAGE, reason)
    if missing or not finished:
        return folder / TABLE, None
    write_text(folder / PAGE, page(finished, LAYERS, {}, f"{len(finished)} runs on {model}"))
    return folder / TABLE, folder / PAGE


__all__ = ["Sweep", "check_all", "sweep"]
