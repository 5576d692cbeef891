"""Kinds of models that can be written, and what llama.cpp's code of each takes for granted.

One entry for each `model_type` of transformers, by hand. Nothing is written for a kind that has none, even where the
map of the gguf package has names for its tensors: its converter may do more to them than to rename them. An entry is
made when llama.cpp, given a file of a small random model, computes what transformers does: every one of them is tried
by `tests/export/test_gguf_kinds.py`, with the options that change how it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

SILU = ("silu", "swish")
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # all are one there, by tanh
FULL, SLIDING = "full_attention", "sliding_attention"

Rows = Literal["as they are", "pairs", "by head", "by group"]
Window = Literal["none", "pattern", "cut"]


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        name: as a file says it.
        rows: what becomes of the rows of queries and keys: `pairs` lays channels side by side that are rotated
            together; `by head` and `by group` part a layer in which those of a head, or of a group of heads, stand
            together.
        plus_one: the weights of its norms are kept as their distance from one.
        norm: kind of its norms, and so the name of their epsilon.
        window: what is done with a sliding window: a `pattern` of layers is stated; with `cut`, which is for code that
            knows none, no more context is stated than the window has, within which there is no difference.
        period: of layers with a window, the last of which has full attention, where the code knows it without being
            told.
        needs: option -> the values that the code takes for granted; one that the configuration lacks is fine.
        says: key of the file -> option of the configuration, where that is set.
        fixed: key of the file -> value.
        left_out: beginnings of parameters that it has no place for and does without.
        read_by_transformers: transformers reads its files too, and what it makes of them is compared with the model.
        encoder: it gives embeddings and no logits.
        partial: only some channels of a head may be rotated.
        square: its heads together are as wide as the model.
        own_head: it looks for the matrix of the output, and takes no embedding for it where they are tied.
    """

    name: str
    rows: Rows = "as they are"
    plus_one: bool = False
    norm: Literal["rms", "layer"] = "rms"
    window: Window = "none"
    period: int = 0
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    read_by_transformers: bool = False
    encoder: bool = False
    partial: bool = False
    square: bool = False
    own_head: bool = False


_PLAIN = {"hidden_act": SILU}
_UNBIASED = {**_PLAIN, "attention_bias": (False, None)}
_TIED = {"tie_word_embeddings": (True,)}
_GEMMA = {**_TIED, "hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,)}
_NO_MLP_BIAS = {"mlp_bias": (False, None)}
_SPARSE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], (), None)}
_EXPERTS = {"expert_feed_forward_length": "moe_intermediate_size"}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_BERT = {
    "hidden_act": ("gelu", "gelu_new"),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_SIGMOID = {"expert_gating_func": 2}
_GROUPED = {
    **_EXPERTS,
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}
_NONE = {"rope.scaling.type": "none"}
_LATENT = {
    **_GROUPED,
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": "qk_head_dim",
    "attention.value_length": "v_head_dim",
}

KINDS: dict[str, Architecture] = {
    "llama": Architecture("llama", "pairs", needs=_PLAIN, read_by_transformers=True),
    "mistral": Architecture("llama", "pairs", window="cut", needs=_PLAIN, read_by_transformers=True),
    "ministral": Architecture("llama", "pairs", window="cut", needs=_PLAIN),
    "mixtral": Architecture("llama", "pairs", window="cut", needs=_PLAIN),
    "qwen2": Architecture("qwen2", needs={**_PLAIN, "use_sliding_window": (False,)}, read_by_transformers=True),
    "qwen3": Architecture("qwen3", needs={**_UNBIASED, "use_sliding_window": (False,)}, read_by_transformers=True),
    "qwen2_moe": Architecture(
        "qwen2moe",
        needs={**_PLAIN, **_SPARSE, "use_sliding_window": (False,), "norm_topk_prob": (False,)},
        says={**_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        own_head=True,
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        needs={**_UNBIASED, **_SPARSE, "use_sliding_window": (False,), "norm_topk_prob": (True,)},
        says=_EXPERTS,
    ),
    "gemma": Architecture("gemma", plus_one=True, needs={**_TIED, "attention_bias": (False,), "hidden_act": GELU}),
    "gemma2": Architecture(
        "gemma2",
        plus_one=True,
        window="pattern",
        period=2,
        needs=_GEMMA,
        says={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3_text": Architecture(
        "gemma3",
        plus_one=True,
        window="pattern",
        period=6,
        needs={**_GEMMA, "attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
        says={"final_logit_softcapping": "final_logit_softcapping"},
    ),
    "phi": Architecture(
        "phi2", norm="layer", needs={"hidden_act": GELU, "qk_layernorm": (False,)}, partial=True, own_head=True
    ),
    "phi3": Architecture("phi3", window="cut", needs=_UNBIASED, fixed={"attention.sliding_window": 0}, partial=True),
    "gpt2": Architecture(
        "gpt2",
        norm="layer",
        needs={
            "activation_function": GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "gpt_bigcode": Architecture(
        "starcoder",
        norm="layer",
        needs={
            "activation_function": GELU,
            "scale_attn_weights": (True,),
            "multi_query": (True,),
            "add_cross_attention": (False,),
        },
        fixed={"attention.head_count_kv": 1},
    ),
    "gpt_neox": Architecture(
        "gptneox",
        "by head",
        norm="layer",
        needs={"hidden_act": GELU, "attention_bias": (True,)},
        says={"use_parallel_residual": "use_parallel_residual"},
        partial=True,
        own_head=True,
    ),
    "bloom": Architecture(
        "bloom",
        "by head",
        norm="layer",
        needs={"apply_residual_connection_post_layernorm": (False,)},
        read_by_transformers=True,
    ),
    "falcon": Architecture(
        "falcon",
        "by group",
        norm="layer",
        read_by_transformers=True,
        needs={"alibi": (False,), "parallel_attn": (True,), "bias": (False,), "activation": GELU},
        fixed={"tensor_data_layout": "jploski"},
    ),
    "mpt": Architecture("mpt", norm="layer", needs={"no_bias": (True,)}),
    "olmo": Architecture(
        "olmo", "pairs", norm="layer", needs=_UNBIASED, says={"attention.clamp_kqv": "clip_qkv"},
    ),
    "olmo2": Architecture("olmo2", needs=_UNBIASED, own_head=True),
    "olmoe": Architecture(
        "olmoe", needs={**_UNBIASED, "norm_topk_prob": (False,), "clip_qkv": (None,)}, own_head=True
    ),
    "granite": Architecture("granite", "pairs", needs=_PLAIN, says=_SCALES, square=True),
    "starcoder2": Architecture(
        "starcoder2",
        norm="layer",
        window="cut",
        needs={"hidden_act": GELU, "use_bias": (True,)},
        read_by_transformers=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        norm="layer",
        read_by_transformers=True,
        needs={**_PLAIN, "qk_layernorm": (False,)},
        says={"use_parallel_residual": "use_parallel_residual"},
        partial=True,
        own_head=True,
    ),
    "cohere": Architecture(
        "command-r", norm="layer", needs={**_UNBIASED, **_TIED}, says={"logit_scale": "logit_scale"}, fixed=_NONE
    ),
    "cohere2": Architecture(
        "cohere2", norm="layer", window="pattern", period=4, needs={**_UNBIASED, **_TIED},
        says={"logit_scale": "logit_scale"}, fixed=_NONE, square=True,
    ),
    "smollm3": Architecture(
        "smollm3", "pairs", needs={**_UNBIASED, **_NO_MLP_BIAS, "use_sliding_window": (False,)}
    ),
    "seed_oss": Architecture("seed_oss", needs={**_PLAIN, "attention_out_bias": (False,), "mlp_bias": (False,)}),
    "arcee": Architecture(
        "arcee", "pairs", needs={"hidden_act": ("relu2",), "attention_bias": (False,), **_NO_MLP_BIAS}
    ),
    "nemotron": Architecture(
        "nemotron", plus_one=True, norm="layer", needs={"hidden_act": ("relu2",)}, read_by_transformers=True,
        partial=True, square=True, own_head=True,
    ),
    "jais2": Architecture(
        "jais2", norm="layer", needs={"hidden_act": ("relu2",), "attention_bias": (True,), "mlp_bias": (True,)}
    ),
    "glm4": Architecture("glm4", needs=_PLAIN, partial=True),
    "ernie4_5": Architecture("ernie4_5", "as they are", needs={**_PLAIN, "use_bias": (False,)}),
    "exaone4": Architecture("exaone4", window="pattern", period=4, needs=_PLAIN, square=True),
    "exaone_moe": Architecture(
        "exaone-moe", window="pattern", period=4, needs=_PLAIN, fixed=_SIGMOID,
        says={**_GROUPED, "expert_shared_count": "num_shared_experts"},
    ),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", needs=_UNBIASED),
    "olmo3": Architecture("olmo2", window="pattern", needs=_UNBIASED, own_head=True),
    "glm": Architecture("chatglm", needs=_PLAIN, partial=True, square=True),
    "granitemoe": Architecture("granitemoe", "pairs", needs=_UNBIASED, says=_SCALES, square=True),
    "minimax_m2": Architecture(
        "minimax-m2", needs=_PLAIN, says={"expert_feed_forward_length": "intermediate_size"}, fixed=_SIGMOID,
        read_by_transformers=True, partial=True, own_head=True,
    ),
    "dots1": Architecture("dots1", needs=_UNBIASED, says=_GROUPED, fixed=_SIGMOID, own_head=True),
    "glm4_moe": Architecture("glm4moe", needs=_PLAIN, says=_GROUPED, fixed=_SIGMOID, partial=True),
    "solar_open": Architecture(
        "glm4moe", needs=_PLAIN, says=_GROUPED, fixed={**_SIGMOID, "leading_dense_block_count": 0}, partial=True
    ),
    "deepseek_v2": Architecture(
        "deepseek2",
        needs={**_UNBIASED, "topk_method": ("greedy",), "norm_topk_prob": (False,), "moe_layer_freq": (1, None)},
        says=_LATENT,
    ),
    "deepseek_v3": Architecture(
        "deepseek2",
        needs={**_UNBIASED, "rope_interleave": (True,), "moe_layer_freq": (1, None)},
        says=_LATENT,
        fixed=_SIGMOID,
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        needs={**_PLAIN, "use_bias": (False,), "moe_layer_interval": (1,)},
        says={
            **_EXPERTS,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_shared_count": "moe_num_shared_experts",
        },
    ),
    "hunyuan_v1_moe": Architecture(
        "hunyuan-moe",
        needs=_UNBIASED,
        says={
            "expert_used_count": "moe_topk",
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_feed_forward_length": "intermediate_size",
        },
    ),
    "bert": Architecture(
        "bert",
        norm="layer",
        needs=_BERT,
        fixed={"attention.causal": False},
        left_out=("cls.", "bert.pooler.", "pooler."),
        encoder=True,
    ),
}  # fmt: skip

# Kinds that the package's map knows, and what a file of them would take that is not done here.
UNWRITTEN = {
    "gpt_oss": "rows of its experts alternate between gate and up, and each expert has biases",
    "gemma3": "a file holds its language model alone, and the vision tower lies in a second one",
    "phimoe": "its router weighs each of two experts by a softmax of its own, and llama.cpp both by one",
    "mamba": "its states are kept as exponentials",
    "mamba2": "its states are kept as exponentials",
    "t5": "it has an encoder and a decoder",
}


def head_width(config: Any) -> int:
    """How many channels a head of queries has."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def architecture_of(config: Any) -> Architecture | None:
    """What a configuration's kind of model is to llama.cpp, or None where it is not written."""
    return KINDS.get(getattr(config, "model_type", ""))
