"""What several commands are given, and where they print."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress import logs
from compress.cli import completion

if TYPE_CHECKING:
    from rich.console import Console

    from compress.progress import Bars

PipelineArg = Annotated[
    Path,
    typer.Argument(
        help="a pipeline file, or the name of a ready-made one; `compress init` writes a file",
        autocompletion=completion.pipelines,
    ),
]
ModelArg = Annotated[str, typer.Argument(help="demo, a local folder, a hub id, an adapter, or BASE+ADAPTER")]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="the folder to write  [default: named after model and pipeline]")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace the folder that -o names")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="forget what an interrupted run had finished")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a value in the place of the pipeline's: passes[0].gptq.bits=3"),
]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE", help="a file of Python that defines passes of your own")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="what computes: auto, cpu, cuda, cuda:1  [default: the pipeline's choice, or auto]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="say more, with the traceback of an error")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="say nothing but errors")]


def bars_for(verbose: bool, quiet: bool) -> Bars:
    """Progress as loud as it is asked for."""
    from compress.progress import Bars

    if verbose or quiet:
        logs.set_level(logging.DEBUG if verbose else logging.ERROR)
    return Bars(drawn=logs.LOGGER.isEnabledFor(logging.WARNING))


def console_for_stdout() -> Console:
    """Prints names as they are, whatever brackets they hold."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 160
    no_color = "NO_COLOR" in os.environ or None
    return Console(width=wide, no_color=no_color, highlight=False, markup=False, emoji=False)
