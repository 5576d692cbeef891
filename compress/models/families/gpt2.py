"""GPT-2: layers that are stored transposed, one for query, key and value."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.residual import Streams
from compress.models.symmetry import Wiring


class Gpt2(Language):
    """Known by its wiring."""

    wiring = Wiring(("c_attn", "c_proj"), ("c_fc", "c_proj"))
    streams = Streams(
        rows=("c_proj", "ln_1", "ln_2", "ln_f"),
        columns=("wte", "wpe", "c_attn", "c_fc", "lm_head", "score", "classifier", "qa_outputs"),
    )
    code = ("gpt2",)
