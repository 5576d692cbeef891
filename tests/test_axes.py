"""Channels whose order is free: putting them in another one on both sides changes nothing a model computes."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.models import graph
from compress.models.families.llama import GatedDecoder
from compress.models.symmetry import Axis


def tiny(kind: str, **options: object) -> PreTrainedModel:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options})).eval()


@torch.no_grad()
def permuted(model: PreTrainedModel, axes: tuple[Axis, ...]) -> PreTrainedModel:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for axis in axes:
        order = torch.stack([torch.randperm(axis.size, generator=generator) for _ in range(axis.heads)])
        for name in axis.makers:
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(weight[axis.rows(order)])
        for name in axis.readers:
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(weight[:, axis.columns(order)])
    return model


@pytest.mark.parametrize("kind", GatedDecoder.code)
def test_another_order_changes_nothing(kind: str) -> None:
    model = tiny(kind)
    axes = graph.find(model).axes
    wanted = 2 if kind == "qwen2" else 4  # qwen2 has biases on q, k, v
    assert len(axes) == wanted
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before, after = model(tokens).logits, permuted(model, axes)(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_layers_with_a_bias_keep_their_order() -> None:
    found = graph.find(tiny("llama", mlp_bias=True, attention_bias=True)).axes
    assert found == ()


def test_models_whose_wiring_is_not_known_have_no_free_order() -> None:
    assert graph.find(tiny("gpt2", n_embd=32, n_head=4)).axes == ()
    assert graph.find(torch.nn.Sequential(torch.nn.Linear(4, 4))).axes == ()


def test_heads_that_share_values_read_them_in_the_same_order() -> None:
    axis = Axis(("v",), ("o",), size=2, heads=2, repeats=2)
    order = torch.tensor([[1, 0], [0, 1]])
    assert axis.rows(order).tolist() == [1, 0, 2, 3]
    assert axis.columns(order).tolist() == [1, 0, 3, 2, 4, 5, 6, 7]
