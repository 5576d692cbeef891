"""`compress sweep`: a line for each run as it ends, then all of them beside each other."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import logs
from compress.cli import running
from compress.cli.interrupts import keeping
from compress.cli.options import (
    DeviceOption,
    FreshOption,
    JsonOption,
    ModelArg,
    OutOption,
    OverwriteOption,
    PluginOption,
    QuietOption,
    SetOption,
    VerboseOption,
    console_for_stdout,
)
from compress.errors import CompressError, GateError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.report.swept import Outcome


def sweep(
    settings: Annotated[Path, typer.Argument(metavar="SWEEP", help="a file with `pipeline:` and `grid:`")],
    model: ModelArg,
    out: OutOption = None,
    changes: SetOption = None,
    plugins: PluginOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list all runs, and run none")] = False,
    overwrite: OverwriteOption = False,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a pipeline with every combination of some values, and set the results beside each other.

    Interrupted, the same command continues; what runs have in common is computed once.
    """
    shown = running.Shown.of(device, as_json, verbose, quiet)
    running.know(plugins)
    from compress.config.sweep import load_sweep

    combinations = load_sweep(settings, changes or ())
    folder = running.folder_for(out, model, settings.stem, overwrite)
    from compress.api import sweep as api

    if dry_run:
        from compress.checkpoint.opening import open_model

        notes = api.check_all(combinations, open_model(model), folder, overwrite)
        for each in combinations:
            print(logs.printable(f"{folder / each.name}: {json.dumps(dict(each.values))}"))
        for note in notes:
            print(logs.printable(f"note: {note}"))
        return
    ended: list[Outcome] = []
    options: dict[str, Any] = {"overwrite": overwrite, "fresh": fresh, "device": device}

    def show(outcome: Outcome) -> None:
        ended.append(outcome)
        _show(outcome, len(ended), len(combinations), shown)

    with keeping(f"what was finished is kept in {folder}; the same command continues where it stopped"):
        made = api.sweep(combinations, model, folder, bars=shown.bars, on_run=show, **options)
    _finish(made, as_json)


def _show(outcome: Outcome, number: int, of: int, shown: running.Shown) -> None:
    from compress.report.swept import line

    if not shown.as_json:
        with shown.bars.paused():
            print(logs.printable(f"[{number}/{of}] {line(outcome)}"), flush=True)


def _finish(made: Any, as_json: bool) -> None:
    """Print the table.

    Raises:
        CompressError: a run has failed; of the others all is written.
    """
    from compress.report import comparison, swept

    files = [file for file in (made.table, made.page) if file is not None]
    if as_json:
        print(json.dumps({"runs": swept.as_rows(made.outcomes), "files": list(map(str, files))}, indent=1))
    else:
        finished = [each.finished for each in made.outcomes if each.finished is not None]
        if finished:
            comparison.show(finished, 0, console_for_stdout())
        print(logs.printable(f"written: {' and '.join(shlex.quote(str(file)) for file in files)}"))
    if made.failed:
        raise _failure(made.failed, len(made.outcomes))


def _failure(failed: Sequence[Outcome], of: int) -> CompressError:
    """What to end with: a gate that none of them met, room that all of them lacked, or else a plain error."""
    from compress.report.swept import said

    whole = f"{len(failed)} of {of} runs failed: " + "; ".join(f"{each.name}: {said(each.error)}" for each in failed)
    for kind in (GateError, ResourceError):  # which have an exit code of their own
        if all(isinstance(each.error, kind) for each in failed):
            return kind(whole)
    return CompressError(whole)


__all__ = ["sweep"]
