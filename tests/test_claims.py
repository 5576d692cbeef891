"""The order of the methods on the demo model, as the papers have it."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress import Gptq, Magnitude, Result, Rtn, SparseGpt, Wanda
from compress.passes import LinearPass


@cache
def measured(*passes: LinearPass) -> Result:
    model, tokenizer = compress.demo.load()
    calibration = compress.load_tokens("demo", tokenizer, samples=8, length=256)
    evaluation = compress.load_tokens("demo", tokenizer, samples=4, length=256, split="evaluation")
    return compress.apply(model, passes, calibration=calibration, evaluation=evaluation, inplace=True)


def perplexity(*passes: LinearPass) -> float:
    value = measured(*passes).report.rows[-1].perplexity
    assert value is not None
    return value


@pytest.mark.real
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_is_better_than_rounding_to_nearest(bits: int) -> None:
    # By KL: at 4 bits the perplexity of so few texts is below the original's as often as above.
    found = [measured(p(bits=bits, group_size=64)).report.rows[-1].kl for p in (Gptq, Rtn)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] < found[1]


@pytest.mark.real
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_sparsegpt_is_better_than_wanda_and_wanda_than_magnitude(sparsity: float | str) -> None:
    found = [perplexity(p(sparsity=sparsity)) for p in (SparseGpt, Wanda, Magnitude)]
    assert found == sorted(found)


def test_gptq_after_wanda_leaves_every_zero_in_place(tiny_llama: PreTrainedModel, tokens: Tensor) -> None:
    wanda, gptq = Wanda(sparsity="2:4"), Gptq(bits=4, group_size=64)
    before, after = (compress.apply(tiny_llama, p, calibration=tokens) for p in ([wanda], [wanda, gptq]))
    for name, weight in after.weights.items():
        mask = before.weights[name].mask
        assert mask is not None
        assert weight.kind == "sparse-quantized"
        assert torch.equal(weight.mask, mask)
        assert not weight.dequantize()[~mask].any()
        assert not after.model.get_submodule(name).weight[~mask].any()
