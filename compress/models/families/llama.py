"""Decoders whose MLP is down(act(gate(x)) * up(x)), and whose values go from v_proj through attention to o_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.symmetry import Wiring, axes_among

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

    from compress.models.symmetry import Axis

BLOCK_NAME = "model.layers.{}"
# What llama.cpp calls the modules of its architecture `llama`.
GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    f"{BLOCK_NAME}.input_layernorm": "blk.{}.attn_norm",
    f"{BLOCK_NAME}.self_attn.q_proj": "blk.{}.attn_q",
    f"{BLOCK_NAME}.self_attn.k_proj": "blk.{}.attn_k",
    f"{BLOCK_NAME}.self_attn.v_proj": "blk.{}.attn_v",
    f"{BLOCK_NAME}.self_attn.o_proj": "blk.{}.attn_output",
    f"{BLOCK_NAME}.post_attention_layernorm": "blk.{}.ffn_norm",
    f"{BLOCK_NAME}.mlp.gate_proj": "blk.{}.ffn_gate",
    f"{BLOCK_NAME}.mlp.up_proj": "blk.{}.ffn_up",
    f"{BLOCK_NAME}.mlp.down_proj": "blk.{}.ffn_down",
}


class GatedDecoder(Language):
    """All models that are wired like Llama."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), rotary=True)
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

    def export_names(self, container: str) -> Mapping[str, str]:
        return GGUF if container == "gguf" else {}
