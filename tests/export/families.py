"""Tiny models of every family that is exported, and a recipe for every encoding and width."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import compress
from compress import (
    Codebook,
    ConfigError,
    Eora,
    LowRank,
    Magnitude,
    Olive,
    Pipeline,
    PowerQuant,
    Rtn,
    Wanda,
)
from compress.config.pipeline import GIVEN, Calibration
from compress.models import graph as graphs
from compress.passes import Pass
from compress.planning import plan

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGEST = {"max_position_embeddings": 64}
WIDE = {"intermediate_size": 128, "initializer_range": 0.1}


def _llama(**options: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **LONGEST, **WIDE, num_key_value_heads=2, **options))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config)


def _gpt() -> PreTrainedModel:
    config = OpenAIGPTConfig(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    return OpenAIGPTLMHeadModel(config)


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SIZES, **LONGEST, ffn_dim=128, word_embed_proj_dim=64, init_std=0.1))


def _resnet() -> PreTrainedModel:
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], num_labels=10,
                          layer_type="basic")  # fmt: skip
    return ResNetForImageClassification(config)


def _vit() -> PreTrainedModel:
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                       patch_size=4, num_channels=1, num_labels=10, initializer_range=0.1)  # fmt: skip
    return ViTForImageClassification(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-tied-bfloat16": lambda: _llama(tie_word_embeddings=True).bfloat16(),
    "gpt": _gpt,
    "gpt2": _gpt2,
    "opt": _opt,
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **LONGEST, **WIDE)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, **LONGEST, **WIDE, is_decoder=True)),
    "resnet": _resnet,
    "vit": _vit,
}
DECODERS = ("llama", "llama-tied-bfloat16", "gpt2", "opt", "neox")

Recipe = Callable[[tuple[str, ...]], list[Pass]]
RECIPES: dict[str, Recipe] = {
    **{f"{b} bits per row": lambda at, b=b: [Rtn(bits=b, include=at)] for b in range(2, 9)},
    **{
        f"{b} bits, 32 columns, symmetric": lambda at, b=b: [Rtn(bits=b, group_size=32, symmetric=True, include=at)]
        for b in range(2, 9)
    },
    "4 bits, 8 columns": lambda at: [Rtn(bits=4, group_size=8, include=at)],
    "3 bits, 16 columns": lambda at: [Rtn(bits=3, group_size=16, include=at)],
    "4 bits per tensor": lambda at: [Rtn(bits=4, granularity="tensor", include=at)],
    "half zeros": lambda at: [Magnitude(sparsity=0.5, include=at)],
    "2:4": lambda at: [Magnitude(sparsity="2:4", include=at)],
    "half zeros, 3 bits": lambda at: [Magnitude(sparsity=0.5, include=at), Rtn(bits=3, group_size=16, include=at)],
    "2:4, 4 bits": lambda at: [Magnitude(sparsity="2:4", include=at), Rtn(bits=4, include=at)],
    "4:8, 2 bits": lambda at: [Wanda(sparsity="4:8", include=at), Rtn(bits=2, symmetric=True, include=at)],
    **{f"power, {b} bits": lambda at, b=b: [PowerQuant(bits=b, include=at)] for b in range(2, 9)},
    "power, 3 bits, 16 columns, zeros": lambda at: [
        Magnitude(sparsity=0.3, include=at), PowerQuant(bits=3, group_size=16, include=at)
    ],
    **{f"codebook, {b} bits": lambda at, b=b: [Codebook(bits=b, include=at)] for b in (2, 3, 4, 5, 8)},
    "one codebook, scales": lambda at: [Codebook(bits=4, tables=1, scale="row", include=at)],
    "codebooks, scales of groups": lambda at: [Codebook(bits=3, tables=2, scale="group", group_size=16, include=at)],
    "codebooks in runs": lambda at: [Codebook(bits=3, tables=4, grouping="runs", include=at)],
    "codebook of 11": lambda at: [Codebook(entries=11, tables=2, include=at)],
    "codebook, 4 bits, zeros": lambda at: [Magnitude(sparsity=0.3, include=at), Codebook(bits=4, include=at)],
    **{f"pairs, {b} bits": lambda at, b=b: [Olive(bits=b, include=at)] for b in (4, 8)},
    "pairs, 4 bits, zeros": lambda at: [Magnitude(sparsity=0.3, include=at), Olive(bits=4, include=at)],
    "3 bits, corrected": lambda at: [Rtn(bits=3, include=at), Eora(rank=3, include=at)],
    "2 bits, corrected in 4": lambda at: [Rtn(bits=2, include=at), Eora(rank=4, adapter_bits=4, include=at)],
    "2:4, corrected in 8": lambda at: [
        Magnitude(sparsity="2:4", include=at), Eora(rank=4, adapter_bits=8, include=at)
    ],
    "two factors": lambda at: [LowRank(ratio=0.5, steps=2, include=at)],
}  # fmt: skip
ROUNDED: dict[str, Recipe] = {
    "inputs of 8 bits per token": lambda at: [Rtn(bits=4, activation_bits=8, include=at)],
    "inputs of 6 bits per token": lambda at: [Rtn(bits=4, activation_bits=6, include=at)],
    "inputs of 8 bits": lambda at: [Rtn(bits=4, activation_bits=8, activation_scale="tensor", include=at)],
    "inputs in pairs of 4 bits": lambda at: [
        Olive(bits=4, activation_bits=4, activation_scale="tensor", activation_grid="olive", include=at)
    ],
    "inputs in pairs of 8 bits": lambda at: [
        Rtn(bits=4, activation_bits=8, activation_scale="tensor", activation_grid="olive", include=at)
    ],
    "inputs on a power grid": lambda at: [
        PowerQuant(bits=4, activation_bits=4, activation_scale="tensor", activation_grid="power", include=at)
    ],
    "inputs of 5 bits": lambda at: [Rtn(bits=4, activation_bits=5, activation_scale="tensor", include=at)],
}


def make(family: str) -> PreTrainedModel:
    """A model with random weights, always the same."""
    torch.manual_seed(3)
    return FAMILIES[family]().eval()


def inputs_of(family: str) -> tuple[Tensor, Tensor | None]:
    """To calibrate and compare with: tokens, or images and labels."""
    generator = torch.Generator().manual_seed(5)
    if family in ("resnet", "vit"):
        return torch.randn(6, 1, 16, 16, generator=generator), torch.randint(10, (6,), generator=generator)
    return torch.randint(256, (3, 24), generator=generator), None


def rounds(family: str, recipes: dict[str, Recipe]) -> Iterator[dict[str, str]]:
    """Site -> the name of its recipe, until every recipe that a family can take stood at some site of it."""
    graph = graphs.find(make(family))
    dtypes = {name: p.dtype for name, p in graph.tensors()}
    able: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        for site in graph.sites:
            if site.block is None:
                continue
            steps = tuple((p,) for p in recipe((site.name,)))
            try:
                plan.make(Pipeline(passes=steps, calibration=Calibration(source=GIVEN, length=8)), graph, dtypes)
            except ConfigError:
                continue
            if not (site.is_convolution and "pairs" in name and recipes is ROUNDED):  # which ONNX cannot
                able.setdefault(name, []).append(site.name)
    sites = [site.name for site in graph.sites if any(site.name in places for places in able.values())]
    left = list(able)
    while left:
        chosen: dict[str, str] = {}
        for place in sites:  # every site gets one, so that all rounds have the same graph around them
            fit = [name for name in (*left, *able) if place in able[name]]
            chosen[place] = fit[0]
            if fit[0] in left:
                left.remove(fit[0])
        yield chosen


def compressed(family: str, chosen: dict[str, str], recipes: dict[str, Recipe], folder: Path) -> Path:
    """OUT, each site by its recipe."""
    model = folder / family
    if not model.exists():
        make(family).save_pretrained(model)
    passes = [step for site, name in chosen.items() for step in recipes[name]((site,))]
    inputs, _ = inputs_of(family)
    out = folder / f"{family}-{len(list(folder.iterdir()))}"
    compress.run(Pipeline(passes=tuple((p,) for p in passes)), model, out, calibration=inputs)
    return out
