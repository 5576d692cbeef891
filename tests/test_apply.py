"""`compress.apply`: passes over a module in memory, with the numbers of the command line."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import compress
from compress import (
    AdaRound,
    DataError,
    FlexRound,
    GlobalMagnitude,
    Gptq,
    Magnitude,
    NonFiniteError,
    Override,
    Rtn,
    SparseGpt,
    UnsupportedModelError,
    Wanda,
)
from compress.passes import Pass

SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4, **SPECIAL))


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(**SMALL, **SPECIAL, ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=64)
    )


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **SPECIAL, intermediate_size=128, max_position_embeddings=128))


def sequential() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)


# --- any module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pass_",
    [Rtn(), Gptq(), Magnitude(), GlobalMagnitude(), Wanda(sparsity="2:4"), SparseGpt()],
    ids=lambda p: p.key,
)
def test_every_pass_works_on_a_plain_sequential(pass_: Pass) -> None:
    model, x = sequential(), torch.randn(32, 64)
    result = compress.apply(model, [pass_], calibration=x)
    assert set(result.weights) == {"0", "2", "4"}
    for name, weight in result.weights.items():
        assert weight.kind == pass_.produces("dense")
        assert torch.equal(result.model.get_submodule(name).weight, weight.dequantize())
    assert torch.isfinite(result.model(x)).all()


def test_a_model_without_repeated_blocks_is_one_block() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    result = compress.apply(Net(), [Wanda(), Gptq()], calibration=torch.randn(20, 16))
    assert {n: w.kind for n, w in result.weights.items()} == {"a": "sparse-quantized", "b": "sparse-quantized"}


def test_a_lone_linear_layer_can_be_compressed() -> None:
    layer = nn.Linear(32, 8)
    result = compress.apply(layer, [Gptq()], calibration=torch.randn(20, 32))
    (weight,) = result.weights.values()
    assert torch.equal(result.model.weight, weight.dequantize())


def test_a_model_with_nothing_to_compress_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        compress.apply(nn.Sequential(nn.ReLU()), [Rtn()])


@pytest.mark.parametrize("shape", [(16, 64), (4, 5, 64)], ids=str)
def test_inputs_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    result = compress.apply(sequential(), [Gptq()], calibration=torch.randn(shape))
    assert len(result.weights) == 3


# --- nothing that was given is changed --------------------------------------------------------------------------------


def test_the_model_given_is_left_untouched(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    tiny_llama.train()
    before, ids = state(tiny_llama), tokens.clone()
    result = compress.apply(tiny_llama, [Wanda(), Gptq()], calibration=tokens)
    assert unchanged(tiny_llama, before)
    assert torch.equal(tokens, ids)
    assert tiny_llama.training
    assert all(p.requires_grad for p in tiny_llama.parameters())
    assert result.model is not tiny_llama
    assert not result.model.training


@pytest.mark.parametrize(
    "model",
    [sequential(), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))],
    ids=["with activations", "linear layers only"],
)
def test_the_calibration_inputs_given_are_left_untouched(model: nn.Sequential) -> None:
    x = torch.randn(32, 64)
    before, weights = x.clone(), state(model)
    compress.apply(model, [Wanda(), Gptq()], calibration=x)
    assert torch.equal(x, before)
    assert unchanged(model, weights)


@pytest.mark.parametrize(
    "pass_", [FlexRound(steps=2, group_size=8), AdaRound(steps=2, group_size=8)], ids=lambda p: p.key
)
def test_weights_too_large_to_learn_with_are_named_and_no_defect(pass_: Pass) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[1, 1] = 3e38
    with pytest.raises(NonFiniteError, match=r"0 holds weights as large as 3e\+38, .* get a clean checkpoint"):
        compress.apply(model, [pass_], torch.randn(4, 8, 16))


def test_a_second_pass_sees_the_same_calibration_inputs_as_the_first() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(32, 64)
    both = compress.apply(model, [Magnitude(include=("1",)), Gptq(include=("0",))], calibration=x.clone())
    first = compress.apply(model, [Gptq(include=("0",))], calibration=x.clone())
    after_wanda = compress.apply(model, [Wanda(include=("1",)), Gptq(include=("0",))], calibration=x.clone())
    for result in (both, after_wanda):
        assert torch.equal(result.weights["0"].encoding.codes, first.weights["0"].encoding.codes)


def test_in_place_changes_the_model_itself_and_nothing_else(tokens: Tensor, tiny_llama: LlamaForCausalLM) -> None:
    expected = compress.apply(tiny_llama, [Gptq()], calibration=tokens)
    before = state(tiny_llama)
    result = compress.apply(tiny_llama, [Gptq()], calibration=tokens, inplace=True)
    assert result.model is tiny_llama
    assert torch.equal(tiny_llama(tokens).logits, expected.model(tokens).logits)
    changed = {n.removesuffix(".weight") for n, v in tiny_llama.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == set(result.weights)


# --- passes, patterns, fusing -----------------------------------------------------------------------------------------


def test_passes_run_one_after_the_other(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [Wanda(sparsity="2:4"), Gptq(bits=4)], calibration=tokens)
    assert [row.name for row in result.report.rows] == ["original", "wanda", "gptq"]
    for weight in result.weights.values():
        assert weight.kind == "sparse-quantized"
        assert bool((weight.mask.view(-1, 4).sum(1) == 2).all())
    assert result.report.rows[-1].sparsity == 0.5


def test_a_nested_list_is_fused_block_by_block(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    fused = compress.apply(tiny_llama, [[SparseGpt(), Gptq(bits=3)]], calibration=tokens)
    apart = compress.apply(tiny_llama, [SparseGpt(), Gptq(bits=3)], calibration=tokens)
    assert [row.name for row in fused.report.rows] == ["original", "sparsegpt+gptq"]
    assert {w.kind for w in fused.weights.values()} == {"sparse-quantized"}
    second = "model.layers.1.mlp.down_proj"
    assert not torch.equal(fused.weights[second].dequantize(), apart.weights[second].dequantize())
    first = "model.layers.0.self_attn.q_proj"  # nothing lies before it: its mask cannot differ
    assert torch.equal(fused.weights[first].mask, apart.weights[first].mask)


@pytest.mark.parametrize("second", [Magnitude(), Magnitude(sparsity="2:4"), Wanda(), SparseGpt()], ids=str)
def test_a_model_can_be_pruned_again(tiny_llama: LlamaForCausalLM, tokens: Tensor, second: Pass) -> None:
    once = compress.apply(tiny_llama, [GlobalMagnitude(sparsity=0.6)])
    twice = compress.apply(tiny_llama, [GlobalMagnitude(sparsity=0.6), second], calibration=tokens)
    for name, weight in twice.weights.items():
        assert not bool((weight.mask & ~once.weights[name].mask).any())


def test_overrides_and_patterns_choose_sites(tiny_llama: LlamaForCausalLM) -> None:
    passes = [
        Rtn(
            bits=4,
            exclude=("*.layers.0.*",),
            overrides=(Override("*_proj", {"bits": 3}), Override("*.down_proj", {"bits": 8})),
        ),
        Rtn(bits=6, include=("lm_head",)),
    ]
    result = compress.apply(tiny_llama, passes)
    bits = {name: weight.encoding.bits for name, weight in result.weights.items()}
    assert bits.pop("lm_head") == 6
    assert bits.pop("model.layers.1.mlp.down_proj") == 8
    assert set(bits.values()) == {3}
    assert all(name.startswith("model.layers.1.") for name in bits)


def test_the_same_call_gives_the_same_result(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    results = [
        compress.apply(tiny_llama, [Wanda(free_rows=True), Gptq(act_order=True)], calibration=tokens) for _ in range(2)
    ]
    for name, weight in results[0].weights.items():
        assert torch.equal(weight.encoding.codes, results[1].weights[name].encoding.codes)


def test_evaluation_measures_every_pass(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, evaluation_tokens: Tensor
) -> None:
    result = compress.apply(tiny_llama, [Gptq(bits=8), Rtn(bits=2, include=("lm_head",))], calibration=tokens,
                            evaluation=evaluation_tokens)  # fmt: skip
    start, first, last = result.report.rows
    assert start.perplexity == pytest.approx(compress.evaluate(tiny_llama, evaluation_tokens).perplexity, rel=1e-5)
    assert first.kl < 1e-2 < last.kl
    measured = compress.evaluate(result.model, evaluation_tokens, against=tiny_llama)
    assert last.perplexity == pytest.approx(measured.perplexity, rel=1e-4)
    assert last.kl == pytest.approx(measured.kl, rel=1e-3)


def test_the_gate_stops_a_run_that_loses_too_much(tiny_llama: LlamaForCausalLM, evaluation_tokens: Tensor) -> None:
    # A random model cannot get much worse than it is, so the gate is set below what it already is.
    with pytest.raises(compress.GateError, match=r"the gate evaluate\.max_increase"):
        compress.apply(tiny_llama, [Rtn(bits=2)], evaluation=evaluation_tokens, max_increase=-0.99)


# --- architectures and types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", only([neox], [gpt2, opt, neox]), ids=lambda f: f.__name__)
def test_other_architectures_give_the_numbers_of_the_command_line(
    make: Callable[[], PreTrainedModel], tmp_path: Path, tokens: Tensor, evaluation_tokens: Tensor
) -> None:
    torch.manual_seed(4)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    pipeline = {
        "calibration": {"source": "demo"},
        "passes": [{"wanda": {"sparsity": "2:4"}}, {"gptq": {"bits": 4, "group_size": 32}}],
    }
    report = compress.run(
        pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens, evaluation=evaluation_tokens
    )
    passes = [Wanda(sparsity="2:4"), Gptq(bits=4, group_size=32)]
    result = compress.apply(model, passes, calibration=tokens, evaluation=evaluation_tokens)
    assert report.fallbacks == result.report.fallbacks == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, weight in result.weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), weight.dequantize()), name
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)
    for there, here in zip(report.rows, result.report.rows, strict=True):
        assert (there.perplexity, there.kl, there.bytes) == (here.perplexity, here.kl, here.bytes)


def test_a_transposed_layer_is_compressed_along_its_inputs() -> None:
    torch.manual_seed(4)
    model = gpt2().eval()
    name = "transformer.h.0.mlp.c_fc"  # keeps (in, out) = (64, 256)
    before = model.get_submodule(name).weight.detach().clone()
    result = compress.apply(model, [Rtn(bits=4, group_size=32, include=(name,))])
    weight = result.weights[name]
    assert tuple(weight.encoding.codes.shape) == (256, 64)
    assert tuple(weight.encoding.scale.shape) == (256, 2)
    plain = nn.Sequential(nn.Linear(64, 256))
    plain[0].weight.data = before.T.contiguous()
    same = compress.apply(plain, [Rtn(bits=4, group_size=32)]).weights["0"]
    assert torch.equal(weight.encoding.codes, same.encoding.codes)
    assert torch.equal(result.model.get_submodule(name).weight, weight.dequantize().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_stays_in_half_precision(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, dtype: torch.dtype
) -> None:
    model = tiny_llama.to(dtype)
    result = compress.apply(model, [Wanda(sparsity="2:4")], calibration=tokens)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    for name, weight in result.weights.items():
        assert weight.values.dtype == dtype
        kept = weight.mask
        assert torch.equal(weight.values[kept], model.get_submodule(name).weight[kept])
    assert torch.isfinite(result.model(tokens).logits).all()


def test_a_bfloat16_model_gives_the_numbers_of_the_command_line(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # `.to` would round the rotary frequencies as well
    pipeline = {"calibration": {"source": "demo"}, "passes": [{"sparsegpt": {}}, {"gptq": {"bits": 4}}]}
    compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens)
    result = compress.apply(model, [SparseGpt(), Gptq(bits=4)], calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    for name, weight in result.weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), weight.dequantize()), name
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)


def test_new_dense_values_are_kept_in_the_type_asked_for(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [SparseGpt()], calibration=tokens, store_dtype=torch.bfloat16)
    assert {w.values.dtype for w in result.weights.values()} == {torch.bfloat16}
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_missing_calibration_is_said_before_any_work(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(compress.ConfigError, match="gptq learns from data"):
        compress.apply(tiny_llama, [Gptq()])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "empty"),
        (torch.zeros(2, 8), "integer token ids"),
        (torch.zeros(8, dtype=torch.long), "integer token ids"),
        (torch.full((2, 8), 256), "outside 0..255"),
        (torch.full((2, 8), -1), "outside 0..255"),
    ],
    ids=["empty", "float", "one dimension", "too large", "negative"],
)
def test_calibration_of_the_wrong_kind_is_said(tiny_llama: LlamaForCausalLM, bad: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        compress.apply(tiny_llama, [Gptq()], calibration=bad)


def test_inputs_that_are_not_finite_are_said() -> None:
    x = torch.randn(8, 64)
    x[3, 3] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        compress.apply(sequential(), [Gptq()], calibration=x)


def test_weights_that_are_not_finite_are_said_with_their_name() -> None:
    model = sequential()
    model[2].weight.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        compress.apply(model, [Rtn()])


def test_impossible_options_are_said(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(compress.UsageError, match=r"rtn\.bits: 9 is not between 2 and 8"):
        compress.apply(tiny_llama, [Rtn(bits=9)])


@pytest.mark.parametrize("options", [{"bits": 9}, {"bots": 3}], ids=str)
def test_impossible_overrides_are_said(tiny_llama: LlamaForCausalLM, options: dict[str, int]) -> None:
    with pytest.raises(compress.UsageError):
        compress.apply(tiny_llama, [Rtn(overrides=(Override("*.down_proj", options),))])


def test_pruning_after_packing_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(compress.ConfigError, match="Put magnitude before the quantizer"):
        compress.apply(tiny_llama, [Rtn(), Magnitude()])


def test_a_copy_of_a_result_can_be_made_and_called(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [Gptq()], calibration=tokens)
    assert torch.equal(copy.deepcopy(result.model)(tokens).logits, result.model(tokens).logits)


@pytest.mark.parametrize(
    ("pass_", "said"),
    [
        (compress.FlexRound(inputs="orginal"), "flexround.inputs: 'orginal' is not one of compressed, original, mix"),  # type: ignore[arg-type]
        (Gptq(bits=3.0), "gptq.bits: 3.0 is not a whole number"),  # type: ignore[arg-type]
        (Rtn(include="*.down_proj"), r"rtn.include: '\*.down_proj' is not a list"),  # type: ignore[arg-type]
        (Rtn(overrides=(Override("*", {"bits": "4"}),)), r"rtn.overrides\[0\].bits: '4' is not a whole number"),
    ],
)
def test_options_of_the_wrong_type_are_refused(pass_: Pass, said: str) -> None:
    with pytest.raises(compress.ConfigError, match=said):
        compress.apply(sequential(), [pass_], calibration=torch.randn(4, 64))
    with pytest.raises(compress.ConfigError, match=said):
        compress.run(compress.Pipeline(passes=((pass_,),)), "demo", "out")
