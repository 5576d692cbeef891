"""GPT-2: layers that are stored transposed, one for query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.residual import Streams
from compress.models.symmetry import Wiring

if TYPE_CHECKING:
    from collections.abc import Mapping


class Gpt2(Language):
    """Known by its wiring."""

    wiring = Wiring(("c_attn", "c_proj"), ("c_fc", "c_proj"))
    streams = Streams(
        rows=("c_proj", "ln_1", "ln_2", "ln_f"),
        columns=("wte", "wpe", "c_attn", "c_fc", "lm_head", "score", "classifier", "qa_outputs"),
    )
    code = ("gpt2",)
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",), "transformer.ln_f": ("lm_head",),
    }  # fmt: skip
