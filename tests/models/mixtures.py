"""Mixtures of experts. Routers stay dense."""

from __future__ import annotations

from entry import Entry
from text import LATENT

ROUTERS = ("*.gate.weight", "*.router.*", "*.router", "*.gate_weight")
TWO = {"num_experts_per_tok": 2}

MIXTURES = (
    Entry("MixtralForCausalLM", apart=ROUTERS, quick=True),
    Entry("AfmoeForCausalLM", apart=ROUTERS),
    Entry("AriaTextForCausalLM", apart=ROUTERS),
    Entry("AXK1ForCausalLM", LATENT, apart=ROUTERS),
    Entry("Cohere2MoeForCausalLM", apart=ROUTERS),
    Entry("DeepseekV2ForCausalLM", {**LATENT, **TWO}, apart=ROUTERS),
    Entry("DeepseekV3ForCausalLM", LATENT, apart=ROUTERS),
    Entry("DeepseekV32ForCausalLM", LATENT, apart=ROUTERS),
    Entry("DeepseekV4ForCausalLM", exclude=("*o_a_proj*",), apart=(*ROUTERS, "*o_a_proj*")),
    Entry("Dots1ForCausalLM", {"n_routed_experts": 4, "n_shared_experts": 1, **TWO}, apart=ROUTERS),
    Entry("Ernie4_5_MoeForCausalLM", apart=ROUTERS),
    Entry("ExaoneMoeForCausalLM", apart=ROUTERS),
    Entry("FlexOlmoForCausalLM", apart=ROUTERS),
    Entry("Glm4MoeForCausalLM", apart=ROUTERS),
    Entry("Glm4MoeLiteForCausalLM", LATENT, apart=ROUTERS),
    Entry("GlmMoeDsaForCausalLM", LATENT, apart=ROUTERS),
    Entry("GptOssForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, apart=ROUTERS),
    Entry("GraniteMoeForCausalLM", apart=ROUTERS),
    Entry("GraniteMoeSharedForCausalLM", apart=ROUTERS),
    Entry("HunYuanMoEV1ForCausalLM", {"head_dim": 16}, apart=ROUTERS),
    Entry("HYV3ForCausalLM", apart=ROUTERS),
    Entry("JetMoeForCausalLM", share=0.04, apart=ROUTERS),
    Entry("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}, apart=ROUTERS),
    Entry("Llama4ForCausalLM", apart=ROUTERS),
    Entry("LongcatFlashForCausalLM", {**LATENT, "zero_expert_num": 2}, apart=ROUTERS),
    Entry("MiMoV2FlashForCausalLM", apart=ROUTERS),
    Entry("MiniMaxForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}, apart=ROUTERS),
    Entry("MiniMaxM2ForCausalLM", apart=ROUTERS),
    Entry("NllbMoeForConditionalGeneration", inputs="sequences", apart=ROUTERS),
    Entry("OlmoeForCausalLM", apart=ROUTERS),
    Entry("PhimoeForCausalLM", apart=ROUTERS),
    Entry("Qwen2MoeForCausalLM", apart=(*ROUTERS, "*.shared_expert_gate.weight")),
    Entry("Qwen3MoeForCausalLM", apart=ROUTERS),
    Entry("SolarOpenForCausalLM", apart=ROUTERS),
    Entry("SwitchTransformersForConditionalGeneration", inputs="sequences", apart=ROUTERS),
    Entry("DbrxForCausalLM", {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    }, apart=ROUTERS),
    Entry("ZayaForCausalLM", {"num_experts_per_tok": 1},
          apart=(*ROUTERS, "*.mlp.gate.*")),
)  # fmt: skip
