"""Passes of one's own, known to pipeline files under their keys: from a file, from an installed package, from Python.

They are code, and run as such: only what a user names, or has installed, is imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from compress.config.pipeline import FORMATS, METHODS, PACKED
from compress.errors import UsageError
from compress.io.source_code import place_of
from compress.passes import Pass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GROUP = "compress.passes"  # of entry points: key -> module:Class
KEY = re.compile(r"[a-z][a-z0-9_]*")
Kind = TypeVar("Kind", bound=type[Pass])
LOADED: set[str] = set()  # names of modules that were loaded from files


def register_pass(kind: Kind) -> Kind:
    """Make a pass of your own known to pipelines under its key; as a decorator below `dataclass`, or called.

    Args:
        kind: a frozen dataclass derived from `LinearPass`, `BlockPass`, `ModelPass` or another kind of pass.

    Returns:
        the same.

    Raises:
        UsageError: it is no such class, or its key is taken.

    Example:
        >>> import compress, tempfile
        >>> from dataclasses import dataclass
        >>> from compress.passes.base import Edit, LinearPass
        >>> @compress.register_pass
        ... @dataclass(frozen=True, kw_only=True)
        ... class Halve(LinearPass):
        ...     key = "halve"
        ...     def produces(self, kind):
        ...         return kind
        ...     def run(self, target):
        ...         return Edit(weight=target.weight / 2, mask=target.mask)
        ...     def stand_in(self):
        ...         return self
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"halve": {"include": ["*.up_proj"]}}]}, "demo", f"{folder}/out")
        >>> report.rows[-1].name
        'halve'
    """
    for fault in _faults(kind):
        raise UsageError(f"{place_of(kind)}: {fault}")
    METHODS[kind.key] = kind
    return kind


def load(files: Sequence[Path]) -> None:
    """Import files and register every pass that they define.

    Raises:
        UsageError: a file that cannot be imported, with its line, or that defines no pass.
    """
    for file in files:
        _load(file)


def find(key: str) -> type[Pass] | None:
    """The pass that an installed package offers under a key, registered; None where none does."""
    for point in entry_points(group=GROUP, name=key):
        try:
            kind: type[Pass] = point.load()
        except Exception as error:
            raise UsageError(f"{point.value}, which offers {key}, cannot be imported: {_said(error)}") from error
        if getattr(kind, "key", None) != key:
            raise UsageError(f"{point.value} is offered as {key}, and its key is {getattr(kind, 'key', None)}")
        return register_pass(kind)
    return None


def _load(file: Path) -> None:
    if file.suffix != ".py" or not file.is_file():
        raise UsageError(f"--plugin {file}: no such file of Python code")
    name = file.stem
    if importlib.util.find_spec(name) is not None and name not in LOADED:
        raise UsageError(f"--plugin {file}: there is a module called {name} already; give the file another name")
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where what is derived from it, and the hash of its code, look for it
    LOADED.add(name)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"--plugin {_line(error, file)}: {_said(error)}") from error
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == name]
    passes = [kind for kind in kinds if issubclass(kind, Pass) and "key" in vars(kind)]
    if not passes:
        raise UsageError(
            f"--plugin {file}: it defines no pass, which is a class with a `key` derived from one of compress"
        )
    for kind in passes:
        register_pass(kind)


def _faults(kind: type) -> list[str]:
    name = getattr(kind, "__name__", kind)
    if not (inspect.isclass(kind) and issubclass(kind, Pass)):
        return [f"{name} is no pass; derive it from compress.LinearPass or another kind"]
    key = getattr(kind, "key", None)
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return [f"{name} has no key of small letters, digits and underscores; write key: ClassVar[str] = 'my_pass'"]
    known = METHODS.get(key)
    again = known is not None and (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)
    if (known is not None and not again) or key in {*FORMATS, PACKED, "blockwise"}:
        return [f"{name} has the key {key}, which is taken; choose another"]
    if "__dataclass_params__" not in vars(kind):
        return [f"{name} is no frozen dataclass; write @dataclass(frozen=True, kw_only=True) above it"]
    return []


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _line(error: BaseException, file: Path) -> str:
    """The file, with the line of it that failed."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{file}:{error.lineno}"
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.resolve())]
    return f"{file}:{own[-1]}" if own else str(file)
