"""The block-sequential sweep gives the numbers of a plain whole-model run, whatever the model's wiring."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from wirings import WIDTH, Block, Model, SkipInside, SkipOutside

import compress
from compress.calibration import collect
from compress.calibration.statistics import Need, Statistics
from compress.calibration.wiring import kinds_of_calls
from compress.checkpoint.opening import open_model
from compress.checkpoint.sources import ModuleSource
from compress.config.reading import load_pipeline
from compress.encodings import Uniform
from compress.engine.block_stage import run_passes
from compress.engine.context import Context
from compress.engine.ledger import MemoryLedger
from compress.engine.retry import solved
from compress.errors import NonFiniteError
from compress.models import graph as graphs
from compress.models.graph import forward
from compress.passes import Gptq, LinearPass, Rtn, SparseGpt, Wanda
from compress.passes.base import Edit, Target
from compress.progress import Bars

# --- the plain way: the whole model, hooks on one block at a time -----------------------------------------------------


@contextmanager
def watching(modules: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, (*args, *kwargs.values())[0].detach().clone()),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def plain(
    model: nn.Module, blocks: list[str], pass_: LinearPass, run: Callable[[], object]
) -> dict[str, tuple[Edit, Tensor]]:
    """Site name -> (edit, its new dense weight); `model` is changed."""
    done: dict[str, tuple[Edit, Tensor]] = {}
    for block in blocks:
        inside = model.get_submodule(block).named_modules(prefix=block)
        linears = {name: module for name, module in inside if isinstance(module, nn.Linear)}
        sums = {name: Statistics(module.in_features, "gram") for name, module in linears.items()}
        with watching(linears, lambda name, x, sums=sums: sums[name].update(x, name)):
            run()
        for name, module in linears.items():
            edit = pass_.run(Target(module.weight.data.clone(), None, sums[name]))
            dense = edit.encoding.dequantize() if edit.encoding else edit.weight
            assert dense is not None
            done[name] = (edit, dense)
            module.weight.data = dense
    return done


def assert_same_as_plain(result: compress.Result, expected: dict[str, tuple[Edit, Tensor]]) -> None:
    """Equal but for what the last bit of a sum can do to a handful of weights."""
    assert result.weights.keys() == expected.keys()
    for name, (edit, dense) in expected.items():
        got = result.weights[name]
        if edit.encoding is not None:
            assert float((got.encoding.codes != edit.encoding.codes).float().mean()) < 0.01, name
        if edit.mask is not None:
            assert float((got.mask != edit.mask).float().mean()) < 0.01, name
        assert float((got.dequantize() - dense).norm() / dense.norm()) < 0.02, name


def is_chain(model: nn.Module, batch: Tensor) -> bool:
    graph = graphs.find(model)
    with torch.no_grad():
        return kinds_of_calls(lambda: forward(graph, batch), model, graph.blocks) is not None


# --- models whose blocks are wired in different ways ------------------------------------------------------------------


class ChangedInPlace(Model):
    """The next block gets the same tensor object, but not the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for block in self.blocks:
            x = block(x)
            x += 2 * first
        return x


class Backwards(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in reversed(self.blocks):
            x = block(x)
        return x


class TwiceThrough(Model):
    """Every block runs twice in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            for block in self.blocks:
                x = torch.tanh(block(x))
        return x


class FirstTwice(Model):
    """Blocks that share a part of their work: the first runs again at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](super().forward(x))


class Scaled(Block):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x * scale)


class CalledDifferently(Model):
    block = Scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, 1.0 + i)
        return x


class CalledByWhatWasMade(Model):
    """What a block is given beside its hidden states depends on what the blocks before it made."""

    block = Scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, 1.0 + float(x.abs().mean()))
        return x


class CalledByWhatArrives(Model):
    """What the blocks are given differs from block to block, and from batch to batch."""

    block = Scaled

    def forward(self, x: Tensor) -> Tensor:
        first = float(x.abs().mean())
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x, first + i)
        return x


class ByKeyword(Model):
    """Hidden states arrive under a name of the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x=x)
        return x


class KeywordBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=torch.tanh(self.gate(input=x)) * self.up(input=x))


class LinearByKeyword(Model):
    """The layers inside are called with a keyword."""

    block = KeywordBlock


WIRINGS = [
    Model,
    ByKeyword,
    LinearByKeyword,
    SkipOutside,
    SkipInside,
    ChangedInPlace,
    CalledDifferently,
    CalledByWhatArrives,
    CalledByWhatWasMade,
    TwiceThrough,
    FirstTwice,
]


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5))


# --- equal to the plain way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_", [Gptq(bits=3), SparseGpt(sparsity="2:4")], ids=lambda p: p.key)
def test_a_sweep_over_llama_equals_a_plain_whole_model_run(
    tiny_llama: LlamaForCausalLM, llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor, pass_: LinearPass
) -> None:
    assert is_chain(tiny_llama, tokens)
    result = compress.apply(tiny_llama, [pass_], calibration=tokens, products="float32")
    whole = llama_maker()
    expected = plain(whole, ["model.layers.0", "model.layers.1"], pass_, lambda: whole(tokens))
    assert len(expected) == 14
    assert_same_as_plain(result, expected)
    assert torch.allclose(result.model(tokens).logits, whole(tokens).logits, atol=0.02)


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda c: c.__name__)
def test_a_sweep_equals_a_plain_whole_model_run_however_blocks_are_wired(wiring: type[Model], samples: Tensor) -> None:
    model = wiring()
    result = compress.apply(model, [Gptq(bits=3)], calibration=samples, products="float32")
    expected = plain(model, ["blocks.0", "blocks.1", "blocks.2"], Gptq(bits=3), lambda: model(samples))
    assert_same_as_plain(result, expected)


def test_blocks_that_run_in_another_order_than_they_are_listed_still_give_finite_weights(samples: Tensor) -> None:
    result = compress.apply(Backwards(), [Gptq(bits=4)], calibration=samples)
    assert result.report.fallbacks == []
    assert all(bool(torch.isfinite(w.dequantize()).all()) for w in result.weights.values())


@pytest.mark.parametrize(
    ("wiring", "chained"),
    [
        (Model, True),
        (SkipOutside, False),
        (ChangedInPlace, False),
        (Backwards, False),
        (TwiceThrough, False),
        (FirstTwice, False),
        (CalledDifferently, True),
        (CalledByWhatArrives, True),
        (CalledByWhatWasMade, False),
    ],
    ids=lambda c: getattr(c, "__name__", str(c)),
)
def test_blocks_are_chained_only_where_that_is_how_they_are_wired(
    wiring: type[Model], chained: bool, samples: Tensor
) -> None:
    assert is_chain(wiring(), samples) is chained


def test_calibration_in_several_batches_gives_the_numbers_of_one(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compress.apply(tiny_llama, [Wanda()], calibration=tokens)
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", 96)
    several = compress.apply(tiny_llama, [Wanda()], calibration=tokens)
    for name, weight in one.weights.items():
        assert float((weight.mask != several.weights[name].mask).float().mean()) < 0.005


def test_activations_in_a_mapped_file_give_the_numbers_of_those_in_memory(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compress.apply(tiny_llama, [Gptq()], calibration=tokens)
    monkeypatch.setattr("compress.calibration.activation_cache.LARGEST_BUFFER", 0)
    mapped = compress.apply(tiny_llama, [Gptq()], calibration=tokens)
    assert all(torch.equal(w.encoding.codes, mapped.weights[n].encoding.codes) for n, w in one.weights.items())


def test_the_next_block_learns_from_the_outputs_of_the_compressed_one(samples: Tensor) -> None:
    everything = compress.apply(Model(), [Gptq(bits=2)], calibration=samples)
    second_only = compress.apply(Model(), [Gptq(bits=2, include=("blocks.1.*",))], calibration=samples)
    codes = [r.weights["blocks.1.up"].encoding.codes for r in (everything, second_only)]
    assert not torch.equal(*codes)


@pytest.mark.parametrize("pass_", [Gptq(bits=3), Wanda(), SparseGpt(sparsity="2:4")], ids=lambda p: p.key)
def test_a_site_does_not_depend_on_which_others_of_its_block_are_worked_on(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, pass_: LinearPass
) -> None:
    name = "model.layers.0.self_attn.k_proj"
    whole = compress.apply(tiny_llama, [pass_], calibration=tokens).weights[name].dequantize()
    alone = compress.apply(tiny_llama, [replace(pass_, include=(name,))], calibration=tokens).weights[name].dequantize()
    assert float((whole != alone).any(1).float().mean()) <= 1 / 32  # rows: a tie broken by the last bit
    assert float((whole - alone).norm() / whole.norm()) < 0.02


def test_a_tiny_weight_beside_it_does_not_change_how_a_weight_is_stored(samples: Tensor) -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[0].gate.weight.mul_(1e-6)
    beside = compress.apply(model, [Gptq(bits=4)], calibration=samples).weights["blocks.0.up"].encoding
    alone = compress.apply(model, [Gptq(bits=4, include=("blocks.0.up",))], calibration=samples)
    assert beside.scale.dtype == alone.weights["blocks.0.up"].encoding.scale.dtype == torch.float16
    assert torch.equal(beside.scale, alone.weights["blocks.0.up"].encoding.scale)


# --- shared inputs ----------------------------------------------------------------------------------------------------


def linears(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    found = model.get_submodule(prefix).named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_sites_fed_by_one_tensor_share_their_statistics(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    modules = linears(tiny_llama, "model.layers.0")
    runs = [lambda: tiny_llama(tokens), lambda: tiny_llama(tokens.flip(0))]
    found = collect.statistics(modules, dict.fromkeys(modules, "gram"), runs)
    together = [{n for n in found if found[n] is found[leader]} for leader in found]
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} in together
    assert {"mlp.gate_proj", "mlp.up_proj"} in together
    assert {"self_attn.o_proj"} in together
    assert {"mlp.down_proj"} in together
    assert {s.tokens for s in found.values()} == {2 * tokens.numel()}


@torch.no_grad()
def test_shared_statistics_are_the_plain_sums(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    modules = linears(tiny_llama, "model.layers.1")
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.double().flatten(0, -2)
        sums[name] = sums.get(name, 0) + x.T @ x

    runs = [lambda: tiny_llama(tokens), lambda: tiny_llama(tokens.flip(1))]
    with watching(modules, see):
        found = collect.statistics(modules, dict.fromkeys(modules, "gram"), runs)
    for name, gram in sums.items():
        assert torch.allclose(found[name].gram.double(), gram, rtol=1e-4, atol=1e-3)
        assert torch.allclose(found[name].norm.double(), gram.diagonal().sqrt(), rtol=1e-5)


@torch.no_grad()
def test_a_tensor_changed_in_place_between_two_sites_is_not_shared() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(10, 4)
    before = x.clone()
    found = collect.statistics({"a": a, "b": b}, {"a": "gram", "b": "gram"}, [lambda: (a(x), b(x.mul_(3)))])
    assert torch.allclose(found["a"].gram, before.T @ before, atol=1e-4)
    assert torch.allclose(found["b"].gram, 9 * before.T @ before, atol=1e-4)


@torch.no_grad()
def test_sites_fed_by_equal_but_different_tensors_are_summed_apart() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(10, 4)
    found = collect.statistics({"a": a, "b": b}, {"a": "gram", "b": "gram"}, [lambda: (a(x), b(x.clone()))])
    assert found["a"] is not found["b"]
    assert torch.equal(found["a"].gram, found["b"].gram)


@torch.no_grad()
def test_sites_that_stop_sharing_are_an_error_and_never_a_wrong_sum() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(10, 4)
    runs = [lambda: (a(x), b(x)), lambda: (a(x.clone()), b(x.clone()))]
    with pytest.raises(compress.CompressError, match="b and a were fed by one tensor at first"):
        collect.statistics({"a": a, "b": b}, {"a": "gram", "b": "gram"}, runs)


@torch.no_grad()
def test_a_pass_ends_once_every_site_was_reached_and_only_if_the_first_one_reached_each_once() -> None:
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    ended: list[str] = []
    x = torch.randn(10, 4)

    def once() -> None:
        b(a(x))
        ended.append("once")

    def twice() -> None:
        b(a(x))
        a(x)
        ended.append("twice")

    needs: dict[str, Need] = {"a": "norm", "b": "norm", "c": "norm"}
    assert collect.statistics({"a": a, "b": b}, needs, [once] * 3)["a"].tokens == 30
    assert ended == ["once"]
    ended.clear()
    assert collect.statistics({"a": a, "b": b}, needs, [twice] * 3)["a"].tokens == 60
    assert ended == ["twice"] * 3
    ended.clear()
    assert set(collect.statistics({"a": a, "b": b, "c": c}, needs, [once] * 3)) == {"a", "b"}
    assert ended == ["once"] * 3


@torch.no_grad()
def test_a_bfloat16_gram_matrix_is_exact_to_float32() -> None:
    x = torch.randn(500, 48).bfloat16()
    found = Statistics(48, "gram")
    found.update(x, "a test")
    exact = x.double().T @ x.double()
    assert float((found.gram.double() - exact).abs().max() / exact.abs().max()) < 4e-6  # sums are float32


def test_an_input_that_is_not_finite_names_its_layer() -> None:
    with pytest.raises(NonFiniteError, match=r"inputs of blocks.0.up are not finite \(feature 2\)"):
        Statistics(4, "norm").update(torch.tensor([[0.0, 1.0, torch.nan, 2.0]]), "blocks.0.up")


def test_no_hook_is_left_behind(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [Wanda(), Gptq()], calibration=tokens, inplace=True)
    for module in result.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- the cache trap ---------------------------------------------------------------------------------------------------


class Remembering(Block):
    """Keeps what it sees in a cache, if it is given one, and is influenced by how much is there."""

    def forward(self, x: Tensor, past_key_values: DynamicCache | None = None, layer: int = 0) -> Tensor:
        if past_key_values is not None:
            keys = x[:, None, None]
            past_key_values.update(keys, keys, 0)
            x = x * past_key_values.get_seq_length()
        return super().forward(x)


class WithCache(Model):
    block = Remembering

    def forward(self, x: Tensor) -> Tensor:
        cache = DynamicCache()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, past_key_values=cache)
        return x


class WithCacheByPosition(WithCache):
    def forward(self, x: Tensor) -> Tensor:
        cache = DynamicCache()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, cache)
        return x


@pytest.mark.parametrize("model", [WithCache, WithCacheByPosition], ids=lambda c: c.__name__)
def test_a_key_value_cache_is_not_kept_with_a_blocks_arguments(model: type[Model], samples: Tensor) -> None:
    made = model()
    hidden, call = collect.arrival(lambda: made(samples), made.blocks[0])
    assert torch.equal(hidden, made.embed(samples))
    assert not any(isinstance(v, DynamicCache) for v in (*call.args, *call.kwargs.values()))
    outputs = [call.run(made.blocks[0], hidden) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])


def test_a_language_model_that_caches_by_default_gets_no_cache(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    tiny_llama.config.use_cache = True
    _, call = collect.arrival(lambda: tiny_llama(tokens, use_cache=True), tiny_llama.model.layers[0])
    assert not any(isinstance(v, DynamicCache) for v in (*call.args, *call.kwargs.values()))


# --- failures ---------------------------------------------------------------------------------------------------------


def broken(width: int, lowest: float) -> Statistics:
    """A Gram matrix with unit diagonal and one eigenvalue of `lowest`."""
    found = Statistics(width, "gram")
    found._gram = torch.eye(width)
    found.gram[0, 1] = found.gram[1, 0] = 1 - lowest
    found.tokens = 1
    return found


def test_a_solve_that_fails_is_tried_again_with_more_damping() -> None:
    edit, note = solved(Gptq(damping=0.01), Target(torch.randn(4, 8), None, broken(8, -0.05)))
    assert isinstance(edit.encoding, Uniform)
    assert note is not None
    assert note.startswith("damping x10: ")
    assert "positive definite" in note


def test_damping_given_as_a_whole_number_is_raised_as_well() -> None:
    _, note = solved(Gptq(damping=1), Target(torch.randn(4, 8), None, broken(8, -5.0)))
    assert note is not None
    assert note.startswith("damping x10: ")


def test_a_solve_that_still_fails_falls_back_and_says_so() -> None:
    weight = torch.randn(4, 8)
    edit, note = solved(Gptq(bits=3), Target(weight, None, broken(8, -5.0)))
    assert note is not None
    assert note.startswith("rtn instead of gptq: ")
    assert torch.equal(edit.encoding.codes, Rtn(bits=3).run(Target(weight)).encoding.codes)


def test_a_solve_that_works_says_nothing() -> None:
    assert solved(Gptq(), Target(torch.randn(4, 8), None, broken(8, 0.5)))[1] is None


def test_one_layer_that_cannot_be_solved_is_reported_and_the_others_go_on(
    samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Statistics.update

    def spoiled(self: Statistics, inputs: Tensor, name: str, original: Tensor | None = None) -> None:
        update(self, inputs, name, original)
        if name == "blocks.1.down":
            gram = self.gram
            gram -= 2 * gram.diagonal().max() * torch.eye(len(gram))
            gram[0, 1] = gram[1, 0] = gram.abs().max()

    monkeypatch.setattr(Statistics, "update", spoiled)
    result = compress.apply(Model(), [Gptq(bits=4)], calibration=samples)
    assert len(result.report.fallbacks) == 1
    assert result.report.fallbacks[0].startswith("blocks.1.down: rtn instead of gptq: ")
    assert result.report.layers["blocks.1.down"]["gptq"]["fallback"].startswith("rtn instead of gptq")
    assert len(result.weights) == 9


def test_damping_so_small_that_a_rank_deficient_matrix_fails_never_ends_the_run(samples: Tensor) -> None:
    result = compress.apply(Model(), [Gptq(bits=4, damping=1e-12)], calibration=samples[:5])
    assert len(result.weights) == 9
    assert all(bool(torch.isfinite(w.dequantize()).all()) for w in result.weights.values())
    for note in result.report.fallbacks:
        assert "damping x" in note or "rtn instead of gptq" in note


class HalfUsed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)


class Unused(Model):
    block = HalfUsed


@pytest.mark.parametrize("pass_", [Gptq(), Wanda(sparsity="2:4"), SparseGpt()], ids=lambda p: p.key)
def test_a_site_that_nothing_ever_reaches_falls_back_and_is_reported(samples: Tensor, pass_: LinearPass) -> None:
    result = compress.apply(Unused(), [pass_], calibration=samples)
    assert len(result.weights) == 12
    assert len(result.report.fallbacks) == 3
    for note in result.report.fallbacks:
        assert "spare: " in note
        assert f"{pass_.stand_in().key} instead of {pass_.key}: no input ever reached this layer" in note


# --- in memory, and streamed from disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        [{"gptq": {"bits": 3, "group_size": 32}}],
        [{"wanda": {"sparsity": "2:4"}}, {"gptq": {"bits": 4}}],
        [{"blockwise": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4}}]}],
        [{"global_magnitude": {"sparsity": 0.5}}, {"rtn": {"bits": 4}}],
    ],
    ids=["gptq", "wanda-gptq", "fused", "global"],
)
def test_a_model_streamed_from_disk_gives_the_weights_of_one_in_memory(
    tiny_llama: LlamaForCausalLM, tiny_folder: Path, tmp_path: Path, tokens: Tensor, passes: list[Any]
) -> None:
    given = tokens if passes[0].keys() != {"global_magnitude"} else None
    calibration = {} if given is None else {"calibration": {"source": "demo"}}
    compress.run({**calibration, "passes": passes}, tiny_folder, tmp_path / "out", calibration=given)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stages = [
        list(stage) if len(stage) > 1 else stage[0] for stage in load_pipeline({**calibration, "passes": passes}).passes
    ]
    resident = compress.apply(tiny_llama, stages, calibration=given)
    assert len(resident.weights) == 14
    for name, weight in resident.weights.items():
        assert torch.equal(streamed.get_submodule(name).dequantize(), weight.dequantize()), name


def test_streaming_is_right_too_where_blocks_are_called_differently(tmp_path: Path, tokens: Tensor) -> None:
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    assert is_chain(model, tokens)  # every other block attends through a window, and is given another mask
    model.save_pretrained(tmp_path / "model")
    pipeline = {"calibration": {"source": "demo"}, "passes": [{"gptq": {"bits": 3}}], "products": "float32"}
    compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    resident = compress.apply(model, [Gptq(bits=3)], calibration=tokens, products="float32")
    for name, weight in resident.weights.items():
        assert torch.equal(streamed.get_submodule(name).dequantize(), weight.dequantize()), name
    blocks = ["model.layers.0", "model.layers.1"]
    assert_same_as_plain(resident, plain(model, blocks, Gptq(bits=3), lambda: model(tokens)))


def runs_of_blocks(model: PreTrainedModel, tokens: Tensor, passes: list[compress.passes.Pass]) -> int:
    """How often blocks run while passes work on a model."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [block.register_forward_pre_hook(counted) for block in model.model.layers]  # type: ignore[union-attr]
    compress.apply(model, passes, calibration=tokens, inplace=True)
    for handle in handles:
        handle.remove()
    return count


GEMMA: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 8,
}  # fmt: skip


def test_blocks_of_several_kinds_run_hardly_more_often_than_those_of_one(
    llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", tokens.shape[1])  # a batch for each sample
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=6, **GEMMA)).eval()
    assert len(set(gemma.config.layer_types)) == 2
    llama = llama_maker(num_hidden_layers=6)
    passes: list[compress.passes.Pass] = [Gptq(bits=4)]
    assert runs_of_blocks(gemma, tokens, passes) <= 1.1 * runs_of_blocks(llama, tokens, passes)


def test_blocks_of_several_kinds_are_learned_one_by_one(tokens: Tensor) -> None:
    torch.manual_seed(4)
    model = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=2, **GEMMA)).eval()
    with torch.no_grad():
        before = model(tokens).logits
    found = {}
    for pass_ in (Rtn(bits=3), compress.FlexRound(bits=3, steps=30)):
        made = compress.apply(model, [pass_], calibration=tokens).model
        with torch.no_grad():
            found[pass_.key] = float((made(tokens).logits - before).square().mean())
    assert found["flexround"] < 0.7 * found["rtn"]


@pytest.mark.parametrize("name", only(["bloom"], ["bloom", "falcon"]))
def test_blocks_that_take_biases_of_every_sample_and_head_in_one_dimension_are_learned(
    name: str, tokens: Tensor
) -> None:
    torch.manual_seed(4)
    sizes = {"vocab_size": 256, "hidden_size": 32, "initializer_range": 0.1}
    model = (
        BloomForCausalLM(BloomConfig(**sizes, n_layer=2, n_head=2))
        if name == "bloom"
        else FalconForCausalLM(FalconConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, alibi=True))
    ).eval()
    with torch.no_grad():
        before = model(tokens).logits
    found = {}
    for pass_ in (Rtn(bits=3), compress.FlexRound(bits=3, steps=40, batch_size=3)):  # of eight samples
        made = compress.apply(model, [pass_], calibration=tokens).model
        with torch.no_grad():
            found[pass_.key] = float((made(tokens).logits - before).square().mean())
    assert found["flexround"] < 0.8 * found["rtn"]


def test_a_streamed_model_is_out_of_memory_again_afterwards(tiny_folder: Path, tokens: Tensor) -> None:
    opened = open_model(tiny_folder)
    context = Context(
        artifact=opened.artifact, given=opened.artifact, ledger=MemoryLedger(), seed=0, dtype=torch.float32,
        products="float32", resident=False, bars=Bars(),
    )  # fmt: skip
    _, records = run_passes(context, 0, [Gptq()], [tokens], "key")
    assert len(records) == 14
    assert all(p.is_meta for p in context.graph.model.parameters())


def test_a_source_in_memory_is_read_as_a_copy(tiny_llama: LlamaForCausalLM) -> None:
    source = ModuleSource(tiny_llama)
    source.read("lm_head.weight").zero_()
    assert bool(tiny_llama.lm_head.weight.any())
