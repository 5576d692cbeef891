"""`compress compare`: finished folders beside each other, on a terminal and as a page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from compress import logs
from compress.cli.options import JsonOption, console_for_stdout  # noqa: TC001  (typer reads it)
from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.report.finished import Finished


def compare(
    results: Annotated[list[Path], typer.Argument(help="compressed folders")],
    layers: Annotated[int, typer.Option(min=0, help="how many of the layers that differ most to list")] = 10,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="also let each go on with this text; may be given again")
    ] = None,
    against: Annotated[str | None, typer.Option(help="the original, which then goes on with the prompts too")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="to go on with")] = 48,
    html: Annotated[Path | None, typer.Option(help="and a page with tables and charts, written into this file")] = None,
    as_json: JsonOption = False,
) -> None:
    """Set results beside each other: quality, size, layers that differ, and what each writes."""
    from compress.api.output_folder import refuse_changed, refuse_file
    from compress.report import comparison

    if against is not None and not prompts:
        raise UsageError("--against is the original that goes on with prompts; give one with --prompt")
    names = _names(results)
    for folder in results:
        if html:
            refuse_file(html, folder)
        if not folder.is_dir():
            raise UsageError(f"no such folder: {folder}")
        refuse_changed(folder)
    found = [_finished(folder, name) for folder, name in zip(results, names, strict=True)]
    written: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts or ()}
    if written:
        from compress.api.continuations import continuations

        models = {**({} if against is None else {against: against}), **dict(zip(names, map(str, results), strict=True))}
        for name, model in models.items():
            for prompt, text in zip(written, continuations(model, list(written), tokens), strict=True):
                written[prompt][name] = text
    if html:
        from compress.io.atomic import write_text
        from compress.report.comparison_page import page

        write_text(html, page(found, layers, written))
    if as_json:
        print(json.dumps({**comparison.as_json(found, layers), "written": written}, indent=1))
        return
    comparison.show(found, layers, console_for_stdout())
    for prompt, texts in written.items():
        print(f"\nafter {prompt!r}")
        for name, text in texts.items():
            print(f"\n{logs.printable(name)}:\n{indent(logs.printable(text.strip()), '    ')}")


def _names(results: list[Path]) -> list[str]:
    """What folders are called beside each other: by their names, or by their paths where names are alike.

    Raises:
        UsageError: a folder is named twice.
    """
    places = [folder.resolve() for folder in results]
    twice = [folder for folder, place in zip(results, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice; compare takes different results")
    count = Counter(place.name for place in places)
    return [p.name if count[p.name] == 1 else str(folder) for p, folder in zip(places, results, strict=True)]


def _finished(folder: Path, name: str) -> Finished:
    from compress.export.packed import packed_layers
    from compress.report import layers
    from compress.report.finished import Finished, read_report

    if not (folder / layers.REPORT).is_file():
        raise UsageError(
            f"{folder} is no result of `compress run`: it has no {layers.REPORT}; `compress eval` measures any model"
        )
    return Finished(name, read_report(folder), layers.layers(packed_layers(folder), layers.notes_of(folder)))
