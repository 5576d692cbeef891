"""Learning block by block inside a sweep: what is learned from, what is left alone, streaming and resuming."""

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import contents, prepare, run
from conftest import make_llama
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from wirings import WIDTH, Block, Model, SkipBlock, SkipInside, SkipOutside

import compress
from compress.calibration import activation_cache as activations
from compress.calibration import reconstruct
from compress.config.pipeline import Calibration, Pipeline
from compress.engine.ledger import FolderLedger
from compress.errors import ConfigError, SolveError, UnsupportedModelError
from compress.models import graph as graphs
from compress.passes import AdaRound, FlexRound, Jlcm, LowRank, Magnitude, Override, Pass, PerpReconstruct, Rtn, Wanda
from compress.passes.base import Block as Given
from compress.passes.base import Edit
from compress.passes.quantize.learned import LearnedPass
from compress.planning import plan
from compress.runtime.linear import PackedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 3}


class MeanInside(Model):
    """Every block is also given a number that differs from batch to batch."""

    block = SkipBlock

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mean = x.mean()
        for block in self.blocks:
            x = block(x, mean)
        return x


class Overflowing(Block):
    overflows = False

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return super().forward(x) * (torch.inf if self.overflows else 1.0)


class LastOverflows(Model):
    """The outputs of the last block are infinite."""

    block = Overflowing

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].overflows = True  # type: ignore[assignment]


def make_sequential() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Block(), nn.Tanh(), nn.Linear(WIDTH, 2 * WIDTH))


def make_gpt2() -> PreTrainedModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5))


def codes(result: compress.Result) -> dict[str, Tensor]:
    return {name: w.encoding.codes for name, w in result.weights.items()}


# --- what is learned from ---------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a pass was given for one block; all samples in one tensor."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor | None]
    inputs: Tensor
    original_inputs: Tensor
    outputs: Tensor
    remade: list[tuple[list[int], Tensor]]  # some samples, and what the block makes of them with the given weights
    sizes: list[int]  # of the batches


SUBSETS = [[0], [3], [5, 1, 4], [7, 6, 5, 4, 3, 2, 1, 0], [2, 2]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Everything that passes which learn were given, block after block."""
    found: list[Seen] = []
    learn = LearnedPass.run

    def looking(self: LearnedPass, block: Given) -> Iterator[tuple[str, Edit]]:
        data = block.data
        weights = {n: t.weight.clone() for n, t in block.targets.items()}
        whole = [torch.cat(list(s.batches)).clone() for s in (data.inputs, data.original_inputs, data.outputs)]
        remade = [(n, data.call(weights, data.original_inputs.take(torch.tensor(n)), torch.tensor(n))) for n in SUBSETS]
        sizes = [len(b) for b in data.inputs.batches]
        found.append(Seen(weights, {n: t.mask for n, t in block.targets.items()}, *whole, remade, sizes))
        return learn(self, block)

    monkeypatch.setattr(LearnedPass, "run", looking)
    return found


@torch.no_grad()
def passing_through(model: nn.Module, names: list[str], data: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(what arrives at, what leaves) each of the blocks in a plain run of the whole model."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        arrived = (*args, *kwargs.values())[0]
        found.append((arrived.clone(), (out[0] if isinstance(out, tuple) else out).clone()))

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names]
    model(data)
    for handle in handles:
        handle.remove()
    return found


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (make_llama, ["model.layers.0", "model.layers.1"]),
    "GPT-2": (make_gpt2, ["transformer.h.0", "transformer.h.1"]),
    "blocks": (Model, ["blocks.0", "blocks.1", "blocks.2"]),
    "sequential": (make_sequential, ["0", "2", "4"]),
    "one block": (Block, [""]),
}
each_model = pytest.mark.parametrize(
    ("make", "names"),
    only([MODELS[name] for name in ("llama", "sequential", "one block")], MODELS.values()),
    ids=MODELS,
)


def data_for(model: nn.Module, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if isinstance(model, PreTrainedModel):
        return torch.randint(256, (count, 24), generator=generator)
    return torch.randn(count, 5, WIDTH, generator=generator)


@each_model
@pytest.mark.parametrize("rows", only([3], [8, 3]))  # in a batch of the sweep
@pytest.mark.parametrize("before", [[], [Magnitude(sparsity=0.6)]], ids=["first", "after pruning"])
def test_a_block_is_fed_by_the_compressed_model_and_learns_the_outputs_of_the_original_one_on_its_own_inputs(
    make: Callable[[], nn.Module],
    names: list[str],
    rows: int,
    before: list[Pass],
    seen: list[Seen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make().eval()
    data = data_for(model)
    at_once = rows * data.shape[1] if isinstance(model, PreTrainedModel) else rows
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", at_once)
    passes = [*before, FlexRound(bits=2, **QUICK)]
    result = compress.apply(model, passes, calibration=data, products="float32")
    original, compressed = passing_through(model, names, data), passing_through(result.model, names, data)
    assert len(seen) == len(names)
    assert all(s.sizes == ([8] if rows == 8 else [3, 3, 2]) for s in seen)
    for given, (arrived, left), (arrived_compressed, _) in zip(seen, original, compressed, strict=True):
        assert close(given.original_inputs, arrived)
        assert close(given.outputs, left)
        assert close(given.inputs, arrived_compressed)
    if len(names) > 1:
        assert not close(seen[-1].inputs, seen[-1].original_inputs)
    for given in seen:  # whichever samples it is called with, whatever batches they were in
        for numbers, made in given.remade:
            assert close(made, given.outputs[numbers]) == (not before)


@each_model
def test_learning_leaves_the_model_closer_to_the_original_than_rounding(
    make: Callable[[], nn.Module], names: list[str]
) -> None:
    model = make().eval()
    data = data_for(model, 32)
    pass_ = FlexRound(bits=3, steps=30)
    learned = compress.apply(model, [pass_], calibration=data)
    rounded = compress.apply(model, [pass_.stand_in()])
    wanted = passing_through(model, names, data)[-1][1]

    def lost(result: compress.Result) -> float:
        return float((passing_through(result.model, names, data)[-1][1] - wanted).square().sum())

    assert lost(learned) < 0.9 * lost(rounded)
    for notes in learned.report.layers.values():
        assert notes["flexround"]["block_error"] <= notes["flexround"]["block_error_start"]


def test_the_original_is_that_of_the_source_where_a_layer_in_front_of_the_blocks_was_compressed(
    seen: list[Seen], samples: Tensor
) -> None:
    model = Model()
    passes = [Rtn(bits=2, include=("embed",)), FlexRound(bits=3, **QUICK)]
    compress.apply(model, passes, calibration=samples, products="float32")
    arrived, left = passing_through(model, ["blocks.0"], samples)[0]
    assert not close(seen[0].inputs, arrived)
    assert close(seen[0].original_inputs, arrived)
    assert close(seen[0].outputs, left)


def test_the_inputs_of_a_block_depend_on_what_was_learned_before_it(samples: Tensor) -> None:
    everything = compress.apply(Model(), [FlexRound(bits=2, **QUICK)], calibration=samples)
    second_only = compress.apply(Model(), [FlexRound(bits=2, include=("blocks.1.*",), **QUICK)], calibration=samples)
    assert not torch.equal(codes(everything)["blocks.1.up"], codes(second_only)["blocks.1.up"])


def test_one_seed_gives_one_result_and_another_seed_another(samples: Tensor) -> None:
    first, again, other = (
        codes(compress.apply(Model(), [FlexRound(bits=3, steps=5)], calibration=samples, seed=seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(c, again[n]) for n, c in first.items())
    assert any(not torch.equal(c, other[n]) for n, c in first.items())


def test_a_bfloat16_model_learns_too(tokens: Tensor) -> None:
    result = compress.apply(make_llama().bfloat16(), [FlexRound(bits=3, steps=40)], calibration=tokens)
    for notes in result.report.layers.values():
        assert notes["flexround"]["block_error"] < notes["flexround"]["block_error_start"]


# --- together with others ---------------------------------------------------------------------------------------------


def test_fused_with_wanda_it_gets_the_masked_weights_and_keeps_the_zeros(seen: list[Seen], tokens: Tensor) -> None:
    model = make_llama()
    wanda = Wanda(sparsity="2:4")
    result = compress.apply(model, [[wanda, FlexRound(bits=4, **QUICK)]], calibration=tokens)
    alone = compress.apply(model, [wanda], calibration=tokens)
    assert len(seen) == 2
    for given in seen:
        assert len(given.weights) == 7
        for name, weight in given.weights.items():
            kept = given.masks[name]
            assert kept is not None
            assert torch.equal(weight, model.get_submodule(name).weight * kept)
            made = result.weights[name]
            assert made.kind == "sparse-quantized"
            assert torch.equal(made.mask, kept)
            assert not made.dequantize()[~kept].any()
            assert not result.model.get_submodule(name).weight[~kept].any()
            if name.startswith("model.layers.0"):
                assert torch.equal(kept, alone.weights[name].mask)
    assert result.report.layers["model.layers.1.mlp.up_proj"].keys() == {"wanda", "flexround"}


def test_fused_with_a_pass_on_other_layers_the_block_runs_with_what_that_pass_made(
    seen: list[Seen], samples: Tensor
) -> None:
    passes = [Rtn(bits=2, include=("*.up",)), FlexRound(bits=3, include=("*.gate",), **QUICK)]
    result = compress.apply(Model(), [passes], calibration=samples, products="float32")
    assert [list(s.weights) for s in seen] == [[f"blocks.{i}.gate"] for i in range(3)]
    rounded = Model()
    rounded.blocks[0].up.weight.data = result.weights["blocks.0.up"].dequantize()
    with torch.no_grad():
        expected = rounded.blocks[0](seen[0].original_inputs)
    for numbers, made in seen[0].remade:
        assert close(made, expected[numbers])
        assert not close(made, seen[0].outputs[numbers])


@pytest.mark.parametrize("pass_", [FlexRound(bits=3, **QUICK), AdaRound(bits=3, **QUICK)], ids=lambda p: p.key)
def test_layers_that_are_not_included_stay_untouched(pass_: LearnedPass, tokens: Tensor) -> None:
    model = make_llama()
    chosen = replace(pass_, include=("*.layers.1.mlp.*",), exclude=("*.up_proj",))
    result = compress.apply(model, [chosen], calibration=tokens)
    done = {f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "down")}
    assert result.weights.keys() == done
    before = dict(model.named_parameters())
    for name, value in result.model.named_parameters():
        assert torch.equal(value, before[name]) == (name.removesuffix(".weight") not in done), name


@pytest.mark.parametrize(
    ("objective", "inplace"),
    only([("block", False), ("layer", True)], itertools.product(["block", "layer"], [False, True])),
)
def test_no_gradient_and_no_hook_is_left_on_the_model(objective: Any, inplace: bool, tokens: Tensor) -> None:
    model = make_llama()
    assert model.model.norm.weight.requires_grad
    pass_ = FlexRound(bits=3, objective=objective, **QUICK)
    result = compress.apply(model, [pass_], calibration=tokens, inplace=inplace)
    assert (result.model is model) == inplace
    for made in (model, result.model):
        assert all(p.grad is None and p.is_leaf for p in made.parameters())
        for module in made.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    assert torch.is_grad_enabled()
    for weight in result.weights.values():
        assert not any(t.requires_grad for t in (weight.encoding.codes, weight.encoding.scale))


# --- activations on disk, models on disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, 2 * 3 * 32 * 64 * 4])
@pytest.mark.parametrize("inputs", only(["mix"], ["compressed", "mix"]))
def test_activations_in_a_mapped_file_give_the_bits_of_those_in_memory(
    largest: int, inputs: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", 3 * 32)  # batches of 3, 3 and 2 samples
    pass_ = FlexRound(bits=3, inputs=inputs, **QUICK)
    one = compress.apply(make_llama(), [pass_], calibration=tokens)
    mapped: list[Tensor] = []
    real = activations._mapped

    def counted(hidden: Tensor) -> Tensor:
        mapped.append(real(hidden))
        return mapped[-1]

    monkeypatch.setattr(activations, "_mapped", counted)
    monkeypatch.setattr(activations, "LARGEST_BUFFER", largest)
    other = compress.apply(make_llama(), [pass_], calibration=tokens)
    assert {len(m) for m in mapped} == ({3, 2} if largest == 0 else {2}), "only what is beyond the limit"
    for name, weight in one.weights.items():
        assert torch.equal(weight.encoding.codes, other.weights[name].encoding.codes)
        assert torch.equal(weight.encoding.scale, other.weights[name].encoding.scale)


ON_DISK: dict[str, list[Any]] = {
    "flexround": [FlexRound(bits=3, group_size=32, **QUICK)],
    "low rank, mixed inputs": [FlexRound(bits=4, rank=2, inputs="mix", **QUICK)],
    "adaround by layer": [AdaRound(bits=3, symmetric=True, objective="layer", **QUICK)],
    "after pruning": [Magnitude(sparsity=0.5), FlexRound(bits=4, **QUICK)],
    "fused": [[Wanda(sparsity="2:4"), FlexRound(bits=4, **QUICK)]],
}


@pytest.mark.parametrize(
    "passes", only([ON_DISK["adaround by layer"], ON_DISK["fused"]], ON_DISK.values()), ids=ON_DISK.keys()
)
@pytest.mark.parametrize("make", only([make_llama], [make_llama, make_gpt2]), ids=["llama", "GPT-2"])
def test_a_model_streamed_from_disk_ends_packed_with_the_bits_and_logits_of_one_in_memory(
    make: Callable[[], PreTrainedModel], passes: list[Any], tmp_path: Path, tokens: Tensor
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "model")
    stages = tuple(tuple(p) if isinstance(p, list) else (p,) for p in passes)
    compress.run(Pipeline(passes=stages), tmp_path / "model", tmp_path / "out", calibration=tokens)
    resident = compress.apply(model, passes, calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = {name: m for name, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == resident.weights.keys()
    for name, module in packed.items():
        assert torch.equal(module.dequantize(), resident.weights[name].dequantize()), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, resident.model(tokens).logits)


RESUMED = """\
calibration: {source: calibration.txt, samples: 6, length: 32}
passes:
  - flexround: {scheme: w3g32, steps: 3, batch_size: 2, inputs: mix}
"""


def test_killed_between_blocks_that_learn_the_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, RESUMED, num_hidden_layers=4)
    assert run(whole, "model") == 0
    for files, blocks in ((2, 1), (2, 3)):  # the first file of all holds the row of the original
        assert run(killed, "model", kill_after=files) == -signal.SIGKILL
        assert not (killed / "out").exists()
        assert len(list((killed / "out.work").glob("s00-b*.safetensors"))) == blocks
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


# --- what is refused, and what fails ----------------------------------------------------------------------------------


def test_blocks_that_get_other_arguments_from_batch_to_batch_are_refused(
    samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", 6)
    with pytest.raises(UnsupportedModelError, match=r"other arguments from batch to batch.* such as gptq"):
        compress.apply(MeanInside(), [FlexRound(**QUICK)], calibration=samples)


@pytest.mark.parametrize("at_once", [6, 2048])
def test_a_sample_is_never_learned_with_the_arguments_of_another(
    at_once: int, samples: Tensor, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", at_once)
    with suppress(UnsupportedModelError):  # refusing is right too
        compress.apply(SkipInside(), [FlexRound(**QUICK)], calibration=samples, products="float32")
    for given in seen:
        for numbers, made in given.remade:
            assert close(made, given.outputs[numbers])


def test_a_block_whose_outputs_are_not_finite_is_rounded_and_the_others_learn(samples: Tensor) -> None:
    pass_ = FlexRound(bits=3, steps=20)
    result = compress.apply(LastOverflows(), [pass_], calibration=samples)
    rounded = codes(compress.apply(Model(), [pass_.stand_in()]))
    names = {f"blocks.2.{leaf}" for leaf in ("up", "gate", "down")}
    assert {note.split(":")[0] for note in result.report.fallbacks} == names
    for name, made in codes(result).items():
        notes = result.report.layers[name]["flexround"]
        assert torch.equal(made, rounded[name]) == (name in names)
        if name in names:
            assert notes["fallback"] == "rtn instead of flexround: the block's outputs are not finite"
        else:
            assert "fallback" not in notes
            assert notes["best_step"] > 0


def failing(monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    """Learning one block fails."""
    learn = LearnedPass.run

    def run_(self: LearnedPass, given: Given) -> Iterator[tuple[str, Edit]]:
        if any(name.startswith(block) for name in given.targets):
            raise SolveError("a test")
        return learn(self, given)

    monkeypatch.setattr(LearnedPass, "run", run_)


def test_where_learning_fails_each_layer_is_rounded_with_its_own_options(
    samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "blocks.1")
    overrides = (Override("*.down", {"bits": 8}), Override("*.gate", {"bits": 4, "group_size": 16}))
    pass_ = FlexRound(bits=3, overrides=overrides, **QUICK)
    result = compress.apply(Model(), [pass_], calibration=samples)
    rounded = compress.apply(Model(), [replace(pass_.stand_in(), overrides=overrides)])
    for leaf, bits in (("up", 3), ("gate", 4), ("down", 8)):
        name = f"blocks.1.{leaf}"
        assert result.weights[name].encoding.bits == bits
        assert torch.equal(codes(result)[name], codes(rounded)[name])
        assert result.report.layers[name]["flexround"]["fallback"] == "rtn instead of flexround: a test"


def test_a_streamed_model_goes_on_after_a_failure_as_one_in_memory_does(
    tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "model.layers.0")
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    pass_ = FlexRound(bits=2, **QUICK)
    compress.run(Pipeline(passes=((pass_,),)), tmp_path / "model", tmp_path / "out", calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    resident = compress.apply(model, [pass_], calibration=tokens)
    assert len(resident.report.fallbacks) == 7
    for name, weight in resident.weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), weight.dequantize()), name


class HalfUsed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)


class Unused(Model):
    block = HalfUsed


def test_a_layer_that_nothing_ever_reaches_is_rounded_and_the_rest_of_its_block_learns(samples: Tensor) -> None:
    pass_ = FlexRound(bits=3, steps=20)
    result = codes(compress.apply(Unused(), [pass_], calibration=samples))
    nearest = codes(compress.apply(Unused(), [pass_.stand_in()]))
    assert len(result) == 12
    for i in range(3):
        assert torch.equal(result[f"blocks.{i}.spare"], nearest[f"blocks.{i}.spare"])
        assert not torch.equal(result[f"blocks.{i}.up"], nearest[f"blocks.{i}.up"])


def test_by_layer_a_layer_that_nothing_reaches_is_rounded_and_the_others_learn(samples: Tensor) -> None:
    pass_ = FlexRound(bits=3, steps=20, objective="layer")
    result = compress.apply(Unused(), [pass_], calibration=samples)
    assert result.report.fallbacks == []
    nearest = codes(compress.apply(Unused(), [pass_.stand_in()]))
    for i in range(3):
        assert torch.equal(codes(result)[f"blocks.{i}.spare"], nearest[f"blocks.{i}.spare"])
        assert not torch.equal(codes(result)[f"blocks.{i}.up"], nearest[f"blocks.{i}.up"])


def test_by_layer_blocks_need_not_feed_one_another(samples: Tensor) -> None:
    pass_ = FlexRound(bits=3, steps=20, objective="layer")
    result = compress.apply(SkipOutside(), [pass_], calibration=samples)
    assert all(notes["flexround"]["best_step"] > 0 for notes in result.report.layers.values())


@pytest.mark.parametrize("option", ["steps", "batch_size", "inputs", "objective"])
def test_what_a_block_has_in_common_cannot_differ_from_layer_to_layer(option: str, samples: Tensor) -> None:
    overrides = (Override("*.up", {option: getattr(FlexRound(), option)}),)
    with pytest.raises(ConfigError, match=rf"overrides\[0\].{option}: is the same for all layers"):
        compress.apply(Model(), [FlexRound(overrides=overrides)], calibration=samples)


def test_the_memory_estimate_of_a_plan_counts_what_is_learned() -> None:
    model = make_llama(hidden_size=256, intermediate_size=1024)
    graph = graphs.find(model)
    dtypes = {name: tensor.dtype for name, tensor in graph.tensors()}

    def estimated(pass_: Pass) -> int:
        pipeline = Pipeline(passes=((pass_,),), calibration=Calibration(samples=8, length=32))
        return plan.make(pipeline, graph, dtypes).memory.total

    weights = sum(rows * columns for rows, columns in (site.shape for site in graph.in_block(0)))
    assert estimated(FlexRound()) - estimated(Rtn()) > 10 * 4 * weights


CUT_SHORT: list[Pass] = [
    FlexRound(bits=3, steps=20, batch_size=3, inputs="mix"),
    Jlcm(bits=3, steps=20, batch_size=3),
    LowRank(ratio=0.5, steps=20, batch_size=3),
    PerpReconstruct(steps=20, batch_size=3, granularity="half_block", train=("bias", "norm", "full")),
]


@pytest.mark.parametrize("pass_", only(CUT_SHORT[:1], CUT_SHORT), ids=lambda p: p.key)
def test_learning_that_is_cut_short_inside_a_block_goes_on_there_and_ends_bit_identical(
    pass_: Pass, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    steps = Pipeline(passes=((Magnitude(sparsity=0.5),), (pass_,)) if pass_.key == "perp_reconstruct" else ((pass_,),))
    monkeypatch.setattr(reconstruct, "SPACING", 0.0)
    counted: list[str] = []
    step, save = torch.optim.Adam.step, FolderLedger.commit_tensors

    def counting(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        counted.append("step")
        return step(self, *args, **kwargs)

    def cut(self: FolderLedger, unit: str, key: str, tensors: dict[str, Tensor]) -> None:
        save(self, unit, key, tensors)
        counted.append(unit)
        if len([each for each in counted if each != "step"]) == 13:  # of ten for each block, or for each half of one
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", counting)
    compress.run(steps, tmp_path / "model", tmp_path / "whole", calibration=tokens)
    whole = counted.count("step")
    counted.clear()
    with monkeypatch.context() as patched:
        patched.setattr(FolderLedger, "commit_tensors", cut)
        with pytest.raises(KeyboardInterrupt):
            compress.run(steps, tmp_path / "model", tmp_path / "parts", calibration=tokens)
    assert list((tmp_path / "parts.work").glob("*-training*"))
    compress.run(steps, tmp_path / "model", tmp_path / "parts", calibration=tokens)
    assert counted.count("step") == whole, "no step is done twice"
    for file in ("compress.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
