"""What a file says of a model beside its tensors: sizes, epsilons, scales, experts, windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.export.gguf.architectures import SLIDING, head_width
from compress.export.gguf.rope import rope_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.export.gguf.architectures import Architecture

EPSILONS = {
    "rms": ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    "layer": ("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")),
}
OLMO_EPSILON = 1e-5  # which no configuration says


def first(config: Any, *names: str) -> Any:
    """The first of some options that a configuration has and sets, or None."""
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def keys(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Everything of a model's shape, by key without the name of its architecture; int, float, bool, str or a list."""
    epsilon, names = EPSILONS[architecture.norm]
    found: dict[str, Any] = {
        "context_length": context_length(config, architecture),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _wide(config),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        epsilon: float(first(config, *names) or OLMO_EPSILON),
        "vocab_size": config.vocab_size,
    }
    found |= rope_keys(config)
    experts = first(config, "num_local_experts", "num_experts", "n_routed_experts")
    if experts:
        found |= {"expert_count": experts, "expert_used_count": first(config, "num_experts_per_tok")}
    shared = first(config, "moe_num_shared_experts")
    if shared:
        found["expert_shared_feed_forward_length"] = shared * config.moe_intermediate_size
    found |= _windows(config, architecture)
    attention = getattr(config, "attn_config", None)
    if attention is not None:  # of MPT
        found["attention.max_alibi_bias"] = float(attention.alibi_bias_max) if attention.alibi else 0.0
        if attention.clip_qkv:
            found["attention.clamp_kqv"] = float(attention.clip_qkv)
    for key, option in architecture.says.items():
        value = getattr(config, option, None)
        if value is not None:
            found[key] = value[0] if isinstance(value, list) else value
    return found | dict(architecture.fixed)


def context_length(config: Any, architecture: Architecture) -> int:
    """How much text a file is for: less than the model where a window is not known to the code that reads it."""
    longest = int(first(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 2048)
    window = getattr(config, "sliding_window", None)
    return min(longest, window) if architecture.window == "cut" and window else longest


def kv_heads(config: Any) -> int:
    """How many heads of keys and values there are."""
    if getattr(config, "model_type", "") == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    return int(first(config, "num_key_value_heads") or config.num_attention_heads)


def add(writer: Any, prefix: str, said: Mapping[str, Any]) -> None:
    """Put keys into a file that is being written."""
    for name, value in said.items():
        key = f"{prefix}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))


def _wide(config: Any) -> int:
    given = first(config, "intermediate_size", "ffn_hidden_size", "n_inner")
    return int(given or getattr(config, "expansion_ratio", 4) * config.hidden_size)


def _windows(config: Any, architecture: Architecture) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    layers = list(getattr(config, "layer_types", None) or [])
    if architecture.window != "pattern" or not window or SLIDING not in layers:
        return {}
    found: dict[str, Any] = {"attention.sliding_window": window}
    if not architecture.period:
        found["attention.sliding_window_pattern"] = [kind == SLIDING for kind in layers]
    return found
