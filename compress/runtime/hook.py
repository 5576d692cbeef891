"""Registers with transformers when it is imported, which may be later than this package, or never."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"  # the module whose tables `register` adds to


def install() -> None:
    """Register now if transformers' quantizers are imported, else as soon as they are."""
    if QUANTIZERS in sys.modules:
        _register_packed()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_packed() -> None:
    # Done by importing it; where it is what imports transformers, that is under way.
    import compress.runtime.register  # noqa: F401


class _Finder:
    """Finds that one module as it would be found without it, and registers once the module has run.

    It has no base class: `importlib.abc` takes longer to import than all else, and until that is done and the command
    line listens, Ctrl-C is a traceback.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register_packed()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
