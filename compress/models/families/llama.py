"""Decoders whose MLP is down(act(gate(x)) * up(x)), and whose values go from v_proj through attention to o_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.residual import Streams
from compress.models.symmetry import Wiring, axes_among

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from compress.models.symmetry import Axis


class GatedDecoder(Language):
    """All models that are wired like Llama."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), rotary=True)
    streams = Streams(
        rows=(
            *("o_proj", "down_proj", "norm", "input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        columns=(
            *("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
            *("lm_head", "score", "classifier", "qa_outputs"),
        ),
        neither=("q_norm", "k_norm"),
    )
    code: ClassVar[tuple[str, ...]] = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "olmo",
        "olmo2",
        "smollm3",
        "granite",
    )

    def axes(self, model: nn.Module, sites: Collection[str]) -> tuple[Axis, ...]:
        return axes_among(self.symmetry(model, {}), sites)


class Llama(GatedDecoder):
    """Llama and Mistral, which add nothing to the gated decoder."""

    code = ("llama", "mistral")
