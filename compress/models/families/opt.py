"""OPT: learned positions, a plain MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.residual import STREAM, TOKENS, Streams
from compress.models.symmetry import Wiring

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from compress.models.norms import Norm


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
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "final_layer_norm": ("fc1",),
        "model.decoder.final_layer_norm": ("lm_head",),
    }

    def norms(self, model: nn.Module) -> Iterator[Norm]:
        """None where norms stand behind what is added to the stream, as in OPT-350m."""
        return super().norms(model) if getattr(model.config, "do_layer_norm_before", False) else iter(())
