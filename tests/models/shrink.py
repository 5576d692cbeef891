"""Configurations of transformers made small: one table of names, applied to a configuration and to those inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 128
SPECIAL = 8  # ids at the end of the vocabulary that stand for images and the like
TOKENS = ("_token_id", "_token_index")
LAYERS = 2
WIDTH = 64
WIDE = 96  # of what lies between the two matrices of an MLP
HEADS = 4
HEAD = WIDTH // HEADS
EXPERTS = 4
POSITIONS = 64
IMAGE = 32  # pixels to a side
PATCH = 8

# What configurations call their sizes, by what is meant. A name that a configuration does not have is left out.
NAMES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size n_embd d_model embedding_size dim embed_dim decoder_hidden_size word_embed_proj_dim "
        "projection_dim hidden_dim emb_dim embed_proj_dim text_hidden_size out_hidden_size vision_output_dim "
        "proj_hidden_size vision_hidden_size attention_hidden_size lru_width mamba_intermediate_size "
        "encoder_hidden_size d_embed connector_dim mm_hidden_size",
    ),
    (
        WIDE,
        "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim mlp_dim ffn_hidden_size "
        "feed_forward_size ff_dim encoder_intermediate_size decoder_intermediate_size dff d_inner dim_ff "
        "mlp_hidden_size intermediate_size_mlp block_ff_dim dense_intermediate_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
        "num_attention_heads_per_layer attention_heads num_ape_heads swa_num_attention_heads",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
        "depth num_encoder_layers num_blocks encoder_num_hidden_layers decoder_num_hidden_layers num_key_value_heads "
        "multi_query_group_num num_kv_heads kv_n_heads swa_num_key_value_heads num_key_value_heads_global",
    ),
    (
        HEAD,
        "head_dim d_kv attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels swa_head_dim "
        "rotary_dim global_head_dim linear_key_head_dim linear_value_head_dim swa_v_head_dim index_head_dim",
    ),
    (
        2 * HEAD,
        "q_lora_rank kv_lora_rank moe_intermediate_size expert_ffn_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size ffn_expert_hidden_size "
        "moe_latent_size hidden_size_per_layer_input vocab_size_per_layer_input_dim",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (
        2,
        "num_experts_per_tok moe_k moe_topk top_k num_experts_per_token num_selected_experts moe_top_k top_k_experts "
        "linear_num_key_heads linear_num_value_heads",
    ),
    (1, "n_shared_experts n_group topk_group num_shared_experts first_k_dense_replace moe_num_shared_experts"),
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (
        POSITIONS,
        "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx "
        "max_sequence_length max_length_pos sliding_window attention_window_size original_max_position_embeddings",
    ),
    (IMAGE, "image_size img_size"),
    (PATCH, "patch_size"),
)
SIZES: dict[str, int] = {name: size for size, names in NAMES for name in names.split()}


def shrunk(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A small configuration of a class.

    Args:
        kind: a configuration class of transformers.
        changes: what is otherwise than the table says; of a configuration inside, a mapping.
    """
    return kind(**settings(kind(), changes))


def settings(default: PreTrainedConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What a small configuration is made with. What is not named here follows from it, as its class says."""
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = {"model_type": value.model_type, **settings(value, changes.get(name, {}))}
        elif name in changes:
            found[name] = changes[name]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[name] = SIZES[name]
        elif name.endswith(TOKENS) and isinstance(value, int) and value >= VOCABULARY:
            found[name] = VOCABULARY - 1 - len(found) % SPECIAL
    return {**changes, **found}
