"""Taking blocks out: the properties of the papers, and a result that is a model of its kind like any other."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wirings
from children import FILES, killed_again_and_again, prepare
from commands import compress_command, make_text_model, write_pipeline
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import compress
from compress import Eora, FlexRound, Gptq, LayerDrop, Magnitude, Perp, Rtn, Wanda
from compress.checkpoint import opening
from compress.config.reading import parse
from compress.errors import ConfigError, NonFiniteError, UnsupportedModelError
from compress.passes.interface import Depth
from compress.passes.prune.layer_drop import angular, influence
from compress.planning import plan

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = "calibration: {source: demo, samples: 2, length: 32}\n"


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def passed(model: nn.Module, blocks: nn.ModuleList, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every block is given and puts out, seen from outside."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: Any, output: Any) -> None:
        found.append((args[0].double(), (output[0] if isinstance(output, tuple) else output).double()))

    handles = [block.register_forward_hook(see) for block in blocks]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def cosines(before: Tensor, after: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(before, after, dim=-1)


def dropped(model: nn.Module, samples: Tensor, **options: Any) -> list[int]:
    result = compress.apply(model, [LayerDrop(**options)], samples, products="float32")
    return list(result.report.dropped[0]["blocks"])


def chosen(distances: Callable[[list[int], int], dict[int, float]], **options: Any) -> list[tuple[int, ...]]:
    """What the pass takes out of blocks 0..4 whose distances depend on those that are left."""
    left = list(range(5))
    steps = []
    for gone in LayerDrop(**options).run(Depth(lambda count, _, __: distances(left, count))):
        steps.append(tuple(left[i] for i in gone))
        left[:] = [block for i, block in enumerate(left) if i not in gone]
    return steps


# --- what goes --------------------------------------------------------------------------------------------------------


def test_no_blocks_changes_nothing(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [LayerDrop(blocks=0)], evaluation=tokens)
    assert torch.equal(logits(result.model, tokens), logits(tiny_llama, tokens))
    assert result.report.rows[-1].kl == 0
    assert result.report.rows[-1].bytes == result.report.rows[0].bytes


@pytest.mark.parametrize("place", only([0, 3], range(4)))
@pytest.mark.parametrize("criterion", ["influence", "angular"])
def test_a_block_that_adds_nothing_goes_first_and_the_model_says_the_same(
    criterion: str, place: int, llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    block = model.model.layers[place]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    result = compress.apply(model, [LayerDrop(criterion=criterion)], tokens, evaluation=tokens)
    (note,) = result.report.dropped
    assert note["blocks"] == [place]
    assert note["distances"][0][f"model.layers.{place}"] == 0
    assert torch.equal(logits(result.model, tokens), logits(model, tokens))
    assert result.report.rows[-1].kl == pytest.approx(0, abs=1e-7)


def test_influence_is_one_minus_the_mean_cosine_over_all_tokens(
    llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    result = compress.apply(model, [LayerDrop()], tokens, products="float32")
    expected = [float(1 - cosines(*states).mean()) for states in passed(model, model.model.layers, tokens)]
    found = result.report.dropped[0]["distances"][0]
    assert list(found) == [f"model.layers.{i}" for i in range(4)]
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    assert result.report.dropped[0]["blocks"] == [expected.index(min(expected))]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_angle_is_taken_at_the_last_token_between_the_ends_of_a_run(
    count: int, llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    states = passed(model, model.model.layers, tokens)
    expected = [
        float((torch.arccos(cosines(states[i][0][:, -1], states[i + count - 1][1][:, -1])) / torch.pi).mean())
        for i in range(5 - count)
    ]
    result = compress.apply(model, [LayerDrop(blocks=count, criterion="angular")], tokens, products="float32")
    assert list(result.report.dropped[0]["distances"][0].values()) == pytest.approx(expected, abs=1e-6)
    first = expected.index(min(expected))
    assert result.report.dropped[0]["blocks"] == list(range(first, first + count))


def test_greedy_measures_again_in_the_model_that_is_left(
    llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    result = compress.apply(model, [LayerDrop(blocks=2)], tokens, products="float32")
    first, second = result.report.dropped[0]["distances"]
    by_hand = compress.apply(model, [LayerDrop(), LayerDrop()], tokens, products="float32")
    assert [list(n["distances"][0].values()) for n in by_hand.report.dropped] == [
        list(first.values()),
        list(second.values()),
    ]
    assert torch.equal(logits(by_hand.model, tokens), logits(result.model, tokens))
    assert list(second) == [name for name in first if name != min(first, key=first.__getitem__)]


def test_one_block_at_a_time_spares_a_block_that_matters_once_its_twin_is_gone() -> None:
    def distances(left: list[int], _: int) -> dict[int, float]:
        found = {0: 0.9, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.8}
        if 1 not in left:
            found[2] = 0.7
        return {i: found[block] for i, block in enumerate(left)}

    assert chosen(distances, blocks=2) == [(1,), (3,)]
    assert chosen(distances, blocks=2, greedy=False) == [(1, 2)]


def test_a_run_goes_together_and_of_equal_ones_the_first() -> None:
    assert chosen(lambda _, count: {0: 0.5, 1: 0.2, 2: 0.2}, blocks=3, criterion="angular") == [(1, 2, 3)]
    assert chosen(lambda left, _: dict.fromkeys(range(len(left)), 0.5), blocks=2) == [(0,), (1,)]


def test_distances_of_equal_and_of_opposite_states() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert not influence(x, x).any()
    assert not angular(x, x).any()
    assert not influence(torch.zeros_like(x), torch.zeros_like(x)).any()
    assert influence(x, -x) == pytest.approx(torch.full((3, 5), 2.0))
    assert angular(x, -x) == pytest.approx(torch.ones(3, 5))
    assert influence(x, torch.zeros_like(x)) == pytest.approx(torch.ones(3, 5))
    assert influence(x, 7 * x) == pytest.approx(torch.zeros(3, 5), abs=1e-12)


def test_blocks_that_are_excluded_stay(llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor) -> None:
    model = llama_maker(num_hidden_layers=4)
    every = dropped(model, tokens)
    other = dropped(model, tokens, exclude=(f"*.layers.{every[0]}.*",))
    assert other != every
    assert dropped(model, tokens, include=("*.layers.3.*", "*.layers.0.mlp.*")) == [3], "block 0 is not whole"
    assert dropped(model, tokens, blocks=2, exclude=("*.layers.0.*", "*.layers.3.*")) == [1, 2]


def test_of_a_module_whose_blocks_are_no_chain_the_states_are_those_of_the_whole_model() -> None:
    model, x = wirings.SkipOutside(), torch.randn(6, 5, wirings.WIDTH)
    for count in (1, 2):
        options = {"blocks": count, "criterion": "angular"}
        result = compress.apply(model, [LayerDrop(**options)], x, products="float32")
        states = passed(model, model.blocks, x)
        expected = [
            float((torch.arccos(cosines(states[i][0], states[i + count - 1][1])) / torch.pi).mean())
            for i in range(4 - count)
        ]
        found = result.report.dropped[0]["distances"][0]
        assert list(found.values()) == pytest.approx(expected, abs=1e-6)
        shorter = copy.deepcopy(model)
        for i in reversed(result.report.dropped[0]["blocks"]):
            del shorter.blocks[i]
        assert torch.equal(logits(result.model, x), logits(shorter, x))
        assert len(model.blocks) == 3, "the caller's model is as it was"


@pytest.mark.parametrize("wiring", [wirings.Model, wirings.SkipOutside, wirings.SkipInside])
def test_every_wiring_goes_on_without_the_block(wiring: type[wirings.Model]) -> None:
    model, x = wiring(), torch.randn(6, 5, wirings.WIDTH)
    model.blocks[1].down.weight.data.mul_(1e-3)
    model.blocks[1].down.bias.data.zero_()
    result = compress.apply(model, [LayerDrop(), Gptq(bits=8)], x, products="float32")
    assert result.report.dropped[0]["blocks"] == [1]
    assert len(result.model.blocks) == 2
    assert set(result.weights) == {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("up", "gate", "down")}
    shorter = copy.deepcopy(model)
    del shorter.blocks[1]
    expected = compress.apply(shorter, [Gptq(bits=8)], x, products="float32")
    assert torch.equal(logits(result.model, x), logits(expected.model, x))


def test_of_two_blocks_in_a_sequential_the_number_follows() -> None:
    model, x = nn.Sequential(*(wirings.Block() for _ in range(4))), torch.randn(8, wirings.WIDTH)
    gone = dropped(model, x)
    result = compress.apply(model, [LayerDrop()], x, products="float32")
    kept = [block for i, block in enumerate(model) if i not in gone]
    assert [name for name, _ in result.model.named_children()] == ["0", "1", "2"]
    assert torch.equal(result.model(x), nn.Sequential(*kept)(x))


class Numbered(wirings.Block):
    layer_idx = 0


def test_blocks_of_a_plain_module_are_told_their_new_numbers() -> None:
    model = wirings.Model()
    model.blocks = nn.ModuleList([Numbered() for _ in range(4)])
    for i, block in enumerate(model.blocks):
        block.layer_idx = i  # type: ignore[assignment]
    result = compress.apply(model, [LayerDrop(blocks=2)], torch.randn(6, wirings.WIDTH))
    assert [block.layer_idx for block in result.model.blocks] == [0, 1]


class Convolved(nn.Module):
    def __init__(self, before: int = 6, after: int = 6, stride: int = 1):
        super().__init__()
        self.inner = nn.Conv2d(before, after, 3, stride, 1)
        self.skip = nn.Conv2d(before, after, 1, stride)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + 0.1 * self.norm(self.inner(torch.relu(x)))


def test_of_convolutions_channels_are_compared_at_every_place() -> None:
    model, x = nn.Sequential(*(Convolved() for _ in range(3))).eval(), torch.randn(8, 6, 10, 10)
    result = compress.apply(model, [LayerDrop()], x, products="float32")
    expected, now = [], x
    for block in model:
        before, now = now, block(now).detach()
        expected.append(float(1 - torch.nn.functional.cosine_similarity(before, now, dim=1).mean()))
    assert list(result.report.dropped[0]["distances"][0].values()) == pytest.approx(expected, abs=1e-5)
    assert len(result.model.state_dict()) == len(model.state_dict()) * 2 // 3


def test_a_block_that_changes_the_shape_stays() -> None:
    model, x = nn.Sequential(*(Convolved(stride=s) for s in (2, 1, 2))).eval(), torch.randn(8, 6, 16, 16)
    assert dropped(model, x) == [1]
    with pytest.raises(UnsupportedModelError, match="only 1 blocks of Sequential output"):
        compress.apply(model, [LayerDrop(blocks=2, greedy=False)], x)
    with pytest.raises(UnsupportedModelError, match="output hidden states of the shape of their inputs"):
        compress.apply(model, [LayerDrop(exclude=("1.*",))], x)


# --- what is left is a model like any other ---------------------------------------------------------------------------


def qwen(**changes: Any) -> Qwen2ForCausalLM:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    options = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
               "num_attention_heads": 2, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 8,
               "layer_types": kinds, "initializer_range": 0.2, **changes}  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**options))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    options = {"vocab_size": 256, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64, "initializer_range": 0.2,
               "bos_token_id": 0, "eos_token_id": 0, **changes}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**options))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", only(["qwen2"], ["llama", "llama tied", "gpt2", "qwen2"]))
def test_the_written_folder_loads_and_its_cache_is_numbered_anew(
    family: str, llama_maker: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor
) -> None:
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: llama_maker(num_hidden_layers=4),
        "llama tied": lambda: llama_maker(num_hidden_layers=4, tie_word_embeddings=True),
        "gpt2": gpt2,
        "qwen2": qwen,
    }
    model = makers[family]()
    folder = saved(model, tmp_path / "model")
    section = {"passes": [{"layer_drop": {"blocks": 2}}]}
    report = compress.run(section, folder, tmp_path / "out", calibration=tokens, evaluation=tokens)
    gone = report.dropped[0]["blocks"]
    assert report.verified["max_logit_difference"] == 0
    exports = {"passes": [*section["passes"], {"rtn": {"bits": 3}}, {"eora": {"rank": 2}}], "export": ["hf", "peft"]}
    exported = compress.run(exports, folder, tmp_path / "more", calibration=tokens, evaluation=tokens)
    assert exported.verified["hf"]["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 2
    there = json.loads((tmp_path / "out" / "config.json").read_text())
    assert there["n_layer" if family == "gpt2" else "num_hidden_layers"] == 2
    for exported_to in ("hf", "peft/base"):
        plain = json.loads((tmp_path / "more" / exported_to / "config.json").read_text())
        assert {**plain, "dtype": there["dtype"]} == {k: v for k, v in there.items() if k != "quantization_config"}
    if family == "qwen2":
        assert there["layer_types"] == [t for i, t in enumerate(model.config.layer_types) if i not in gone]
    numbers = [m.layer_idx for m in loaded.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert sorted(set(numbers)) == [0, 1]
    # The model in memory without the blocks, and the same from Python.
    applied = compress.apply(model, [LayerDrop(blocks=2)], tokens)
    assert applied.report.dropped == report.dropped
    assert torch.equal(logits(applied.model, tokens), logits(loaded, tokens))
    assert applied.model.config.num_hidden_layers == 2
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, plain, own = (
        m.generate(tokens[:2, :8], use_cache=cache, **options)
        for m, cache in ((loaded, True), (loaded, False), (applied.model, True))
    )
    assert cached.shape[1] == 20
    assert torch.equal(cached, plain)
    assert torch.equal(cached, own)


def test_what_is_kept_is_bit_for_bit_the_original_and_counts_add_up(
    llama_maker: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    folder = saved(model, tmp_path / "model")
    report = compress.run({"passes": ["layer_drop"]}, folder, tmp_path / "out", calibration=tokens)
    (gone,) = report.dropped[0]["blocks"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(p.numel() for p in after.values()) == sum(p.numel() for p in before.values()) - block
    assert report.rows[0].bytes - report.rows[-1].bytes == 4 * block
    kept = [i for i in range(4) if i != gone]
    for name, value in after.items():
        old = name
        for new in (0, 1, 2):
            old = name.replace(f"layers.{new}.", f"layers.{kept[new]}.") if f"layers.{new}." in name else old
        assert torch.equal(value, before[old])


def test_an_image_classifier_loses_a_block_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=16,
                       patch_size=4, num_labels=5, initializer_range=0.2)  # fmt: skip
    folder = saved(ViTForImageClassification(config), tmp_path / "model")
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    report = compress.run(
        {"passes": [{"layer_drop": {"blocks": 2, "criterion": "angular"}}, {"rtn": {"bits": 8}}]},
        folder,
        tmp_path / "out",
        calibration=images,
        evaluation=(images, labels),
    )
    assert report.verified["max_logit_difference"] == 0
    assert report.rows[-1].accuracy is not None
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_an_encoder_in_memory_loses_a_block(tokens: Tensor) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    result = compress.apply(BertForSequenceClassification(config), [LayerDrop()], tokens)
    assert result.model.config.num_hidden_layers == len(result.model.bert.encoder.layer) == 2
    assert logits(result.model, tokens).shape == (8, 2)


# --- beside other passes ----------------------------------------------------------------------------------------------


def test_what_earlier_passes_made_goes_by_the_new_names(
    llama_maker: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    first = [Wanda(sparsity=0.5), Perp(train=("bias",), new_biases=True, steps=2), Rtn(bits=4)]
    whole = compress.apply(model, first, tokens)
    result = compress.apply(model, [*first, LayerDrop(blocks=2)], tokens, evaluation=tokens)
    kept = [i for i in range(4) if i not in result.report.dropped[0]["blocks"]]
    assert set(result.weights) == {n for n in whole.weights if ".0." in n or ".1." in n}
    for name, weight in result.weights.items():
        old = name.replace(f".{name.split('.')[2]}.", f".{kept[int(name.split('.')[2])]}.")
        assert torch.equal(weight.encoding.codes, whole.weights[old].encoding.codes)
        assert result.report.layers[name]["rtn"] == whole.report.layers[old]["rtn"] | {
            "seconds": result.report.layers[name]["rtn"]["seconds"]
        }
    assert set(result.report.layers) == set(result.weights)
    steps = {"passes": [{"wanda": {}}, {"perp": {"train": ["bias"], "new_biases": True, "steps": 2}},
                        {"rtn": {"bits": 4}}, {"layer_drop": {"blocks": 2}}]}  # fmt: skip
    report = compress.run(
        steps, saved(model, tmp_path / "model"), tmp_path / "out", calibration=tokens, evaluation=tokens
    )
    assert report.verified["max_logit_difference"] == 0
    assert report.dropped == result.report.dropped
    assert report.rows[-1].perplexity == pytest.approx(result.report.rows[-1].perplexity)


@pytest.mark.parametrize(
    "later",
    [
        [Rtn(bits=3), Eora(rank=4)],
        pytest.param([FlexRound(bits=3, steps=4)], marks=pytest.mark.real),
        [Magnitude(sparsity=0.5), Perp(steps=2, objective="distill")],
        [LayerDrop(criterion="angular")],
    ],
    ids=lambda passes: "+".join(p.key for p in passes),
)
def test_later_passes_see_the_shorter_model_and_its_original(
    later: list[Any], llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = llama_maker(num_hidden_layers=4)
    shorter = compress.apply(model, [LayerDrop(blocks=2)], tokens)
    at_once = compress.apply(model, [LayerDrop(blocks=2), *later], tokens)
    after = compress.apply(shorter.model, [LayerDrop(blocks=0), *later], tokens)  # stages count for random numbers
    assert torch.equal(logits(at_once.model, tokens), logits(after.model, tokens))
    assert at_once.weights.keys() == after.weights.keys()


PLANNED = {
    "alone": ("{layer_drop: {blocks: 2}}", 0),
    "before": ("{layer_drop: {blocks: 1}}, {rtn: {scheme: w4g32}}", 21),
    "after": ("{magnitude: {sparsity: 0.5}}, {layer_drop: {blocks: 2}}, {rtn: {scheme: w4g32}}", 14),
    "twice": ("layer_drop, {layer_drop: {blocks: 2}}, {rtn: {scheme: w4g32, include: ['*']}}", 8),
}


@pytest.mark.parametrize(("entries", "sites"), PLANNED.values(), ids=PLANNED.keys())
def test_the_plan_is_that_of_the_shorter_model(
    entries: str, sites: int, llama_maker: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor
) -> None:
    folder = saved(llama_maker(num_hidden_layers=4), tmp_path / "model")
    pipeline = parse(f"{CALIBRATION}passes: [{entries}]")
    opened = opening.open_model(folder)
    expected = plan.make(pipeline, opened.artifact.graph, opened.dtypes)
    assert sites in (0, len(expected.stages[-1][0].sites))
    compress.run(pipeline, folder, tmp_path / "out", calibration=tokens)
    data = (tmp_path / "out" / "compress.safetensors").read_bytes()
    assert expected.final_bytes == pytest.approx(len(data) - 8 - int.from_bytes(data[:8], "little"), rel=0.02)


def test_plan_inspect_and_the_table_say_what_goes(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{CALIBRATION}passes: [layer_drop, {{rtn: {{scheme: w8g64}}}}]")
    model = make_text_model(tmp_path / "model", num_hidden_layers=6)
    rows = json.loads(compress_command("plan", pipeline, model, "--json").out)["passes"]
    assert [(row["layers"], row["becomes"]) for row in rows] == [(42, "1 of 6 blocks gone"), (35, "quantized")]
    assert "1 of 6 blocks gone" in compress_command("plan", pipeline, model).out
    ended = compress_command("run", pipeline, model, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "layer_drop dropped block " in ended.out
    assert len(json.loads(compress_command("inspect", tmp_path / "out", "--json").out)) == 35
    again = compress_command("run", pipeline, model, "-o", tmp_path / "out")
    assert "layer_drop dropped block " in again.out


RESUMED = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
passes:
  - magnitude: {sparsity: 0.3}
  - layer_drop: {blocks: 2}
  - gptq: {scheme: w3g32}
"""


@FILES
def test_killed_again_and_again_the_run_ends_bit_identical(files: int, tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, RESUMED, num_hidden_layers=4)
    assert {"s01-distances-0.json", "s01-distances-1.json"} < killed_again_and_again(whole, killed, files)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([LayerDrop(blocks=4)], "4 of 4 blocks cannot go: at least one must stay"),
        ([LayerDrop(blocks=2), LayerDrop(blocks=2)], "2 of 2 blocks cannot go"),
        ([LayerDrop(blocks=-1)], "-1 is negative"),
        ([LayerDrop(greedy=False, criterion="angular")], "changes nothing with criterion angular"),
        ([LayerDrop(overrides=(compress.Override("*", {"blocks": 1}),))], "goes or stays whole"),
        (
            [LayerDrop(blocks=2, include=("*.1.*", "*.3.*"), criterion="angular")],
            "2 blocks in a row should go, and of 4",
        ),
        ([LayerDrop(include=("*.mlp.*",))], "of 4 only 0 may: .* leave every layer"),
        ([LayerDrop(), Rtn(include=("*.3.*",))], "matches no layer"),
        ([[LayerDrop(), Rtn()]], "cannot be fused"),
        ([LayerDrop(), Perp(objective="distill")], "original to learn from is without the blocks, .*next_token"),
        ([Magnitude(include=("*.1.*",)), LayerDrop()], "different kinds in different blocks.*put layer_drop before"),
    ],
)
def test_what_cannot_be_done_is_refused_before_work(
    passes: list[Any], said: str, llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(llama_maker(num_hidden_layers=4), passes, tokens)


def test_calibration_is_needed(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="layer_drop learns from data"):
        compress.apply(tiny_llama, [LayerDrop()])


class Branched(wirings.Model):
    def forward(self, x: Tensor) -> Tensor:
        return sum(block(self.embed(x)) for block in reversed(self.blocks))


def test_models_without_one_list_of_like_blocks_are_refused_in_words(tokens: Tensor) -> None:
    x = torch.randn(4, wirings.WIDTH)
    mixed = nn.Sequential(nn.Linear(32, 32), wirings.Block(), wirings.Block(), nn.Linear(32, 4))
    with pytest.raises(ConfigError, match=r"1 is built differently from 0.*`exclude`"):
        compress.apply(mixed, [LayerDrop()], x)
    result = compress.apply(mixed, [LayerDrop(exclude=("0", "3"))], x)
    assert [type(m) for m in result.model] == [nn.Linear, wirings.Block, nn.Linear]
    passes = [Magnitude(include=("0", "3"), sparsity=0.5), LayerDrop(exclude=("0", "3")), Magnitude(sparsity=0.25)]
    later = compress.apply(mixed, [*passes, Rtn(bits=4)], x)
    assert {name: w.kind for name, w in later.weights.items()} == dict.fromkeys(
        ["0", "1.up", "1.gate", "1.down", "2"], "sparse-quantized"
    )
    assert later.weights["2"].encoding.codes.shape == (4, 32)
    with pytest.raises(ConfigError, match="not the entries of one numbered list"):
        compress.apply(wirings.Block(), [LayerDrop()], x)
    shared = wirings.Model()
    shared.blocks[1].up.weight = shared.blocks[0].up.weight
    with pytest.raises(ConfigError, match="shared with another part"):
        compress.apply(shared, [LayerDrop()], x)
    with pytest.raises(UnsupportedModelError, match="do not run once each and in order"):
        compress.apply(Branched(), [LayerDrop()], x)


def test_a_model_whose_configuration_does_not_follow_is_refused_before_work(tokens: Tensor) -> None:
    config = BartConfig(vocab_size=256, d_model=32, decoder_layers=3, encoder_layers=3, decoder_attention_heads=2,
                        decoder_ffn_dim=64, is_decoder=True, is_encoder_decoder=False)  # fmt: skip
    with pytest.raises(ConfigError, match="configuration of a BartForCausalLM does not decide how many blocks"):
        compress.apply(BartForCausalLM(config), [LayerDrop()], tokens)
    config.encoder_layers = 2
    with pytest.raises(ConfigError, match="has no encoder_layers that counts its blocks"):
        compress.apply(BartForCausalLM(config), [LayerDrop()], tokens)


def test_a_block_that_would_be_another_at_its_new_place_is_refused(tokens: Tensor) -> None:
    model = qwen()
    model.config.layer_types = ["full_attention"] * 4  # the modules remember what they were made as
    with pytest.raises(ConfigError, match="depend on where they are"):
        compress.apply(model, [LayerDrop()], tokens)


def test_states_that_are_not_finite_are_said() -> None:
    model = wirings.Model()
    model.blocks[1].down.bias.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="around block 1 are not finite"):
        compress.apply(model, [LayerDrop()], torch.randn(4, 3, wirings.WIDTH))
