"""GPT-2: layers that are stored transposed, one for query, key and value."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.symmetry import Wiring


class Gpt2(Language):
    """Known by its wiring."""

    wiring = Wiring(("c_attn", "c_proj"), ("c_fc", "c_proj"))
    code = ("gpt2",)
