"""A run and a plan as a terminal shows them, whichever command asks for them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import logs
from compress.cli import ranks
from compress.cli.interrupts import keeping
from compress.cli.options import bars_for, console_for_stdout
from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.config.pipeline import Pipeline
    from compress.progress import Bars
    from compress.report.report import Row


@dataclass(frozen=True)
class Shown:
    """How a command shows what it does, and where it computes.

    Attributes:
        device: what computes; None leaves it to the pipeline.
        as_json: print JSON for machines.
        bars: progress.
    """

    device: str | None
    as_json: bool
    bars: Bars

    @classmethod
    def of(cls, device: str | None, as_json: bool, verbose: bool, quiet: bool) -> Shown:
        """By the options that commands share."""
        return cls(device, as_json, bars_for(verbose, quiet))


def know(plugins: Sequence[Path] | None) -> None:
    """Make passes of the user's own known."""
    if plugins:
        from compress.config.plugins import load

        load(plugins)


def folder_for(out: Path | None, model: str, label: str, overwrite: bool) -> Path:
    """The folder that is written: the one that is named, or MODEL-label in the working directory.

    Raises:
        UsageError: a folder is to be replaced that nobody named.
    """
    if out is not None:
        return out
    if overwrite:
        raise UsageError("--overwrite replaces a folder, and none is named; give it with -o")
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return Path(re.sub(r"[^\w.-]+", "-", f"{name}-{label}").strip("-."))


def read(pipeline: Path, changes: Sequence[str], out: Path, overwrite: bool) -> Path | Pipeline:
    """A pipeline that can be run: its file, or what it is with values in the place of others.

    Its mistakes are said before torch is imported, and the file is not written over.
    """
    from compress.config.reading import load_pipeline

    steps = load_pipeline(pipeline, changes)
    if not changes:
        return pipeline
    from compress.api.output_folder import inputs_of, refuse_destination

    refuse_destination(out.absolute(), {"pipeline": inputs_of(steps, [], pipeline)["pipeline"]}, overwrite)
    return steps


def build_and_show(
    name: str,
    values: Mapping[str, Any],
    changes: Sequence[str] | None,
    model: str,
    out: Path | None,
    shown: Shown,
    *,
    dry_run: bool,
    overwrite: bool,
    fresh: bool,
) -> None:
    """Run a pipeline that a command has built, or print it and its plan.

    Args:
        name: what the result is called behind the model's name.
        values: the pipeline, as a file has it.
        changes: values in the place of others, as of `load_pipeline`.
        model: what is compressed.
        out: the folder to write; None for one named after model and pipeline.
        shown: how it is shown.
        dry_run: print, and run nothing.
        overwrite: as of `compress.run`.
        fresh: as of `compress.run`.
    """
    from compress.config.changes import changed
    from compress.config.reading import load_pipeline
    from compress.config.writing import written

    folder, steps = folder_for(out, model, name, overwrite), load_pipeline(values, changes or ())
    if not dry_run:
        run_and_show(steps, model, folder, shown, overwrite=overwrite, fresh=fresh)
        return
    head = f"# compress run pipeline.yaml {shlex.quote(model)} -o {shlex.quote(str(folder))}"
    plan_and_show(steps, name, model, shown, before=f"{head}\n{written(changed(values, changes or ()))}")


def run_and_show(
    pipeline: Path | Pipeline, model: str, out: Path, shown: Shown, *, overwrite: bool, fresh: bool
) -> None:
    """Run a pipeline, and print its table as the rows come."""
    from compress.api import run as api
    from compress.report import run_table, sentences

    existed, console, bars = out.exists(), console_for_stdout(), shown.bars
    table = run_table.RunTable(console, logs.printable(model), api.row_names(pipeline))

    def show(row: Row) -> None:
        if not shown.as_json:
            with bars.paused():
                table.add(row)

    try:
        with keeping(f"what was finished is kept in {out}.work; the same command continues where it stopped"):
            options: dict[str, Any] = {"overwrite": overwrite, "fresh": fresh, "device": shown.device}
            report = api.run(pipeline, model, out, executor=ranks.executor(), bars=bars, on_row=show, **options)
    finally:
        table.close()
    if existed and not overwrite:
        logs.LOGGER.warning("%s holds this very run already; nothing was done", out)
    if shown.as_json:
        print(report.to_json(), end="")
        return
    table.finish(report)
    for text in sentences.run_lines(report, out):
        console.print(logs.printable(text), soft_wrap=True)


def plan_and_show(
    steps: Pipeline, file: str, model: str, shown: Shown, with_shares: bool = False, before: str = ""
) -> None:
    """Print what each pass of a pipeline will touch and cost.

    Args:
        steps: the pipeline.
        file: what messages call it.
        model: what it would be run on.
        shown: how it is shown.
        with_shares: read the weights, to say how many of each block become zero.
        before: printed above it.
    """
    from compress.api.amounts import check_amounts
    from compress.checkpoint import opening
    from compress.engine.merge import checks
    from compress.planning import allocation_preview, places, plan
    from compress.report import plan as report

    opened = opening.open_model(model).of_towers(steps.towers)
    where = places.places(shown.device or steps.device, steps.max_memory)
    graph, companions = opened.artifact.graph, opened.companion_bytes
    made = plan.make(steps, graph, opened.dtypes, file, companions, where, opened.carried_bytes)
    checks.check_models(steps, opened.artifact, file)
    notes = check_amounts(steps, opened, file)
    allocations = allocation_preview.allocations(made)
    with shown.bars.shown():
        shares = allocation_preview.known_shares(allocations, opened.artifact, shown.bars) if with_shares else {}
    found = report.Shown(made, allocations, shares, logs.printable(f"{file} on {model}"))
    if shown.as_json:
        print(report.as_json(found))
        return
    console = console_for_stdout()
    if before:
        console.print(logs.printable(before), soft_wrap=True)
    console.print(report.table(found))
    for line in (*report.lines(found, console.width, console.options.ascii_only), *(f"note: {n}" for n in notes)):
        console.print(line, soft_wrap=True)
    if with_shares and not allocations:
        console.print("--shares: no pass gives layers different shares of zeros", soft_wrap=True)


__all__ = ["Shown", "build_and_show", "folder_for", "know", "plan_and_show", "read", "run_and_show"]
