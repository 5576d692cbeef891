"""Decoders whose MLP is down(act(gate(x)) * up(x)), and whose values go from v_proj through attention to o_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Language
from compress.models.residual import Streams
from compress.models.symmetry import Wiring, axes_among

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

    from compress.models.symmetry import Axis


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
HEAD = {"model.norm": ("lm_head",)}


class GatedDecoder(Language):
    """All models that are wired like Llama."""

    wiring = Wiring(
        ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), True, linear="up_proj"
    )
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
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input_layernorm": ATTENTION, "post_attention_layernorm": MLP, **HEAD
    }  # fmt: skip

    def axes(self, model: nn.Module, sites: Collection[str]) -> tuple[Axis, ...]:
        return axes_among(self.symmetry(model, {}), sites)


class Llama(GatedDecoder):
    """Llama and Mistral, which add nothing to the gated decoder."""

    code = ("llama", "mistral")


class Gemma(GatedDecoder):
    """Gemma, whose norms scale by 1 + weight."""

    code = ("gemma",)
    offset = 1.0


class Gemma2(GatedDecoder):
    """Gemma 2, with a norm before and one behind attention and MLP."""

    code = ("gemma2",)
    offset = 1.0
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP, **HEAD
    }  # fmt: skip


class Olmo2(GatedDecoder):
    """OLMo 2, whose attention and MLP read the stream itself."""

    code = ("olmo2",)
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = HEAD
