"""OPT: learned positions, a plain MLP."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.residual import STREAM, TOKENS, Streams
from compress.models.symmetry import Wiring


class Opt(Language):
    """Known by its wiring."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"))
    streams = Streams(
        rows=("out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm"),
        columns=("embed_positions", "q_proj", "k_proj", "v_proj", "fc1"),
        between={
            **dict.fromkeys(("embed_tokens", "lm_head", "score", "qa_outputs"), (None, TOKENS)),
            "project_in": (STREAM, TOKENS),
            "project_out": (TOKENS, STREAM),
        },
        unless={TOKENS: ("project_in",)},
    )
    code = ("opt",)
