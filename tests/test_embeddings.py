"""Embeddings and tied heads: packed once, shared, looked up row by row, and learned from what reaches the head."""

import copy
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from children import FILES, contents, prepare, unfinished
from children import run as run_child
from conftest import VOCABULARY, make_llama
from runtime_layers import weight
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import compress
from compress import Codebook, Gptq, Magnitude, Olive, Override, PowerQuant, Rtn, SparseGpt, Wanda
from compress.config.reading import parse
from compress.encodings import pack
from compress.encodings.format import WEIGHTS
from compress.errors import ConfigError
from compress.io.safetensors_file import read_header
from compress.models import graph, tables
from compress.models.loading import build
from compress.passes import Pass
from compress.passes.base import Edit, Target
from compress.planning import plan
from compress.runtime import embedding, lookup
from compress.runtime.embedding import PackedEmbedding, SharedLinear, packed_embedding
from compress.runtime.linear import PackedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def gemma() -> PreTrainedModel:
    """Scales the rows that it looks up."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, **TOKENS)).eval()


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.1, **TOKENS)).eval()


def opt() -> PreTrainedModel:
    """Shifts positions, and projects between an embedding and blocks of other widths."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 96}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.1}
    return OPTForCausalLM(OPTConfig(**sizes, **more, **TOKENS)).eval()


MODELS: Mapping[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "tied": (lambda: make_llama(tie_word_embeddings=True, **TOKENS), ["model.embed_tokens"]),
    "untied": (lambda: make_llama(**TOKENS), ["lm_head", "model.embed_tokens"]),
    "gemma": (gemma, ["model.embed_tokens"]),
    "gpt2": (gpt2, ["transformer.wte"]),
    "opt": (opt, ["model.decoder.embed_tokens"]),
}


@dataclass
class Made:
    """A model that was compressed in memory and into a folder, and what the folder holds, loaded."""

    model: nn.Module
    weights: Mapping[str, Any]
    folder: Path
    loaded: Any


def made(model: PreTrainedModel, folder: Path, passes: list[Pass], tokens: Tensor) -> Made:
    model.save_pretrained(folder / "model")
    result = compress.apply(model, passes, calibration=tokens)
    pipeline = compress.Pipeline(passes=tuple((p,) for p in passes))
    compress.run(pipeline, folder / "model", folder / "out", calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    return Made(result.model, result.weights, folder / "out", loaded)


def assert_same(one: nn.Module, other: nn.Module, tokens: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, other(tokens).logits)


def outside(weights: Mapping[str, Any], model: nn.Module) -> list[str]:
    inside = tuple(graph.find(model).blocks)
    return sorted(name for name in weights if not name.startswith(inside))


@pytest.mark.parametrize("pass_", only([Gptq], [Rtn, Gptq]))
@pytest.mark.parametrize("name", only(["tied", "untied", "gpt2"], MODELS))
def test_one_line_packs_everything_and_the_folder_loads_to_the_same_bits(
    name: str, pass_: type[Rtn] | type[Gptq], tmp_path: Path, tokens: Tensor
) -> None:
    model = MODELS[name][0]()
    found = made(model, tmp_path, [pass_(bits=4, group_size=32, embeddings={"bits": 8})], tokens)
    assert outside(found.weights, model) == MODELS[name][1]
    bits = {n: w.encoding.bits for n, w in found.weights.items()}
    assert {n for n, width in bits.items() if width == 8} == set(MODELS[name][1])
    assert_same(found.loaded, found.model, tokens)
    prompt, options = tokens[:2, :5], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.loaded.generate(prompt, **options), found.model.generate(prompt, **options))  # type: ignore[operator]
    found.loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(again, found.loaded, tokens)
    first, second = (read_header(folder / file).tensors for folder, file in _files(found.folder, tmp_path / "again"))
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}


def _files(out: Path, again: Path) -> list[tuple[Path, str]]:
    return [(out, WEIGHTS), (again, next(again.glob("*.safetensors")).name)]


@pytest.mark.parametrize("name", only(["tied", "gpt2"], ["tied", "gemma", "gpt2", "opt"]))
def test_a_tied_head_has_no_tensors_of_its_own(name: str, tmp_path: Path, tokens: Tensor) -> None:
    loaded = made(MODELS[name][0](), tmp_path, [Rtn(embeddings={"bits": 8})], tokens).loaded
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, SharedLinear)
    assert not head.state_dict()
    assert not [key for key in loaded.state_dict() if "lm_head" in key]
    assert {n: t.data_ptr() for n, t in head.stored().items()} == {n: t.data_ptr() for n, t in table.stored().items()}
    before = loaded(tokens).logits
    loaded.tie_weights()
    halves = nn.Module.float(nn.Module.half(loaded))
    assert torch.equal(halves.get_input_embeddings().codes, table.codes)
    assert torch.allclose(halves(tokens).logits, before, atol=0.1)


def test_what_is_tied_stays_shared_in_a_copy(tmp_path: Path, tokens: Tensor) -> None:
    found = made(MODELS["tied"][0](), tmp_path, [Rtn(embeddings={"bits": 8})], tokens)
    copied = copy.deepcopy(found.loaded)
    assert copied.lm_head.owner is copied.model.embed_tokens
    assert_same(copied, found.loaded, tokens)
    copied.model.embed_tokens.codes.zero_()
    assert not torch.equal(copied(tokens).logits, found.loaded(tokens).logits)


@pytest.mark.parametrize("name", only(["tied", "opt"], MODELS))
def test_only_rows_that_are_looked_up_are_decoded(
    name: str, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = made(MODELS[name][0](), tmp_path, [Rtn(embeddings={"bits": 8})], tokens).loaded
    decoded: list[int] = []
    inner = embedding.decode_rows

    def counted(spec: Any, tensors: Any, rows: Tensor, *more: Any) -> Tensor:
        found = inner(spec, tensors, rows, *more)
        decoded.append(len(found))
        return found

    def whole(_: PackedEmbedding) -> Tensor:
        raise AssertionError("the whole table is decoded")

    table = loaded.get_input_embeddings()
    expected = table.weight.clone()[tokens[0, :5]]
    monkeypatch.setattr(embedding, "decode_rows", counted)
    monkeypatch.setattr(PackedEmbedding, "dequantize", whole)
    rows = table(tokens[0, :5])
    assert decoded == [5]
    assert torch.equal(rows / getattr(table, "scalar_embed_scale", 1.0), expected)
    loaded(tokens[:1, :7])
    assert decoded == [5, 7]


@pytest.mark.parametrize(
    "pass_",
    only(
        [Codebook(bits=3), Wanda(sparsity=0.4)],
        [
            Rtn(bits=3, granularity="tensor"),
            Codebook(bits=3),
            Olive(bits=4),
            PowerQuant(bits=4),
            Magnitude(sparsity=0.5),
            Magnitude(sparsity="2:4"),
            Wanda(sparsity=0.4),
            SparseGpt(sparsity="2:4"),
        ],
    ),
    ids=lambda p: f"{p.key}-{getattr(p, 'sparsity', '')}",
)
@pytest.mark.parametrize("name", only(["tied"], ["tied", "untied"]))
def test_every_method_of_single_matrices_works_on_embedding_and_head(
    name: str, pass_: Pass, tmp_path: Path, tokens: Tensor
) -> None:
    model = MODELS[name][0]()
    found = made(model, tmp_path, [replace(pass_, include=("*proj", "*embed_tokens", "*head"))], tokens)
    assert outside(found.weights, model) == MODELS[name][1]
    assert_same(found.loaded, found.model, tokens)


def test_a_pruned_and_quantized_table_is_looked_up(tmp_path: Path, tokens: Tensor) -> None:
    both = ("*embed_tokens",)
    passes: list[Pass] = [Magnitude(sparsity=0.6, include=both), Gptq(bits=3, group_size=16, include=both)]
    found = made(MODELS["tied"][0](), tmp_path, passes, tokens)
    assert found.weights["model.embed_tokens"].kind == "sparse-quantized"
    assert_same(found.loaded, found.model, tokens)


@pytest.mark.parametrize("pattern", ["*lm_head*", "*embed_tokens*", "lm_head", "model.embed*"])
def test_either_name_of_a_tied_head_means_the_one_site(pattern: str, tokens: Tensor) -> None:
    model = MODELS["tied"][0]()
    first = compress.apply(model, [Rtn(bits=3, include=(pattern,))]).weights
    assert list(first) == ["model.embed_tokens"]
    override = Override(pattern, {"bits": 2})
    wide = compress.apply(model, [Rtn(bits=3, include=("*embed_tokens",), overrides=(override,))]).weights
    assert wide["model.embed_tokens"].encoding.bits == 2
    for name in ("*embed_tokens", "*lm_head"):
        with pytest.raises(ConfigError, match="matches only layers that `exclude` leaves alone"):
            compress.apply(model, [Rtn(include=("*.up_proj", name), exclude=(pattern,))])


def test_a_tied_head_in_memory_stays_tied(tokens: Tensor) -> None:
    model = compress.apply(MODELS["tied"][0](), [Rtn(bits=2, include=("*lm_head",))]).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_positions_and_other_layers_outside_are_worked_on_when_named(tmp_path: Path, tokens: Tensor) -> None:
    include = ("*embed_positions", "*project_out", "*project_in", "*embed_tokens", "*fc1")
    found = made(opt(), tmp_path, [Gptq(bits=4, include=include)], tokens)
    names = ["embed_positions", "embed_tokens", "project_in", "project_out"]
    assert [n.rpartition(".")[2] for n in outside(found.weights, opt())] == names
    assert_same(found.loaded, found.model, tokens)
    packed = found.loaded.model.decoder
    assert isinstance(packed.embed_positions, PackedEmbedding)
    assert isinstance(packed.project_out, PackedLinear)


@dataclass(frozen=True, kw_only=True)
class Seen(Gptq):
    """Remembers the Gram matrices that it is given."""

    grams: ClassVar[list[Tensor]] = []

    def run(self, target: Target) -> Edit:
        assert target.statistics is not None
        assert target.statistics.gram is not None
        self.grams.append(target.statistics.gram.clone())
        return super().run(target)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_learns_from_what_the_compressed_model_feeds_it(name: str, tokens: Tensor) -> None:
    model = MODELS[name][0]()
    body = compress.apply(model, [Rtn(bits=3)]).model
    fed: list[Tensor] = []
    hook = body.lm_head.register_forward_pre_hook(lambda _, args: fed.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        body(tokens)
    hook.remove()
    Seen.grams.clear()
    compress.apply(body, [Seen(include=("*lm_head",))], calibration=tokens, products="float32")
    (gram,) = Seen.grams
    assert torch.allclose(gram, fed[0].T @ fed[0], rtol=1e-4, atol=1e-3 * float(gram.abs().max()))


def test_no_logits_are_computed_to_learn_the_head(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        if weight.shape[0] == VOCABULARY:
            rows.append(x.shape[0])
        return inner(x, weight, *more)

    model = make_llama()
    monkeypatch.setattr(nn.functional, "linear", counted)
    monkeypatch.setattr("torch.nn.modules.linear.F.linear", counted)
    compress.apply(model, [Gptq(include=("*lm_head",))], calibration=tokens)
    assert rows
    assert set(rows) == {1}, "of one sample, to see how often the head is reached"


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_gptq_of_the_head_beats_rounding_on_what_reaches_it(name: str, tokens: Tensor) -> None:
    model = MODELS[name][0]()
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state.flatten(0, 1)
        weight = model.lm_head.weight.clone()
        lost = {}
        for pass_ in (Rtn, Gptq):
            made_of = compress.apply(model, [pass_(bits=3, include=("*lm_head",))], calibration=tokens).model
            lost[pass_.key] = float((hidden @ (weight - made_of.lm_head.weight).T).norm())
    assert lost["gptq"] < 0.9 * lost["rtn"]


@pytest.mark.parametrize("act_order", [False, True])
def test_for_an_embedding_alone_gptq_is_rounding(act_order: bool, tokens: Tensor) -> None:
    include = ("*embed_tokens",)
    rounded = compress.apply(make_llama(), [Rtn(bits=3, group_size=16, include=include)]).weights
    pass_ = Gptq(bits=3, group_size=16, include=include, act_order=act_order)
    learned = compress.apply(make_llama(), [pass_], calibration=tokens).weights
    one, other = (w["model.embed_tokens"].encoding for w in (rounded, learned))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


OTHERS = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        AutoModelForSeq2SeqLM,
        ("shared", "*.q"),
        ["shared"],
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(vocab_size=96, num_attention_heads=4, **NARROW)),
        AutoModelForMaskedLM,
        ("*decoder", "*transform.dense", "*query"),
        ["bert.embeddings.word_embeddings", "cls.predictions.transform.dense"],
    ),
    "classifier": (
        lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=96, num_attention_heads=4, **NARROW, **TOKENS)),
        AutoModelForSequenceClassification,
        ("score", "*embed_tokens", "*q_proj"),
        ["model.embed_tokens", "score"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_classifiers_have_their_ends_packed_too(name: str, tmp_path: Path) -> None:
    make, loader, include, expected = OTHERS[name]
    model, ids = make().eval(), torch.randint(1, 96, (4, 16))
    model.save_pretrained(tmp_path / "model")
    pass_ = Gptq(bits=4, include=include)
    result = compress.apply(model, [pass_], calibration=ids)
    assert outside(result.weights, model) == expected
    compress.run(compress.Pipeline(passes=((pass_,),)), tmp_path / "model", tmp_path / "out", calibration=ids)
    loaded = loader.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    one, other, again = (
        m(ids[:1], **more).logits for m in (result.model, loaded, loader.from_pretrained(tmp_path / "again"))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, again)


# --- kernels --------------------------------------------------------------------------------------------------------


def pair(name: str, **options: Any) -> tuple[PackedEmbedding, SharedLinear]:
    """An embedding of 48 rows, and a head that is tied to it."""
    spec, tensors = pack(weight(name, 48, 256, **options))
    table = packed_embedding(nn.Embedding(48, 256), spec)
    table.load_state_dict(tensors)
    return table, SharedLinear(table, bias=False)


@pytest.mark.parametrize("name", ["uniform 4 groups", "uniform 3", "codebook 4 tables", "power 3 half", "olive int4"])
def test_a_kernel_of_the_head_orders_the_codes_of_the_table_which_looks_rows_up_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "usable", lambda device: True)  # its product, which cannot run here, is not called
    table, head = pair(name)
    ids = torch.tensor([[47, 0, 16], [15, 16, 3]])
    before, codes = table(ids), table.codes.clone()
    head.choose_kernel()
    assert isinstance(head.kernel, lookup.GpuLookup)
    assert head.kernel.words.data_ptr() == table.codes.data_ptr(), "in memory once"
    assert not torch.equal(table.codes, codes)
    monkeypatch.setattr(lookup, "AT_ONCE", 2)
    assert torch.equal(table(ids), before)
    assert torch.equal(table.state_dict()["codes"], codes)
    assert torch.equal(head.dequantize(), table.dequantize())
    copied, its_head = copy.deepcopy((table, head))
    assert torch.equal(copied(ids), before)
    assert copied.codes.data_ptr() == its_head.kernel.words.data_ptr() != table.codes.data_ptr()
    assert torch.equal(table.half()(ids), before.half())
    assert head.kernel is None
    assert torch.equal(table.codes, codes)
    copied.load_state_dict(table.state_dict())
    assert its_head.kernel is None
    assert torch.equal(copied(ids), before)


def test_codes_that_do_not_fit_in_their_place_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "usable", lambda device: True)
    for name, options in (("uniform 4 groups", {"mask": "half"}), ("uniform 7", {})):
        table, head = pair(name, **options)
        before = table(torch.arange(48))
        head.choose_kernel()
        assert head.kernel is not None
        assert torch.equal(table(torch.arange(48)), before)


def test_speed_up_gives_a_tied_head_a_kernel_and_leaves_the_embedding_alone(tmp_path: Path, tokens: Tensor) -> None:
    loaded = made(MODELS["tied"][0](), tmp_path, [Rtn(bits=4, embeddings={"bits": 8})], tokens).loaded
    expected = loaded(tokens).logits
    kernels = {row.layer: row.kernel for row in compress.speed_up(loaded).layers}
    assert kernels["lm_head"]
    assert "model.embed_tokens" not in kernels
    assert torch.allclose(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)


# --- what a class of embedding may be -------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class ByItself(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight.tanh())


class Beside(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.weight.mean()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Embedding(4, 2), True),
        (nn.Embedding(4, 2, padding_idx=1), True),
        (Scaled(4, 2), True),
        (nn.Embedding(4, 2, max_norm=1.0), False),
        (ByItself(4, 2), False),
        (Beside(4, 2), False),
        (nn.Linear(4, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_class_that_does_more_with_its_table_than_look_rows_up_is_no_site(module: nn.Module, expected: bool) -> None:
    assert tables.looks_up(module) == expected


def test_the_embedding_of_any_module_is_a_site_that_must_be_named() -> None:
    model = nn.Sequential(Scaled(64, 32), nn.Linear(32, 32))
    assert list(compress.apply(model, [Rtn()]).weights) == ["1"]
    assert sorted(compress.apply(model, [Rtn(embeddings={"bits": 8})]).weights) == ["0", "1"]


# --- sizes ----------------------------------------------------------------------------------------------------------


def planned(model: nn.Module, text: str, dtype: torch.dtype | None = None) -> plan.Plan:
    found = graph.find(model)
    dtypes = {name: dtype or tensor.dtype for name, tensor in found.tensors()}
    return plan.make(parse(text, "p.yaml"), found, dtypes, "p.yaml")


@pytest.mark.parametrize("name", only(["tied", "untied"], MODELS))
def test_the_plan_knows_the_size_of_the_file(name: str, tmp_path: Path, tokens: Tensor) -> None:
    model = MODELS[name][0]()
    expected = planned(model, "passes: [{rtn: {bits: 4, group_size: 32, embeddings: w8}}]").final_bytes
    folder = made(
        model, tmp_path, [Rtn(bits=4, group_size=32, embeddings={"bits": 8, "group_size": None})], tokens
    ).folder
    sizes = (torch.Size(t.shape).numel() * t.dtype.itemsize for t in read_header(folder / WEIGHTS).tensors.values())
    assert sum(sizes) == expected


LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def test_four_bits_of_everything_make_a_llama_of_a_billion_much_smaller_than_of_the_layers_alone() -> None:
    model = build(LlamaConfig(**LLAMA_1B, dtype="bfloat16"))
    whole, layers, everything = (
        planned(model, f"passes: [{{rtn: {{scheme: w4g128{more}}}}}]", torch.bfloat16).final_bytes
        for more in (", include: ['*.0.*.q_proj']", "", ", embeddings: w4g128")
    )
    assert layers / everything == pytest.approx(1.61, abs=0.01)
    assert (layers + 2 * 128256 * 2048) / everything == pytest.approx(2.42, abs=0.01), (
        "where the head is kept beside it"
    )
    assert whole / everything > 3.6


# --- resume ---------------------------------------------------------------------------------------------------------

PIPELINE = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - wanda: {sparsity: 0.2, include: ["*.down_proj", "*lm_head"]}
  - gptq: {scheme: w4g32, embeddings: w3g32}
"""


@pytest.mark.real
@FILES
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_is_killed_around_the_head_ends_with_the_same_bits(tied: bool, files: int, tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, PIPELINE, tie_word_embeddings=tied)
    assert run_child(whole, "model") == 0
    seen = set[str]()
    while "out" not in seen:
        assert run_child(killed, "model", kill_after=files) == -signal.SIGKILL
        seen |= unfinished(killed).keys()
    assert {"s00-outside.safetensors", "s01-outside.safetensors"} <= seen
    assert run_child(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


# --- refusals -------------------------------------------------------------------------------------------------------

DATA = "calibration: {source: demo, samples: 2, length: 32}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flexround: {include: ['*proj', '*lm_head']}", ["is outside the blocks", "gptq or rtn"]),
        ("adaround: {include: ['*proj', '*embed_tokens']}", ["is outside the blocks"]),
        ("perp: {train: [head]}", ["lm_head is tied to model.embed_tokens"]),
        ("eora: {rank: 4, include: ['*embed_tokens', '*proj']}", ["looked up", "eora", "exclude"]),
        ("rtn: {activation_bits: 8, include: ['*embed_tokens']}", ["no inputs to round", "activation_bits: null"]),
        ("rtn: {embeddings: {activation_bits: 8}}", ["no inputs to round"]),
        ("rtn: {embeddings: w9}", ["embeddings", "9 is not between 2 and 8"]),
        ("rtn: {embeddings: [8]}", ["{bits: 8}"]),
        ("rtn: {embeddings: {bitz: 8}}", ["bitz", "did you mean bits"]),
        ("rtn: {embeddings: {bits: 9}}", ["9"]),
        ("rtn: {embeddings: {bits: 8, group_size: 48}}", ["group_size 48 does not divide"]),
        ("rtn: {embeddings: {granularity: group}}", ["group needs a group_size"]),
        ("rtn: {embeddings: w8, exclude: ['*lm_head']}", ["no embedding and no head"]),
        ("rtn: {include: ['*embed']}", ["matches no layer"]),
        ("wanda: {embeddings: w8}", ["embeddings"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_to_an_embedding_is_refused_before_work(text: str, said: list[str]) -> None:
    model = MODELS["tied"][0]()
    with pytest.raises(ConfigError) as caught:
        planned(model, f"{DATA}passes: [{{{text}}}]")
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize("key", ["onnx", "compressed-tensors"])
def test_a_format_without_packed_embeddings_is_refused_before_work(key: str) -> None:
    pytest.importorskip({"onnx": "onnx_ir"}.get(key, "compressed_tensors"))
    text = "passes: [{rtn: {bits: 4, embeddings: w8}}]\nexport: [" + key + "]\n"
    with pytest.raises(ConfigError, match=r"1 are packed, such as model\.embed_tokens"):
        planned(MODELS["tied"][0](), text)


def test_a_plain_folder_holds_the_unpacked_table(tmp_path: Path, tokens: Tensor) -> None:
    MODELS["tied"][0]().save_pretrained(tmp_path / "model")
    pipeline = parse("passes: [{rtn: {bits: 4, embeddings: w8}}]\nexport: [safetensors, hf]\n", "p.yaml")
    compress.run(pipeline, tmp_path / "model", tmp_path / "out")
    plain, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("hf", ""))
    assert_same(plain, packed, tokens)
