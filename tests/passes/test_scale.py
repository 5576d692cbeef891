"""AWQ: channels with large inputs are rounded more finely, in a model that computes what it did."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from children import contents, prepare, run, unfinished
from test_width_prune import MODELS, TOKENS, logits, make, samples
from textbook import statistics, weight
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress import ConfigError, Gptq, Magnitude, Rtn, Scale, Smooth
from compress.errors import NonFiniteError
from compress.models.channels import channels_of
from compress.models.graph import find
from compress.passes.transform.scaling import ChannelsSeen

pytestmark = pytest.mark.usefixtures("one_thread")

W3 = {"bits": 3, "group_size": 8}
# A norm for each layer of two that reads the stream, and values of attention; neurons where a gate multiplies them.
GROUPS = {"Olmo": 2, "Olmo2": 2, "GPT2": 3, "GPTNeoX": 3, "OPT": 3, "Bert": 1, "Roberta": 1, "ViT": 3}


def applied(model: nn.Module, *passes: compress.passes.Pass) -> compress.Result:
    return compress.apply(model, passes, samples(model), products="float32")


def seen(outlier: float, rows: int = 32, width: int = 32) -> tuple[ChannelsSeen, torch.Tensor]:
    """Two layers that read inputs of one size, but for a channel, and those inputs."""
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= outlier
    weights = (weight(rows, width, 1), weight(rows, width, 2))
    return ChannelsSeen(weights, torch.arange(width)[:, None], statistics(x)), x


def test_every_family_computes_what_it_did_and_its_channels_are_found() -> None:
    for kind in MODELS:
        model = make(kind)
        assert len(channels_of(find(model))) == 2 * GROUPS.get(kind, 4), kind
        before = logits(model)
        for pass_ in (Scale(**W3, steps=4), Smooth(strength=0.7)):
            made = applied(model, pass_)
            changed = [n for n, p in made.model.named_parameters() if not p.equal(model.get_parameter(n))]
            assert len(changed) > 2 * GROUPS.get(kind, 4), (kind, pass_.key)
            torch.testing.assert_close(logits(made.model), before, atol=1e-3, rtol=0)


def test_biases_of_what_makes_values_and_neurons_are_divided_too() -> None:
    model = make("Llama", attention_bias=True, mlp_bias=True)
    made = applied(model, Smooth())
    changed = {n for n, p in made.model.named_parameters() if "layers.0" in n and not p.equal(model.get_parameter(n))}
    assert {n.rpartition("layers.0.")[2] for n in changed if n.endswith("bias")} == {
        "self_attn.v_proj.bias", "mlp.up_proj.bias",
    }  # fmt: skip
    torch.testing.assert_close(logits(made.model), logits(model), atol=1e-3, rtol=0)


def test_a_channel_of_large_inputs_is_scaled_up_and_layers_put_out_less_wrong() -> None:
    """The paper's table 1: to multiply the salient channels lowers the error of what comes out."""
    channels, x = seen(outlier=30.0)
    found = Scale(**W3).run(channels)
    assert found.scales[5] > 3 * found.scales[torch.arange(32) != 5].max()
    assert 0 < found.notes["exponent"] < 1
    assert found.notes["output_error"] < 0.7 * found.notes["output_error_before"]
    pass_, wrong, whole = Rtn(**W3), torch.zeros(()), torch.zeros(())
    for w, made in zip(channels.weights, found.weights, strict=True):
        rounded = pass_.nearest(made).dequantize()
        wrong += (x @ w.T - (x / found.scales) @ rounded.T).square().sum()
        whole += (x @ w.T).square().sum()
    assert found.notes["output_error"] == pytest.approx(float((wrong / whole).sqrt()), rel=1e-4)


def test_the_error_is_never_larger_than_without_scales_and_cutting_ranges_makes_it_smaller() -> None:
    for outlier in (1.0, 10.0, 1000.0):
        channels, _ = seen(outlier)
        for bits in (2, 4):
            plain, cut = (Scale(bits=bits, group_size=8, clip=clip).run(channels).notes for clip in (False, True))
            assert plain["output_error"] <= plain["output_error_before"]
            assert cut["output_error"] < plain["output_error"]


def test_the_exponent_is_that_of_the_least_error_among_all_that_are_tried() -> None:
    channels, x = seen(outlier=8.0)
    found = Scale(**W3, steps=8).run(channels)
    size, errors = x.square().sum(0).sqrt(), []
    for step in range(8):
        s = size ** (step / 8)
        s = s / (s.min() * s.max()).sqrt()
        rounded = [Rtn(**W3).nearest(w * s).dequantize() for w in channels.weights]
        pairs = zip(channels.weights, rounded, strict=True)
        errors.append(sum(float((x @ w.T - (x / s) @ r.T).square().sum()) for w, r in pairs))
    assert found.notes["exponent"] == errors.index(min(errors)) / 8


def test_heads_that_share_a_value_share_its_scale() -> None:
    model = make("Llama")  # 6 heads of 8 channels in 3 groups
    (values,) = [c for c in channels_of(find(model)) if c.readers == ("model.layers.0.self_attn.o_proj",)]
    assert values.columns.shape == (24, 2)
    assert values.columns[0].tolist() == [0, 8]
    assert values.columns[8].tolist() == [16, 24]
    assert values.makers[0].index.flatten().tolist() == list(range(24))
    made = applied(model, Smooth(include=("*.o_proj",))).model
    ratio = made.model.layers[0].self_attn.o_proj.weight / model.model.layers[0].self_attn.o_proj.weight
    assert torch.allclose(ratio[:, :8], ratio[:, 8:16], rtol=1e-4)
    assert not torch.allclose(ratio[:, :8], ratio[:, 16:24], rtol=1e-2)


def test_a_quantizer_behind_it_learns_from_the_transformed_model_and_compares_with_it() -> None:
    model = make("Qwen3")
    together = applied(model, Scale(**W3), Gptq(**W3))
    apart = applied(applied(model, Scale(**W3)).model, Gptq(**W3))
    assert together.weights.keys() == apart.weights.keys()
    for name, made in together.weights.items():
        assert torch.equal(made.dequantize(), apart.weights[name].dequantize()), name
    assert together.report.layers["model.layers.0.mlp.up_proj"].keys() == {"scale", "gptq"}
    scaled = together.report.layers["model.layers.0.mlp.gate_proj"]["scale"]
    assert scaled == together.report.layers["model.layers.0.mlp.up_proj"]["scale"]


def test_what_cannot_be_scaled_is_refused_before_work_with_what_to_do() -> None:
    llama, cases = make("Llama"), dict[str, tuple[nn.Module, list[Any]]]()
    cases["a Sequential may be scaled is not known"] = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 8)), [Scale()]
    cases["scale cannot work on quantized weights .*put it before"] = llama, [Rtn(**W3), Scale()]
    cases["smooth cannot work on sparse weights .*put it before"] = llama, [Magnitude(), Smooth()]
    cases["layers that share an input go together, as .*q_proj, .*k_proj, .*v_proj"] = (
        llama,
        [Scale(include=("*.q_proj",))],
    )
    cases["matches no layer"] = llama, [Scale(exclude=("*.nothing",))]
    cases["cannot be fused with others"] = llama, [[Scale(), Rtn()]]
    for message, (model, passes) in cases.items():
        with pytest.raises(ConfigError, match=message):
            compress.apply(model, passes, TOKENS if model is llama else torch.randn(8, 24))
    with pytest.raises(ConfigError, match="calibration"):
        compress.apply(llama, [Scale()])


def test_numbers_that_half_precision_does_not_hold_are_refused() -> None:
    layer = (model := make("Llama")).model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.fill_(300)
        for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            reader.weight[:, 0] = 0
    with pytest.raises(NonFiniteError, match=r"smooth makes .*norm.weight larger than torch.float16 holds; .*"):
        applied(model.half(), Smooth(strength=0.0))


PIPELINE = """\
calibration: {source: calibration.txt, samples: 2, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
passes: [{scale: {scheme: w3g16, steps: 3, clip: true}}, {smooth: {}}, {gptq: {scheme: w3g16}}]
export: [hf]
"""


@pytest.mark.real  # two processes that are killed make the same of it in test_shape_ranks.py
def test_killed_in_the_middle_a_run_ends_bit_identical_and_what_it_writes_computes_the_same(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, PIPELINE)
    assert run(whole, "model") == 0
    assert run(killed, "model", kill_after=5) == -signal.SIGKILL
    assert {f"s00-b000{block}.safetensors" for block in (0, 1)} | {"s01-b0000.safetensors"} < unfinished(killed).keys()
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")
    report = json.loads((whole / "out" / "report.json").read_text())
    assert report["verified"]["max_logit_difference"] == 0
    assert [row["name"] for row in report["rows"]] == ["original", "scale", "smooth", "gptq"]
    assert report["rows"][2]["kl"] == pytest.approx(report["rows"][1]["kl"], abs=1e-4), "smooth changes nothing"
    tokens, (plain, packed) = TOKENS[:2, :16], (
        AutoModelForCausalLM.from_pretrained(whole / "out" / name) for name in ("hf", ".")
    )  # fmt: skip
    torch.testing.assert_close(logits(plain, tokens), logits(packed, tokens), atol=1e-2, rtol=0)
