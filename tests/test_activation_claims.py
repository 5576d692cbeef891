"""What rounded inputs cost the demo model, as it is and with outliers, as the papers have it."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress import Olive, Rtn
from compress.passes import Pass

PAIRS = Olive(step=0.1, activation_bits=4, activation_grid="olive", activation_scale="tensor")
OUTLIERS, FACTOR = 3, 20.0


@cache
def demo() -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The model, tokens to calibrate with, and others to measure with."""
    model, tokenizer = compress.demo.load()
    calibration = compress.load_tokens("demo", tokenizer, samples=4, length=128)
    return model, calibration, compress.load_tokens("demo", tokenizer, samples=4, length=256, split="evaluation")


def norms(model: PreTrainedModel) -> list[tuple[torch.nn.Module, list[torch.nn.Module]]]:
    """Every norm inside the blocks, and the layers it feeds."""
    found = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        found.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        found.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return found


@torch.no_grad()
def ordinary(count: int) -> list[int]:
    """Channels whose size is nearest to the median, and whose partners in a pair are no larger than most."""
    model, calibration, _ = demo()
    sizes: list[Tensor] = []
    handles = [
        norm.register_forward_hook(lambda _, __, out: sizes.append(out.square().flatten(0, -2).mean(0)))
        for norm, _ in norms(model)
    ]
    model(calibration)
    for handle in handles:
        handle.remove()
    size = torch.stack(sizes).mean(0)
    large = size > size.quantile(0.9)
    nearest = (size - size.median()).abs().argsort().tolist()
    return [c for c in nearest if not large[c ^ 1]][:count]


@cache
def with_outliers() -> PreTrainedModel:
    """The same function with a few channels of every norm's output 20 times as large: the next weights undo it."""
    model, channels = copy.deepcopy(demo()[0]), ordinary(OUTLIERS)
    with torch.no_grad():
        for norm, layers in norms(model):
            norm.weight[channels] *= FACTOR
            for layer in layers:
                layer.weight[:, channels] /= FACTOR
    return model


@cache
def perplexity(outliers: bool, *passes: Pass) -> float:
    model = with_outliers() if outliers else demo()[0]
    if passes:
        model = compress.apply(model, passes, calibration=demo()[1]).model  # type: ignore[assignment]
    value = compress.evaluate(model, demo()[2]).perplexity
    assert value is not None
    return value


@pytest.mark.real
def test_eight_bit_inputs_with_a_scale_a_token_cost_almost_nothing() -> None:
    assert perplexity(False, Rtn(bits=8, activation_bits=8)) < 1.005 * perplexity(False)


@pytest.mark.real
def test_four_bit_inputs_cost_more_than_eight_bit_ones_and_one_scale_for_all_more_than_one_a_token() -> None:
    eight, four = (perplexity(False, Rtn(bits=b, activation_bits=b)) for b in (8, 4))
    fixed = perplexity(False, Rtn(bits=4, activation_bits=4, activation_scale="tensor"))
    assert 1.1 * eight < four < fixed


@pytest.mark.real
def test_outliers_leave_the_function_as_it_was() -> None:
    assert perplexity(True) == pytest.approx(perplexity(False), rel=1e-5)


@pytest.mark.real
def test_olive_with_four_bit_weights_and_inputs_withstands_outliers_that_ruin_even_steps() -> None:
    original = perplexity(True)
    assert perplexity(True, PAIRS) < 1.15 * original
    assert perplexity(True, Rtn(bits=4, activation_bits=4)) > 2 * original
    assert perplexity(True, Rtn(bits=4, activation_bits=4, activation_scale="tensor")) > 100 * original
