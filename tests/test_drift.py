"""What layers make up for: how far their inputs are from those of the original model."""

from collections.abc import Callable

import pytest
import torch
from expert_models import make_mixture
from selection import only
from textbook import inputs, target, weight
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import compress
from compress.calibration import collect
from compress.errors import CompressError
from compress.passes.solvers.drift import made_up


class Two(nn.Module):
    """A layer, and two that are fed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return torch.cat([self.left(hidden), self.right(hidden)], -1)


def test_the_drift_of_an_input_is_summed_up_over_pairs_of_forward_passes() -> None:
    original, now, batches = Two(), Two(), torch.randn(3, 7, 6)
    named = {name: getattr(now, name) for name in ("first", "left", "right")}

    def before(x: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.func.functional_call(now, dict(original.named_parameters()), x)

    def after(x: Tensor) -> Callable[[], Tensor]:
        return lambda: now(x)

    found = collect.statistics(
        named,
        dict.fromkeys(named, "gram"),
        map(after, batches),
        drifting={"first", "left", "right"},
        originals=map(before, batches),
    )
    x, o = now.first(batches).flatten(0, 1), original.first(batches).flatten(0, 1)
    torch.testing.assert_close(found["left"].drift, (o - x).T @ x)
    torch.testing.assert_close(found["left"].gram, x.T @ x)
    assert found["left"] is found["right"]
    assert found["left"].tokens == 21
    assert torch.equal(found["first"].drift, torch.zeros(6, 6))


def test_the_drift_of_a_convolution_is_that_of_its_windows() -> None:
    layer, x, o = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    found = collect.statistics(
        {"layer": layer}, {"layer": "gram"}, [lambda: layer(x)], drifting={"layer"}, originals=[lambda: layer(o)]
    )["layer"]
    now, before = (nn.functional.unfold(t, 3).transpose(1, 2).flatten(0, 1) for t in (x, o))
    torch.testing.assert_close(found.gram, now.T @ now)
    torch.testing.assert_close(found.drift, (before - now).T @ now)


def test_experts_make_up_for_nothing_and_the_layers_around_them_do() -> None:
    model, tokens = make_mixture("Qwen3Moe"), torch.randint(64, (6, 24))
    passes = [[compress.Gptq(bits=2, group_size=16, propagation=share)] for share in (0.0, 1.0)]
    plain, made = (compress.apply(model, each, tokens).weights for each in passes)
    differ = {name for name in plain if not torch.equal(plain[name].encoding.codes, made[name].encoding.codes)}
    assert any(".1.self_attn" in name for name in differ)
    assert not any(".layers.0." in name for name in differ)


def test_a_layer_that_is_called_in_another_way_now_is_named() -> None:
    model, x = Two(), torch.randn(2, 6)
    with pytest.raises(CompressError, match="left is called in another way"):
        collect.statistics(
            {"left": model.left}, {"left": "gram"}, [lambda: model(x)], drifting={"left"}, originals=[lambda: None]
        )


def test_nothing_is_nearer_to_the_outputs_of_the_original() -> None:
    w, x = weight(8, 24), inputs(24)
    o = x + 0.3 * inputs(24, seed=5)
    gram, drift = x.T @ x, (o - x).T @ x
    made = made_up(w, gram, drift, 1.0, 1e-7)
    nearest = torch.linalg.lstsq(x.double(), (o @ w.T).double()).solution.T
    torch.testing.assert_close(made.double(), nearest, rtol=1e-3, atol=1e-3)
    half = made_up(w, gram, drift, 0.5, 1e-7)
    torch.testing.assert_close(half, (w + made) / 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(made_up(w, gram, torch.zeros_like(drift), 1.0, 0.01), w)


def distance(model: LlamaForCausalLM, tokens: Tensor, made: compress.Result) -> float:
    with torch.no_grad():
        return float((made.model(tokens).logits - model(tokens).logits).norm())


@pytest.mark.parametrize("strength", only([0.5], [0.5, 1.0]))
def test_layers_that_make_up_for_drift_end_nearer_to_the_original(
    llama_maker: Callable[..., LlamaForCausalLM], strength: float
) -> None:
    tokens = torch.randint(256, (24, 64))
    original = llama_maker(num_hidden_layers=3)
    plain, better = (
        compress.apply(llama_maker(num_hidden_layers=3), [compress.Gptq(bits=2, propagation=share)], tokens)
        for share in (0.0, strength)
    )
    assert distance(original, tokens, better) < 0.97 * distance(original, tokens, plain)
    for name in (n for n in plain.weights if ".layers.0." in n and ("self_attn.q" in n or "gate" in n)):
        assert torch.equal(plain.weights[name].encoding.codes, better.weights[name].encoding.codes)  # no drift yet


def test_without_sums_over_both_models_there_is_nothing_to_make_up_for() -> None:
    made = compress.Gptq(propagation=0.5).run(target(weight(4, 16), inputs(16)))
    plain = compress.Gptq().run(target(weight(4, 16), inputs(16)))
    assert torch.equal(made.encoding.codes, plain.encoding.codes)
