"""GPT-NeoX and Pythia: one layer for query, key and value, in which those of a head stand together."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.residual import Streams
from compress.models.symmetry import Wiring

if TYPE_CHECKING:
    from collections.abc import Mapping


class GptNeoX(Language):
    """Known by its wiring."""

    wiring = Wiring(("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h"), rotary=True, by_head=True)
    streams = Streams(
        rows=("dense", "dense_4h_to_h", "input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        columns=(
            *("embed_in", "query_key_value", "dense_h_to_4h"),
            *("lm_head", "embed_out", "score", "classifier", "qa_outputs"),
        ),
    )
    code = ("gpt_neox",)
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        "gpt_neox.final_layer_norm": ("lm_head",),
    }
