"""What models have that llama.cpp's code of their kind does otherwise, or takes for granted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.export.gguf.architectures import FULL, SLIDING, head_width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.export.gguf.architectures import Architecture

COMMAND_R_PLUS = 64  # layers; so many, and not fewer, have norms of queries and keys there
EXAONE_4_32B = 64  # layers; so many, and not fewer, have windows there
NOT_TURNED = 4  # of SmolLM 3: every so many layers one rotates nothing
MPT_ATTENTION = {"softmax_scale": None, "alibi": True, "alibi_bias_max": 8}
DEEPSEEK_LITE = 27  # layers; so many, and not fewer, have queries that come from no latent layer there


def unfit(config: Any, architecture: Architecture) -> Iterator[str]:
    """What a file of some architecture cannot say about a model."""
    for name, allowed in architecture.needs.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            yield _refusal(name, value, architecture)
    if architecture.name == "command-r" and config.use_qk_norm != (config.num_hidden_layers >= COMMAND_R_PLUS):
        yield _refusal("use_qk_norm", config.use_qk_norm, architecture)
    yield from _layers(config, architecture)
    yield from _windows(config, architecture)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        yield _refusal("query_pre_attn_scalar", scalar, architecture)
    if architecture.square and head_width(config) * config.num_attention_heads != config.hidden_size:
        yield _refusal("head_dim", config.head_dim, architecture)


def _refusal(name: str, value: Any, architecture: Architecture) -> str:
    return f"this model's {name}, {value}, cannot be said in a GGUF file of architecture {architecture.name}; export hf"


def _layers(config: Any, architecture: Architecture) -> Iterator[str]:
    """Layers that differ from each other in another way than the code has it."""
    attention = getattr(config, "attn_config", None)  # of MPT, whose code in transformers has no others either
    for name, only in MPT_ATTENTION.items() if attention is not None else ():
        if getattr(attention, name) != only:
            yield _refusal(name, getattr(attention, name), architecture)
    turned = getattr(config, "no_rope_layers", None)
    if turned and turned != [int((i + 1) % NOT_TURNED != 0) for i in range(len(turned))]:
        yield _refusal("no_rope_layers", turned, architecture)
    dense = getattr(config, "mlp_layer_types", None)  # of EXAONE MoE
    if dense and dense != ["dense" if i < config.first_k_dense_replace else "sparse" for i in range(len(dense))]:
        yield _refusal("mlp_layer_types", dense, architecture)
    whole = getattr(config, "q_lora_rank", 0) is None
    if architecture.name == "deepseek2" and whole != (config.num_hidden_layers == DEEPSEEK_LITE):
        yield _refusal("q_lora_rank", config.q_lora_rank, architecture)
    last = getattr(config, "moe_layer_end_index", None)
    if last not in (None, -1, config.num_hidden_layers - 1):
        yield _refusal("moe_layer_end_index", last, architecture)


def _windows(config: Any, architecture: Architecture) -> Iterator[str]:
    window = getattr(config, "sliding_window", None)
    layers = list(getattr(config, "layer_types", None) or [])
    windowed = {"exaone4": config.num_hidden_layers == EXAONE_4_32B, "exaone-moe": True}.get(architecture.name)
    if windowed is not None and (window is not None) != windowed:
        yield _refusal("sliding_window", window, architecture)  # without one all layers rotate
        return
    if window is None or architecture.window == "cut" or (SLIDING not in layers and windowed is None):
        return
    meant = [
        FULL if architecture.period and (i + 1) % architecture.period == 0 else SLIDING for i in range(len(layers))
    ]
    if architecture.window == "none" or (architecture.period and layers != meant):
        yield _refusal("layer_types", layers, architecture)
