"""`compress push`: a finished folder to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress import logs


def push(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="a finished folder")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="where to on the hub: org/name")],
    export: Annotated[str | None, typer.Option(help="push this export in OUT, such as gguf, instead")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is seen by its owner alone")] = False,
    revision: Annotated[str | None, typer.Option(help="a branch that is there  [default: main]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list what would go, and send nothing")] = False,
) -> None:
    """Put a finished folder on the Hugging Face hub, with its model card, after checking every file of it.

    Exports in it are models of their own: push each with --export to a repository of its own.
    """
    from compress.api.push import push as send

    upload = send(folder, repository, export=export, private=private, revision=revision, dry_run=dry_run)
    if dry_run:
        for name, size in upload.files.items():
            print(logs.printable(f"{size:>14,}  {name}"))
        print(logs.printable(f"{upload.bytes:>14,}  bytes would go to {repository}"))
        return
    print(logs.printable(f"{upload.address}: {len(upload.files)} files, {upload.bytes:,} bytes"))
