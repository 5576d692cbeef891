"""Models written with the folders beside the packed one, and what is in those."""

from pathlib import Path

import torch
from conftest import make_llama
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, ResNetConfig, ResNetForImageClassification

import compress
from compress import Pipeline, Report
from compress.config.pipeline import FORMATS
from compress.passes import Pass

GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


def make_gpt2() -> PreTrainedModel:
    """Its layers are Conv1D: weights lie as (in, out)."""
    torch.manual_seed(7)
    return GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0, initializer_range=0.1)).eval()


def make_resnet() -> PreTrainedModel:
    """Windows of three sizes, some with strides."""
    torch.manual_seed(11)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10,
                          layer_type="basic")  # fmt: skip
    return ResNetForImageClassification(config).eval()


MODELS = {
    "llama": make_llama,
    "bfloat16": lambda: make_llama().bfloat16(),
    "gpt2": make_gpt2,
    "resnet": make_resnet,
    "few_rows": lambda: make_llama(num_key_value_heads=1, head_dim=8),
    "odd_rows": lambda: make_llama(num_key_value_heads=1, head_dim=12),
}


QUICK = ("llama", "bfloat16", "gpt2", "resnet")  # what `make test` writes of these; `make real` writes all


def data_for(name: str) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """To calibrate and to measure with."""
    generator = torch.Generator().manual_seed(5)
    if name == "resnet":
        images = torch.randn(12, 1, 16, 16, generator=generator)
        return images, (images, torch.randint(10, (12,), generator=generator))
    tokens = torch.randint(256, (8, 32), generator=generator)
    return tokens, tokens[:2]


def write(name: str, folder: Path, passes: list[Pass], *formats: str, **options: object) -> Report:
    """Save a model as folder / "model" and compress it into folder / "out"."""
    if not (folder / "model").exists():
        MODELS[name]().save_pretrained(folder / "model")
        (folder / "model" / "tokenizer.json").write_text("{}")
    calibration, evaluation = data_for(name)
    pipeline = Pipeline(passes=tuple((p,) for p in passes), export=tuple(FORMATS[f]() for f in formats), **options)  # type: ignore[arg-type]
    return compress.run(pipeline, folder / "model", folder / "out", calibration=calibration, evaluation=evaluation)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(inputs).logits
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found
