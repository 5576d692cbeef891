"""Takes the small random models of tests/models through the package and writes the table of docs/models.md.

    python scripts/model_matrix.py                          # all of them, into docs/models.md
    python scripts/model_matrix.py --only Llama Mixtral     # those whose name starts so, to the screen

One process, a limit of time for each model; a model that fails is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models"))

from entry import Entry  # noqa: E402  (found by the line above)
from every import KINDS  # noqa: E402
from tried import METHODS, Tried, first_line, saved, tried  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
CONTAINERS = ("hf", "compressed-tensors")
LONGEST = 160  # characters of a failure


class TooLongError(Exception):
    """A model took more time than it has."""


@dataclass
class Line:
    """A row of the table."""

    kind: str
    entry: Entry
    results: dict[str, Tried] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def cells(self) -> list[str]:
        first = next(iter(self.results.values()), None)
        differences = [found.difference for found in self.results.values() if found.difference is not None]
        exports = [key for key, failure in first.exports.items() if not failure] if first else []
        return [
            self.entry.model_type + (f" ({self.entry.label})" if self.entry.label else ""),
            self.entry.architecture,
            f"{first.share:.0%}" if first else "",
            f"{first.reached:.0%}" if first else "",
            ", ".join(self.results),
            f"{max(differences):.1g}" if differences else "",
            ", ".join(exports),
            self.said(),
        ]

    def said(self) -> str:
        """What failed, what is the same for all methods once."""
        first = next(iter(self.failures.values()), "")
        alike = not self.results and set(self.failures.values()) == {first}
        words = first if alike else "; ".join(f"{method}: {failure}" for method, failure in self.failures.items())
        return words.replace("|", "/")[: LONGEST * (1 if alike else 2)]

    def wrong(self) -> bool:
        """Whether it is otherwise than its entry says."""
        entry = self.entry
        if entry.refused:
            return not self.failures or bool(self.results)
        return self.failures.keys() != set(entry.without) or any(
            found.share < entry.share or (found.difference or 0.0) > entry.tolerance for found in self.results.values()
        )


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def line_of(kind: str, entry: Entry, methods: list[str], limit: int) -> Line:
    found, began = Line(kind, entry), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        place = Path(folder)
        try:
            with at_most(limit):
                saved(entry, place / "source")
                for method in methods:
                    containers = CONTAINERS if method == methods[0] else ()
                    try:
                        found.results[method] = tried(entry, method, place / "source", place / method, containers)
                    except TooLongError:
                        raise
                    except Exception as error:
                        found.failures[method] = first_line(error)
        except Exception as error:  # one that cannot be made, or takes too long
            found.failures["all"] = first_line(error)
        found.failures = {method: said.replace(f"{place}/", "") for method, said in found.failures.items()}
    found.seconds = time.perf_counter() - began
    return found


Row = tuple[str, list[str]]  # kind, cells


def table(rows: list[Row]) -> str:
    heads = ("model type", "class", "reached", "of all", "methods", "differs by", "exports", "what fails")
    made = []
    for kind in KINDS:
        mine = [cells for its, cells in rows if its == kind]
        if mine:
            made += ["", f"### {kind.capitalize()}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            made += [f"| {' | '.join(cells)} |" for cells in mine]
    return "\n".join(made).strip() + "\n"


def kept_rows(file: Path | None) -> dict[str, list[str]]:
    """Rows of earlier runs, by the name of the model; the last of each."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    return {row["name"]: row["cells"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models whose class starts with NAME")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--limit", type=int, default=60, metavar="SECONDS", help="for one model")
    parser.add_argument("--out", type=Path, help="a file for the table, instead of docs/models.md")
    parser.add_argument("--json", type=Path, help="a file that keeps a line of each model; the table has all in it")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    kept = kept_rows(args.json)
    rows: list[Row] = []
    for kind, entries in KINDS.items():
        for entry in entries:
            if args.only and not any(entry.name.startswith(name) for name in args.only):
                rows += [(kind, kept[entry.name])] if entry.name in kept else []
                continue
            line = line_of(kind, entry, args.methods, args.limit)
            rows.append((kind, line.cells()))
            mark = "!" if line.wrong() else " "
            said = " | ".join(line.cells()[2:])
            print(f"{mark} {entry.name} {line.seconds:.1f}s: {said}", file=sys.stderr, flush=True)
            if args.json:
                row = {"name": entry.name, "kind": kind, "cells": line.cells(), "failures": line.failures}
                with args.json.open("a") as file:
                    print(json.dumps(row), file=file)
    text = table(rows)
    if args.out:
        args.out.write_text(text)
    elif args.only and not kept:
        print(text)
    else:
        before, rest = TARGET.read_text().split(BEGIN)
        TARGET.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
