"""QuaRot, what folds into weights: the stream in another basis, and a model that computes what it did."""

import json
import signal
from pathlib import Path

import pytest
import torch
from children import contents, prepare, run, unfinished
from test_scale import applied
from test_width_prune import TOKENS, logits, make
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress import ConfigError, Rotate, Rtn
from compress.config.options import errors_in
from compress.models.graph import find
from compress.models.stream import stream_of
from compress.passes.solvers.hadamard import hadamard
from compress.passes.transform import rotate

pytestmark = pytest.mark.usefixtures("one_thread")

TURNED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite", "SmolLM3", "Olmo", "GPT2", "GPTNeoX", "OPT")
# What stands in the way.
REFUSED = {
    "Gemma2": r"post_attention_layernorm.weight of a Gemma2ForCausalLM changes by itself what is added",
    "Olmo2": r"post_attention_layernorm.weight of a Olmo2ForCausalLM changes by itself",
    "Bert": r"the residual stream of a BertForMaskedLM is not known \(known: language models like Llama",
    "ViT": r"cls_token of a ViTForImageClassification changes by itself",
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("matrix", ["hadamard", "orthogonal"])
def test_a_turn_keeps_lengths_and_where_it_must_the_mean(matrix: str) -> None:
    pass_ = Rotate(matrix=matrix)
    for width in (1, 2, 15, 48):
        for keeps_mean in (False, True):
            turn = pass_.run(width, keeps_mean, seeded())
            assert turn.dtype == torch.float64
            torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64))
            moved = torch.ones(width, dtype=torch.float64) @ turn - 1
            assert (float(moved.abs().max()) < 1e-12) == (keeps_mean or (width == 1 and float(turn) > 0))
            assert torch.equal(turn, pass_.run(width, keeps_mean, seeded()))
            assert width == 1 or not torch.equal(turn, pass_.run(width, keeps_mean, seeded(1)))


def test_a_draw_in_the_middle_has_a_sign_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "draw", lambda generator, shape, kind, like: torch.full(shape, 0.5))
    turn = Rotate().run(16, False, torch.Generator())
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64))


def test_a_hadamard_matrix_spreads_an_outlier_over_all_channels_alike() -> None:
    turn = Rotate().run(48, False, seeded())
    assert torch.allclose(turn.abs(), torch.full_like(turn, 48**-0.5))
    drawn = Rotate(matrix="orthogonal").run(48, False, seeded())
    assert float(drawn.abs().max()) > 2 * 48**-0.5
    for size in (1, 2, 12, 24, 44, 64, 80, 576):
        known = hadamard(size)
        assert known is not None
        assert torch.equal(known @ known.T, size * torch.eye(size, dtype=torch.float64))
    assert [size for size in (3, 6, 15, 28, 36) if hadamard(size) is not None] == []


def test_every_family_that_may_be_turned_computes_what_it_did() -> None:
    for kind in TURNED:
        model = make(kind)
        found = stream_of(find(model))
        assert found.width == 48
        before = logits(model)
        made = applied(model, Rotate()).model
        torch.testing.assert_close(logits(made), before, atol=1e-3, rtol=0)
        was = dict(model.named_parameters())
        same = {n for n, p in made.named_parameters() if n in was and p.equal(was[n])}
        # Norms within a head, and biases of queries, keys and neurons: nothing of the stream is in them.
        assert all("q_norm" in n or "k_norm" in n or n.endswith(".bias") for n in same), (kind, same)
        for norm in found.norms:
            if norm.scaled:
                assert torch.equal(made.get_parameter(norm.weight), torch.full((48,), 1 - norm.offset)), kind


def test_models_with_biases_and_one_head_for_all_values_too() -> None:
    for changes in ({"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 6}):
        model = make("Llama", **changes)
        for pass_ in (Rotate(), Rotate(values=False, matrix="orthogonal")):
            torch.testing.assert_close(logits(applied(model, pass_).model), logits(model), atol=1e-3, rtol=0)


def test_a_head_that_was_tied_has_a_matrix_of_its_own_and_the_folder_loads(tmp_path: Path) -> None:
    for kind in ("Gemma", "GPT2"):
        model = make(kind)
        assert model.config.tie_word_embeddings
        model.save_pretrained(tmp_path / kind)
        report = compress.run({"passes": ["rotate"], "export": ["hf"]}, tmp_path / kind, tmp_path / f"{kind}-out")
        assert report.verified["tensors_equal"] > 10
        for folder in (tmp_path / f"{kind}-out", tmp_path / f"{kind}-out" / "hf"):
            assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            torch.testing.assert_close(logits(loaded, TOKENS), logits(model), atol=1e-3, rtol=0)
            head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
            assert not torch.allclose(head, embedding, atol=1e-2)
    inplace = make("Gemma")
    before = logits(inplace)
    result = compress.apply(inplace, [Rotate(), Rtn(bits=8, include=("lm_head",))], inplace=True)
    assert result.model is inplace
    assert not inplace.config.tie_word_embeddings
    assert result.weights.keys() == {"lm_head"}
    torch.testing.assert_close(logits(inplace), before, atol=0.5, rtol=0)


def test_outliers_are_gone_and_four_bits_for_weights_and_inputs_lose_less() -> None:
    """The paper's claim: rotated inputs have no outliers, so that four bits hold them."""
    model = make("Llama")
    with torch.no_grad():  # a few channels of the stream are large, as in large models
        model.model.embed_tokens.weight[:, [5, 20]] *= 40
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[[5, 20]] *= 40
            attention, mlp = layer.self_attn, layer.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, [5, 20]] /= 6
        model.lm_head.weight[:, [5, 20]] /= 6
    four = Rtn(bits=8, activation_bits=4, exclude=("*.o_proj", "*.down_proj"))
    before = logits(model)
    errors = [float((logits(applied(model, *p, four).model) - before).norm()) for p in ((), (Rotate(),))]
    assert errors[1] < 0.75 * errors[0]
    notes = applied(model, Rotate()).report.layers["model.layers.0.mlp.down_proj"]["rotate"]
    assert notes["peak"] < 0.6 * notes["peak_before"]


def test_models_that_may_not_be_turned_are_refused_before_work_starts() -> None:
    for kind, said in REFUSED.items():
        with pytest.raises(ConfigError, match=said):
            compress.apply(make(kind), [Rotate()])
    with pytest.raises(ConfigError, match="residual stream of a Sequential is not known"):
        compress.apply(nn.Sequential(nn.Linear(4, 4)), [Rotate()])
    behind = make("OPT", do_layer_norm_before=False)
    with pytest.raises(ConfigError, match="residual stream of a OPTForCausalLM is not known"):
        compress.apply(behind, [Rotate()])
    with pytest.raises(ConfigError, match=r"rotate cannot work on quantized weights .*put it before"):
        compress.apply(make("Llama"), [Rtn(bits=4), Rotate()])
    assert [e.option for e in errors_in(Rotate(include=("*",)))] == ["include"]


def test_a_norm_that_scales_by_zero_and_adds_is_refused_by_name() -> None:
    model = make("GPT2")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    with pytest.raises(
        compress.UnsupportedModelError, match=r"transformer.ln_f scales a channel by zero .* lm_head has no"
    ):
        compress.apply(model, [Rotate()])


PIPELINE = """\
calibration: {source: calibration.txt, samples: 2, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
passes: [rotate: {online: true}, gptq: {scheme: w4g16, activation_bits: 4}]
"""


@pytest.mark.slow
def test_killed_in_the_middle_a_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, PIPELINE, tie_word_embeddings=True)
    assert run(whole, "model") == 0
    assert run(killed, "model", kill_after=4) == -signal.SIGKILL
    assert {"s00-b0000.safetensors", "s00-b0001.safetensors", "s00-outside-00.safetensors"} < unfinished(killed).keys()
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")
    rows = json.loads((whole / "out" / "report.json").read_text())["rows"]
    assert rows[1]["kl"] < 1e-4, "the turn changes nothing"
    assert rows[2]["kl"] > 10 * rows[1]["kl"]
