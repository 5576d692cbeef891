"""SmoothQuant: outliers of inputs go into weights, channel by channel."""

import pytest
import torch
from test_scale import applied
from test_width_prune import logits, make
from textbook import inputs, statistics, weight
from torch import Tensor

from compress import Rtn, Smooth
from compress.passes.transform.scaling import ChannelsSeen

pytestmark = pytest.mark.usefixtures("one_thread")


def seen() -> tuple[ChannelsSeen, Tensor]:
    x = inputs(24)
    x[:, 3] *= 100
    return ChannelsSeen((weight(16, 24, 1), weight(8, 24, 2)), torch.arange(24)[:, None], statistics(x, "peak")), x


def alike(values: Tensor) -> bool:
    return torch.allclose(values, values.mean().expand_as(values), rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75, 1.0])
def test_the_strength_says_which_share_of_an_outlier_goes_into_the_weights(strength: float) -> None:
    """Equation 4: s = max|x|**a / max|w|**(1 - a), for every channel, up to one factor for all."""
    channels, x = seen()
    found = Smooth(strength=strength).run(channels)
    largest = torch.cat(channels.weights).abs().amax(0)
    assert alike(found.scales / (x.abs().amax(0) ** strength / largest ** (1 - strength)))
    smooth, made = (x / found.scales).abs().amax(0), torch.cat(found.weights).abs().amax(0)
    if strength == 0.5:
        assert alike(smooth / made), "both are as hard to round"
    if strength == 1:
        assert alike(smooth)
    if strength == 0:
        assert alike(made)


def test_inputs_with_an_outlier_are_rounded_with_less_error_once_it_is_gone_into_the_weights() -> None:
    """With one scale for a token, 100 times as large a channel leaves the others a few steps; the paper's figure 4."""
    channels, x = seen()
    found = Smooth().run(channels)
    errors = []
    for weights, given in ((channels.weights, x), (found.weights, x / found.scales)):
        scale = given.abs().amax(1, keepdim=True) / 127
        rounded = (given / scale).round() * scale
        wrong = [rounded @ Rtn(bits=8).nearest(w).dequantize().T - given @ w.T for w in weights]
        errors.append(float(torch.cat(wrong, 1).norm()))
    assert errors[1] < 0.3 * errors[0]


def test_a_model_with_outliers_keeps_its_logits_at_eight_bits_only_when_it_was_smoothed() -> None:
    model = make("Llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{n}_proj") for n in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[7] *= 300
                for reader in readers:
                    reader.weight[:, 7] /= 300
    original, eight = logits(model), Rtn(bits=8, activation_bits=8, activation_scale="tensor")
    errors = [float((logits(applied(model, *p, eight).model) - original).norm()) for p in ((), (Smooth(),))]
    assert errors[1] < 0.2 * errors[0]


def test_a_channel_that_is_never_used_leaves_finite_scales() -> None:
    x = inputs(24, dead=(2,))
    weights = (weight(16, 24).index_fill(1, torch.tensor([5]), 0.0),)
    found = Smooth().run(ChannelsSeen(weights, torch.arange(24)[:, None], statistics(x, "peak")))
    assert bool(torch.isfinite(found.scales).all())
    assert bool((found.scales > 0).all())
