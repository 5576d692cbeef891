"""GPT-NeoX and Pythia: one layer for query, key and value, in which those of a head stand together."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.symmetry import Wiring


class GptNeoX(Language):
    """Known by its wiring."""

    wiring = Wiring(("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h"), rotary=True, by_head=True)
    code = ("gpt_neox",)
