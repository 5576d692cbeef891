"""Write a Llama checkpoint with random weights, of any number of blocks, holding one shard in memory at a time."""

import json
import os
import zlib
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32_000
SHARD_BYTES = 500_000_000
DEVIATION = 0.02
DONE = "config.json"  # written last: a folder with it is complete


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    blocks = {f"model.layers.{k}.{name}.weight": shape for k in range(layers) for name, shape in block.items()}
    table = (VOCABULARY, HIDDEN)
    return {
        "model.embed_tokens.weight": table,
        **blocks,
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": table,
    }


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Its seed is its name: block 3 is the same in a model of 6 blocks and in one of 22."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape).normal_(0, DEVIATION, generator=generator).bfloat16()


def shards(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes in model order, cut where a shard would become larger than SHARD_BYTES."""
    result: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes(layers).items():
        size = 2 * prod(shape)
        if result[-1] and filled + size > SHARD_BYTES:
            result.append({})
            filled = 0
        result[-1][name] = shape
        filled += size
    return result


def write(folder: Path, layers: int) -> None:
    """Do nothing where the folder already holds the model."""
    if (folder / DONE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = shards(layers)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(plan, start=1):
        file = f"model-{number:05}-of-{len(plan):05}.safetensors"
        save_file({name: value(name, shape) for name, shape in part.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(2 * prod(shape) for shape in shapes(layers).values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    # A word-level tokenizer of two words: the experiments use token numbers, but a tool may insist on having one.
    _dump(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "word": 1}, "unk_token": "<unk>"},
        },
    )
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        },
    )
    temporary = folder / (DONE + ".tmp")
    _dump(
        temporary,
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    )
    os.replace(temporary, folder / DONE)


def _dump(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
