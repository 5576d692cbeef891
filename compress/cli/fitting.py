"""What `compress fit` shows: the choice, then the table of the run with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress import logs
from compress.cli.interrupts import keeping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from compress.progress import Bars
    from compress.report.fitted import Fitted
    from compress.report.report import Row


def fit_and_show(model: str, out: Path, asked: Mapping[str, Any], as_json: bool, bars: Bars, console: Console) -> None:
    """Choose, run, and print both as they come.

    Args:
        model: what is compressed.
        out: the folder to write.
        asked: options of `compress.fit`.
        as_json: print one object instead, when all is done.
        bars: progress.
        console: to print on.
    """
    from compress.api.fit import fit
    from compress.report import run_table, sentences
    from compress.report.fitted import lines

    table = run_table.RunTable(console, logs.printable(model))

    def chosen(fitted: Fitted) -> None:
        if not as_json:
            with bars.paused():
                for text in lines(fitted):
                    console.print(logs.printable(text), soft_wrap=True)

    def row(measured: Row) -> None:
        if not as_json:
            with bars.paused():
                table.add(measured)

    try:
        with keeping(f"what was finished is kept in {out}.fit and {out}.work; the same command continues"):
            made = fit(model, out, bars=bars, on_fit=chosen, on_row=row, **asked)
    finally:
        table.close()
    if as_json:
        report = None if made.report is None else json.loads(made.report.to_json())
        print(json.dumps({**made.fitted.summary(), "pipeline": str(made.pipeline), "report": report}, indent=1))
        return
    if made.report is not None:
        table.finish(made.report)
        for text in sentences.run_lines(made.report, out):
            console.print(logs.printable(text), soft_wrap=True)
    console.print(logs.printable(f"{made.pipeline}: the choice, as a pipeline"), soft_wrap=True)


__all__ = ["fit_and_show"]
