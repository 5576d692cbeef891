"""The text behind the `demo` data source: docstrings of the running interpreter's standard library.

Nothing is stored: modules are found on disk, parsed with `ast` (never imported), and each docstring is preceded by the
line that declares what it documents, so a text reads like

    def loads(s, *, cls=None)

    Deserialize ``s`` (a ``str`` instance containing a JSON document) to a Python object.

Top-level modules are split by a hash of their name into calibration and evaluation; the bundled model has never been
trained on an evaluation module. For one Python version the texts are the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["calibration", "evaluation"]

EVALUATION_SHARE = 0.3
MIN_CHARACTERS = 60
# Tests, bundled tools and files generated for one machine: not documentation, or not the same everywhere.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "__pycache__",
}


def split_of(module: str) -> Split:
    """`calibration` or `evaluation`, by the SHA-256 of the top-level module's name."""
    digest = hashlib.sha256(module.split(".")[0].encode()).digest()
    return "evaluation" if digest[0] / 256 < EVALUATION_SHARE else "calibration"


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python module under `root`, in name order."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]  # installed packages are many
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts) and not parts[0].startswith(("_sysconfigdata", "config-")):
                found.append((".".join(p for p in parts if p != "__init__"), path))
    return iter(sorted(found))


def docstrings(path: Path) -> Iterator[str]:
    """Every docstring of one source file as `declaration, blank line, text`; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):  # of statements: no expression is documented
            waiting.extend(getattr(node, part, ()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                yield f"{_declaration(node, path)}\n\n{text.strip()}\n"


def _declaration(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> str:
    if isinstance(node, ast.Module):
        return f"module {path.parent.name if path.stem == '__init__' else path.stem}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


@cache
def texts(split: Split) -> tuple[str, ...]:
    """The docstrings of one split of the standard library, duplicates removed, in a fixed order.

    Order is by the SHA-256 of the text, so that any prefix is a fair sample over all modules. Parsing takes seconds, so
    a process does it once.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {text for name, path in modules(root) if split_of(name) == split for text in docstrings(path)}
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))
