"""What code a result was computed by: the files that a module imports, one after the other, and versions of libraries.

Only what can change a number counts. Comments, docstrings, layout and imports for type checkers do not; neither does a
file that nothing on the way imports. An installed library counts with its version, Python's own not at all.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import secrets
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import TypeAlias

PACKAGE = "compress"
ROOT = Path(__file__).parent.parent
LAZY = {"torch": "torch", "nn": "torch", "functional": "torch", "np": "numpy", "transformers": "transformers"}
ALWAYS = ("torch", "transformers")  # every result depends on them
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "PyYAML"}  # that are not called as what is imported

Locate: TypeAlias = Callable[[str], Path | None]  # full name of a module -> its file, None of what is a library's


@dataclass(frozen=True)
class Imported:
    """One name that a file imports.

    Attributes:
        module: as it stands there.
        name: that is taken out of it; empty where the module itself is imported.
        level: dots before a relative name.
    """

    module: str
    name: str = ""
    level: int = 0


@dataclass(frozen=True)
class SourceFile:
    """One file.

    Attributes:
        digest: SHA-256 of its code.
        imports: in its order, wherever in the file they stand.
    """

    digest: str
    imports: tuple[Imported, ...]


def code_of(kinds: Iterable[type], modules: Iterable[str] = (), locate: Locate | None = None) -> str:
    """A hash over the code that classes, their bases and some modules are computed by.

    Args:
        kinds: of passes, this package's or others. One without a source file, made at a prompt, may have changed since
            and gives another hash each time.
        modules: full names.
        locate: where modules lie; where Python finds them by default.
    """
    names = {base.__module__ for kind in kinds for base in kind.__mro__}
    lost = sorted(name for name in names if _is_foreign(name) and _loaded_from(name) is None)
    found = fingerprint([*names, *modules], locate or located)
    return hashlib.sha256("".join([found, secrets.token_hex(), *lost]).encode()).hexdigest() if lost else found


def plug_ins(kinds: Iterable[type]) -> list[type]:
    """The kinds that are defined outside this package."""
    return [kind for kind in kinds if _is_foreign(kind.__module__)]


def place_of(kind: type) -> str:
    """The file and line of a class, for whoever wrote it."""
    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def fingerprint(modules: Iterable[str], locate: Locate) -> str:
    """A hash over the code of modules and of all that they import, and over the versions of the libraries among it."""
    asked = frozenset(modules)
    own = locate is located and not any(map(_is_foreign, asked))
    files, libraries = _own_closure(asked, _state()) if own else closure(asked, locate)
    lines = [f"{name} {read_code(file).digest}" for name, file in sorted(files.items())]
    lines += [f"{name}=={_installed_version(name)}" for name in sorted(libraries | set(ALWAYS))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=64)
def _own_closure(modules: frozenset[str], _unchanged: tuple[tuple[int, int], ...]) -> tuple[dict[str, Path], set[str]]:
    """What modules of this package import, found once while none of its files changes: every stage asks for it."""
    return closure(modules, located)


def _state() -> tuple[tuple[int, int], ...]:
    """When every file of this package was changed, and its size."""
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, _own_files()))


@cache  # as of `_own_file`
def _own_files() -> tuple[str, ...]:
    return tuple(sorted(str(file) for pattern in ("*.py", "*.pyi") for file in ROOT.rglob(pattern)))


def closure(modules: Iterable[str], locate: Locate) -> tuple[dict[str, Path], set[str]]:
    """Modules and all that they import: (module -> file, names of libraries)."""
    locate = cache(locate)  # most modules are imported by many
    files: dict[str, Path] = {}
    libraries: set[str] = set()
    waiting = {name: _loaded_from(name) if _is_foreign(name) else locate(name) for name in modules}
    while waiting:
        module, file = waiting.popitem()
        if file is None:
            library = module.partition(".")[0]
            if library not in sys.stdlib_module_names and library != "__main__":
                libraries.add(library)
        elif module not in files:
            files[module] = file
            needed = (_resolved(each, module, file, locate) for each in read_code(file).imports)
            waiting.update((name, locate(name)) for name in needed if name not in files)
    return files, libraries


def located(module: str) -> Path | None:
    """The file of a module of this package, or of one that belongs to no installed library."""
    first, *rest = module.split(".")
    if first == PACKAGE:
        return _own_file(*rest)
    return None if _is_library(first) else _loaded_from(module)


@cache  # no file of this package comes or goes while it computes
def _own_file(*parts: str) -> Path | None:
    path = ROOT.joinpath(*parts)
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)


def read_code(file: Path) -> SourceFile:
    """A file's code and imports."""
    stat = file.stat()
    return _parsed_code(file, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed_code(file: Path, _changed: int, _size: int) -> SourceFile:
    return _meaning_of(file.read_bytes())


@cache  # a copy of a file means the same
def _meaning_of(code: bytes) -> SourceFile:
    tree = ast.parse(code)
    statements = list(_computing(tree))
    compiled = compile(tree, "", "exec", dont_inherit=True)
    return SourceFile(hashlib.sha256(repr(_instructions(compiled)).encode()).hexdigest(), tuple(_imports(statements)))


def _computing(parent: ast.AST) -> Iterator[ast.stmt]:
    """Every statement below, after docstrings and what only type checkers read were taken out of the tree."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        below = getattr(parent, part, None)
        if isinstance(below, list):
            below[:] = [kept for each in below for kept in _without_annotations(each)]
            if not below and part == "body" and not isinstance(parent, ast.Module):
                below.append(ast.Pass(lineno=1, col_offset=0, end_lineno=1, end_col_offset=0))
            for node in below:
                if isinstance(node, ast.stmt):
                    yield node
                yield from _computing(node)


def _without_annotations(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return []
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return list(node.orelse)
    return [node]


def _instructions(value: object) -> object:
    """What a compiled file, function or constant does, wherever in the file it stands."""
    if isinstance(value, CodeType):
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        shape = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        constants = [_instructions(each) for each in value.co_consts]
        return value.co_name, shape, value.co_code, value.co_exceptiontable, names, constants
    if isinstance(value, tuple):
        return tuple(_instructions(each) for each in value)
    if isinstance(value, frozenset):  # in another order in every process
        return "frozenset", sorted(repr(_instructions(each)) for each in value)
    return value


def _imports(statements: Sequence[ast.stmt]) -> Iterator[Imported]:
    whole = set()  # what the package itself is called
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            yield from (Imported(node.module or "", alias.name, node.level) for alias in node.names)
        elif isinstance(node, ast.Import):
            whole |= {alias.asname or alias.name for alias in node.names if alias.name == PACKAGE}
            yield from (Imported(alias.name) for alias in node.names)
    for each in (inner for statement in statements for inner in ast.walk(statement)) if whole else ():
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in whole:
            yield Imported(PACKAGE, each.attr)


def _resolved(imported: Imported, importer: str, file: Path, locate: Locate) -> str:
    """The module that defines what is imported; a package that only hands a name on is looked through."""
    module, name = imported.module, imported.name
    if imported.level:
        parts = importer.split(".")
        parts = parts[: len(parts) - imported.level + (file.name == "__init__.py")]
        module = ".".join([*parts, module] if module else parts)
    if module == f"{PACKAGE}.lazy" and name in LAZY:
        return LAZY[name]
    if name and locate(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    package = locate(module)
    if name and package is not None and package.name == "__init__.py":
        stub = package.with_suffix(".pyi")
        listed = stub if stub.is_file() else package
        for each in read_code(listed).imports:
            if each.name == name:
                return _resolved(each, module, package, locate)
    return module


def _is_foreign(module: str) -> bool:
    first = module.partition(".")[0]
    return first != PACKAGE and (first == "__main__" or first not in sys.stdlib_module_names)


def _loaded_from(module: str) -> Path | None:
    """The source file of a module that is loaded or can be."""
    try:
        known = sys.modules.get(module)
        file = getattr(known, "__file__", None) if known else getattr(find_spec(module), "origin", None)
    except (ImportError, ValueError):
        return None
    path = Path(file) if file else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


@cache
def _is_library(name: str) -> bool:
    """Whether a module without a dot is Python's own, compiled or installed, wherever. It is not imported."""
    file = None if name in sys.stdlib_module_names else _loaded_from(name)
    if file is None or any(file.is_relative_to(folder) for folder in sysconfig.get_paths().values()):
        return True
    # Another environment's packages, such as the system's, have what they were installed from beside them.
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    return next(folder.glob("*.dist-info"), None) is not None


@cache
def _installed_version(library: str) -> str:
    try:
        return version(DISTRIBUTIONS.get(library, library))
    except PackageNotFoundError:
        if find_spec(library) is None:  # optional, and not installed
            return ""
        return " ".join(sorted(version(name) for name in set(packages_distributions().get(library, ()))))
