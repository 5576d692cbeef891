"""Small random models of every kind that is written as GGUF, with the options that change how it is written."""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SLIDING, FULL = "sliding_attention", "full_attention"
WIDTH = {"head_dim": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    **GROUPED, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
EXAONE_MOE = {
    **EXPERTS, "head_dim": 16, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 4,
    "sliding_window": 16,
}  # fmt: skip
WINDOWS = {**WIDTH, "query_pre_attn_scalar": 16, "sliding_window": 16}


def rope(kind: str, **options: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = rope(
    "longrope", long_factor=[1.0 + i for i in range(8)], short_factor=[1 + i / 4 for i in range(8)],
    original_max_position_embeddings=64,
)  # fmt: skip

# Kind, and which of them -> its options.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, llama3": {"head_dim": 32, **LLAMA3},
    "llama, linear": rope("linear", factor=4.0),
    "llama, yarn": {"head_dim": 32, **YARN},
    "llama, tied": TIED,
    "mistral": {"sliding_window": None, **WIDTH},
    "ministral": {**WIDTH, "sliding_window": 128},
    "mixtral": LOCAL,
    "qwen2": {},
    "qwen2, yarn": YARN,
    "qwen3": WIDTH,
    "qwen3, wide": {"head_dim": 128},  # the only width that transformers reads
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen2_moe, tied": {**EXPERTS, "shared_expert_intermediate_size": 64, **TIED},
    "qwen3_moe": {**EXPERTS, **WIDTH, "norm_topk_prob": True},
    "gemma": WIDTH,
    "gemma2": {**WINDOWS, "layer_types": [SLIDING, FULL]},
    "gemma3_text": {**WINDOWS, "num_hidden_layers": 6},
    "gemma3_text, linear": {
        **WINDOWS, "num_hidden_layers": 6, "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "phi": {"num_key_value_heads": 4},
    "phi, tied": {"num_key_value_heads": 4, **TIED},
    "phi3": {},
    "phi3, longrope": {"original_max_position_embeddings": 64, **LONG},
    "phi3, partial": {"num_attention_heads": 2, **rope("default", partial_rotary_factor=0.5)},
    "gpt2": {},
    "gpt2, inner": {"n_inner": 96},
    "gpt2, untied": UNTIED,
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox, serial": {"use_parallel_residual": False},
    "gpt_neox, tied": TIED,
    "bloom": {},
    "bloom, six heads": {"hidden_size": 96, "n_head": 6},
    "bloom, untied": UNTIED,
    "falcon": {},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, many": {"multi_query": False, "num_kv_heads": 4},
    "falcon, untied": UNTIED,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "olmo": {},
    "olmo, clipped": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo2, tied": TIED,
    "olmo3": {"sliding_window": 16, "num_hidden_layers": 4},
    "olmo3, tied": {"sliding_window": 16, "num_hidden_layers": 4, **TIED},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "olmoe, tied": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4, **TIED},
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "granite, biases": {"attention_bias": True, "mlp_bias": True},
    "granitemoe": LOCAL,
    "starcoder2": {},
    "stablelm": {},
    "stablelm, parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
    "stablelm, tied": TIED,
    "cohere": {},
    "cohere2": {**WIDTH, "sliding_window": 16, "num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4},
    "seed_oss": WIDTH,
    "arcee": WIDTH,
    "arcee, llama3": {"head_dim": 32, **LLAMA3},
    "nemotron": WIDTH,
    "nemotron, biases": {**WIDTH, "attention_bias": True, "mlp_bias": True},
    "nemotron, tied": {**WIDTH, **TIED},
    "glm": WIDTH,
    "glm4": {**WIDTH, "attention_bias": True},
    "glm4_moe": {**GROUPED, **WIDTH},
    "ernie4_5": WIDTH,
    "ernie4_5_moe": {
        **WIDTH, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {"sliding_window": None, "layer_types": [FULL, FULL]},
    "exaone4, llama3": {"sliding_window": None, "layer_types": [FULL, FULL], "num_attention_heads": 2, **LLAMA3},
    "exaone4, windows": {"sliding_window": 16, "num_hidden_layers": 64, "sliding_window_pattern": 4},
    "exaone4, windows and llama3": {
        "sliding_window": 16, "num_hidden_layers": 64, "sliding_window_pattern": 4, "num_attention_heads": 2, **LLAMA3,
    },
    "hunyuan_v1_dense": WIDTH,
    "hunyuan_v1_moe": {**WIDTH, "num_experts": 4, "moe_topk": 2},
    "dots1": {**GROUPED, "num_key_value_heads": 4},
    "dots1, tied": {**GROUPED, "num_key_value_heads": 4, **TIED},
    "exaone_moe": EXAONE_MOE,
    "exaone_moe, wide": {**EXAONE_MOE, "head_dim": 32},
    "jais2": WIDTH,
    "jais2, wide": {"head_dim": 32},
    "solar_open": {**GROUPED, **WIDTH},
    "solar_open, biases": {**GROUPED, **WIDTH, "attention_bias": True},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v2, lite": {
        **LATENT, "topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None, "num_hidden_layers": 27,
    },
    "deepseek_v2, yarn": {
        **LATENT, "topk_method": "greedy", "norm_topk_prob": False,
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707),
    },
    "deepseek_v3": LATENT,
    "deepseek_v3, groups": {**LATENT, "n_group": 4, "topk_group": 2},
    "deepseek_v3, tied": {**LATENT, **TIED},
    "deepseek_v3, yarn": {
        **LATENT, **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
    },
    "minimax_m2": {**LOCAL, **WIDTH},
    "minimax_m2, tied": {**LOCAL, **WIDTH, **TIED},
    "bert": {},
}  # fmt: skip


def kind_of(variant: str) -> str:
    return variant.split(",")[0]


def config_of(variant: str, **changes: object) -> Any:
    kind = kind_of(variant)
    known = AutoConfig.for_model(kind)
    sizes = {k: v for k, v in SIZES.items() if hasattr(known, k) and (kind != "mpt" or k == "vocab_size")}
    return AutoConfig.for_model(kind, **deepcopy({**sizes, **VARIANTS[variant], **changes}))  # it writes into them


def structure(config: Any) -> PreTrainedModel:
    """A model without values."""
    with torch.device("meta"):
        found: PreTrainedModel = (AutoModel if config.model_type == "bert" else AutoModelForCausalLM).from_config(
            config
        )
    return found


def make(variant: str, **changes: object) -> PreTrainedModel:
    """One with values large enough to tell every tensor, bias and norm from its neighbours."""
    torch.manual_seed(0)
    config = config_of(variant, **changes)
    of = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
    model: PreTrainedModel = of.from_config(config).eval().float()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        elif parameter.std() < 0.1:
            parameter.data = 0.15 * torch.randn_like(parameter)
    return model
