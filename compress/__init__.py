"""Post-training compression in one file: merge, prune, retrain, quantize, compensate, measure, export.

Importing this package teaches transformers to load what it writes:

    import compress
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("OUT")  # weights stay packed

Every public name stands in `__init__.pyi` and is imported when it is first used.
"""

from __future__ import annotations

import lazy_loader

from compress.encodings.format import version
from compress.runtime import hook

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version()
hook.install()
