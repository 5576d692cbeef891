"""Post-training compression in one file: merge, prune, retrain, quantize, compensate, measure, export.

Importing this package teaches transformers to load what it writes:

    import compress
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("OUT")  # weights stay packed

Every public name stands in `__init__.pyi` and is imported when it is first used.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from compress.runtime import hook

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
hook.install()


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used; the version is looked up in what is installed."""
    if name == "__version__":
        from compress.encodings.format import version

        return version()
    return _public(name)
