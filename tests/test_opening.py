"""What a model folder is, asked in one place: its files, its structure, its type; all else is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import make_text_model
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaConfig

import compress
from compress.checkpoint.finite import refuse_non_finite
from compress.checkpoint.opening import load_measured, open_folder, open_model
from compress.config.reading import load_pipeline
from compress.errors import CheckpointError, DataError, NonFiniteError, UsageError
from compress.models import hub
from compress.models.companions import companions, copy_companions
from compress.models.tokenizers import load_tokenizer
from compress.planning import plan
from compress.progress import Bars

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RTN = {"passes": [{"rtn": {"scheme": "w4g32"}}]}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def tied(folder: Path) -> Path:
    """The same with one tensor for embedding and head."""
    change(folder, lambda t: t.pop(HEAD))
    configure(folder, tie_word_embeddings=True)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Change settings; None takes one out."""
    file = folder / name
    data = {**json.loads(file.read_text()), **values} if file.is_file() else values
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def shard(folder: Path, listed: Callable[[dict[str, str]], object] = lambda _: None) -> None:
    """Spread the weights over two files; `listed` changes what the index says."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    where = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for file in SHARDS:
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    listed(where)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def both_refuse(folder: Path, *words: str) -> None:
    """What passes start from and what is measured are one thing: both say the same."""
    said = []
    for opening in (open_model, load_measured):
        with pytest.raises(UsageError) as caught:
            opening(folder)
        said.append(str(caught.value))
    assert said[0] == said[1]
    for word in (str(folder), *words):
        assert word in said[0]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_single_file_beside_another_models_index_is_refused_by_both_names(folder: Path) -> None:
    shard(folder)
    both_refuse(folder, WEIGHTS, INDEX, "two models")
    (folder / WEIGHTS).unlink()
    assert open_folder(folder).artifact.stored == set(load_measured(folder).state_dict())


def test_an_index_that_names_only_the_single_file_is_no_second_model(folder: Path) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert open_folder(folder).artifact.stored == names.keys()


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (lambda where: where.update({GATE: SHARDS[where[GATE] == SHARDS[0]]}), ["does not name it there"]),
        (lambda where: where.pop(GATE), ["does not name it there"]),
        (lambda where: where.update({"ghost": SHARDS[0]}), ["names ghost", SHARDS[0]]),
    ],
    ids=["another file", "not at all", "a tensor that is not there"],
)
def test_an_index_that_says_something_else_than_the_files_is_refused(
    listed: Callable[[dict[str, str]], object], words: list[str], folder: Path
) -> None:
    shard(folder, listed)
    (folder / WEIGHTS).unlink()
    both_refuse(folder, INDEX, *words)


def test_a_file_that_is_not_there_is_named_before_what_the_index_lacks(folder: Path) -> None:
    shard(folder)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": json.loads((folder / INDEX).read_text())["weight_map"]}))
    both_refuse(folder, INDEX, '"metadata"')
    (folder / SHARDS[1]).unlink()
    both_refuse(folder, INDEX, f"names {SHARDS[1]}, which does not exist")


def test_companions_are_one_list_that_is_fetched_and_copied_and_holds_no_code(tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
        "qwen.tiktoken", "tokenizer.model", "spiece.model", "vocab.txt", "generation_config.json",
    ]  # fmt: skip
    weights = ["config.json", WEIGHTS, INDEX, *SHARDS, "adapter_config.json"]
    others = [
        "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5",
        "tokenizer_code.py", "tokenizer_secret", "modeling_x.py", "model.fp16.safetensors", "training_args.bin",
    ]  # fmt: skip
    every = [*wanted, *weights, *others]
    assert set(filter_repo_objects(every, allow_patterns=list(hub.FETCHED))) == {*wanted, *weights}
    source, copied = tmp_path / "source", tmp_path / "copied"
    for name in every:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    copied.mkdir()
    copy_companions(source, copied)
    assert {str(file.relative_to(copied)) for file in companions(copied)} == set(wanted)
    assert not [file for file in copied.rglob("*") if file.is_file() and file not in companions(copied)]


# --- tensors ----------------------------------------------------------------------------------------------------------


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + 1


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused_by_both_names(tied: Path) -> None:
    assert open_folder(tied).artifact.graph.tied == {HEAD: EMBEDDING}
    change(tied, other_head)
    both_refuse(tied, HEAD, EMBEDDING, "differ", "tie_word_embeddings")


def test_what_is_advised_for_a_head_of_its_own_gives_the_model_that_transformers_loads(tied: Path) -> None:
    change(tied, other_head)
    configure(tied, tie_word_embeddings=False)
    artifact, loaded = open_folder(tied).artifact, load_measured(tied)
    assert torch.equal(artifact.tensor(HEAD), loaded.lm_head.weight)
    assert torch.equal(artifact.tensor(EMBEDDING), loaded.model.embed_tokens.weight)
    configure(tied, tie_word_embeddings=True)
    change(tied, lambda t: t.pop(HEAD))
    assert open_folder(tied).artifact.graph.tied


def test_two_spellings_of_one_tensor_may_agree_and_may_not_differ(tied: Path) -> None:
    change(tied, lambda t: t.update({HEAD: t[EMBEDDING].clone(), "embed_tokens.weight": t[EMBEDDING].clone()}))
    assert torch.equal(open_folder(tied).artifact.tensor(EMBEDDING), load_file(tied / WEIGHTS)[EMBEDDING])
    change(tied, lambda t: t["embed_tokens.weight"].view(-1)[-1:].add_(1))
    both_refuse(tied, "embed_tokens.weight", EMBEDDING, "differ")


BIAS = "model.layers.1.self_attn.q_proj.bias"
EXTRA: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "a bias that config.json has lost": ({BIAS: torch.ones(64)}, [BIAS, "attention_bias"]),
    "a bias spelled without prefix": ({BIAS[6:]: torch.ones(64)}, [BIAS[6:], "attention_bias"]),
    "another head": ({"mtp.0.norm.weight": torch.ones(4)}, ["mtp.0.norm.weight", "no place"]),
    "a third block": ({"model.layers.2.mlp.down_proj.weight": torch.ones(4, 4)}, ["model.layers.2", "beyond the 2"]),
    "scales": ({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}, ["already quantized", "weight_scale"]),
    "packed codes": ({"model.layers.0.mlp.up_proj.qweight": torch.ones(4)}, ["already quantized", "qweight"]),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), EXTRA.values(), ids=EXTRA.keys())
def test_a_tensor_that_the_model_has_no_place_for_is_refused(
    tensors: dict[str, Tensor], words: list[str], folder: Path
) -> None:
    change(folder, lambda t: t.update(tensors))
    both_refuse(folder, *words)


def test_no_message_advises_to_save_again_or_to_change_the_number_of_layers(folder: Path) -> None:
    for edit in (lambda t: t.pop(GATE), lambda t: t.update({"model.layers.5.x.weight": torch.ones(1)})):
        change(folder, edit)
        with pytest.raises(CheckpointError) as caught:
            open_folder(folder)
        assert "save it again" not in str(caught.value)
        assert "number of layers" not in str(caught.value)
        assert "fetch" in str(caught.value)


def test_constants_of_old_checkpoints_are_no_tensors_without_a_place(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8)).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    change(tmp_path, lambda t: t.update({"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}))
    opened = open_folder(tmp_path)
    assert not opened.notes
    assert "transformer.h.0.attn.bias" not in opened.artifact.graph.buffers


def test_what_transformers_declares_to_ignore_is_noted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder, lambda t: t.update({"mtp.0.norm.weight": torch.ones(4)}))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    report = compress.run(RTN, folder, tmp_path / "out")
    (note,) = report.notes
    assert "mtp.0.norm.weight" in note
    assert note in caplog.text
    assert note in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == [note]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_in_the_place_of_weights_are_an_already_quantized_checkpoint(dtype: torch.dtype, folder: Path) -> None:
    change(folder, lambda t: t.update({GATE: t[GATE].to(dtype)}))
    both_refuse(folder, "already quantized")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"compression_config": {"format": "pack-quantized"}}),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        ("quantize_config.json", {"bits": 4}),
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}}),
    ],
)
def test_what_says_that_a_checkpoint_is_quantized_is_believed(
    file: str, settings: dict[str, Any], folder: Path
) -> None:
    configure(folder, file, **settings)
    both_refuse(folder, "already quantized", *([] if file == "config.json" else [file]))


# --- what kind of model -----------------------------------------------------------------------------------------------

ADAPTER = {"base_model_name_or_path": "./nowhere", "peft_type": "LORA"}


def test_an_adapter_is_refused_beside_weights_and_without_its_base(folder: Path, tiny_folder: Path) -> None:
    configure(folder, "adapter_config.json", **ADAPTER)
    both_refuse(folder, "adapter of ./nowhere", "beside", "merge_and_unload")
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    both_refuse(folder, "the base of the adapter", "./nowhere", f"BASE+{folder}")
    (folder / "config.json").unlink()
    both_refuse(folder, "the base of the adapter", "./nowhere", f"BASE+{folder}")
    with pytest.raises(UsageError, match="the base of the adapter"):
        compress.run({"passes": [{"average": {"models": [str(folder)]}}]}, tiny_folder, folder.with_name("out"))


def bert(cls: Any, **options: Any) -> transformers.PreTrainedModel:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made: transformers.PreTrainedModel = cls(BertConfig(vocab_size=32, **size, **options))
    return made


def llama(cls: Any) -> Callable[[], transformers.PreTrainedModel]:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return lambda: cls(LlamaConfig(vocab_size=32, pad_token_id=0, **size))


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> transformers.PreTrainedModel:
    size = {f"{side}_{what}": n for side in ("encoder", "decoder")
            for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=64, d_model=16, **size))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(BertForMaskedLM),
        lambda: bert(transformers.BertForTokenClassification),
        llama(transformers.LlamaForSequenceClassification),
        llama(transformers.LlamaModel),
        t5,
        bart,
    ],
    ids=["masked", "tagger", "classifier", "without head", "t5", "bart"],
)
def test_what_is_built_is_the_class_that_the_configuration_names(
    make: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    meant = make()
    meant.save_pretrained(tmp_path)
    graph = open_folder(tmp_path).artifact.graph
    assert type(graph.model) is type(meant)
    assert not graph.is_language_model
    assert {n: p.shape for n, p in graph.model.named_parameters()} == {n: p.shape for n, p in meant.named_parameters()}


def test_a_bert_that_is_a_decoder_is_a_causal_language_model(tmp_path: Path) -> None:
    bert(BertLMHeadModel, is_decoder=True).save_pretrained(tmp_path)
    assert open_folder(tmp_path).artifact.graph.is_language_model


def test_code_of_the_folder_is_never_run_and_never_named_in_what_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["modeling_own.Tokenizer", None]}
    configure(folder, auto_map=own)
    configure(folder, "tokenizer_config.json", auto_map=own, eos_token="x")
    report = compress.run({**RTN, "export": ["hf"]}, folder, tmp_path / "out")
    assert "auto_map" in report.notes[0]
    for made in (tmp_path / "out", tmp_path / "out" / "hf"):
        assert "auto_map" not in json.loads((made / "config.json").read_text())
        assert json.loads((made / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
        assert not list(made.glob("*.py"))
    configure(folder, architectures=["LLaMAForCausalLM"])
    assert open_folder(folder).notes, "an old spelling is no other class"
    configure(folder, architectures=["Own"])
    both_refuse(folder, "Own", "auto_map", "never run")
    configure(folder, model_type="own")
    both_refuse(folder, "'own'", "auto_map", "never run")
    configure(folder, auto_map=None)
    both_refuse(folder, "'own'", "newer version")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10_000},
        {"num_hidden_layers": 10**12},
        {"vocab_size": 10**9},
        {"hidden_size": 10**7},
        {"intermediate_size": 10**13},
    ],
    ids=str,
)
def test_a_configuration_of_a_giant_is_refused_before_it_is_built(
    settings: dict[str, int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.models import loading

    monkeypatch.setattr(loading, "build", lambda _: pytest.fail("it was built"))
    configure(folder, **settings)
    both_refuse(folder, "config.json", "fetch both from one place")


def test_buffers_of_a_giant_are_not_made_either(tmp_path: Path) -> None:
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "rotary_dim": 4}
    transformers.GPTJForCausalLM(transformers.GPTJConfig(n_positions=32, **size)).save_pretrained(tmp_path)
    assert open_folder(tmp_path).artifact.graph.blocks
    configure(tmp_path, n_positions=10**10)
    both_refuse(tmp_path, "config.json", "computed numbers")


# --- type -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", only(["bfloat16"], ["float32", "bfloat16", "float16"]))
def test_without_a_type_in_its_configuration_a_model_has_the_type_of_its_weights(
    dtype: str, folder: Path, tmp_path: Path, evaluation_tokens: Tensor
) -> None:
    kind = getattr(torch, dtype)
    configure(folder, dtype=None)
    change(folder, lambda t: t.update({name: value.to(kind) for name, value in t.items()}))
    out = tmp_path / "out"
    report = compress.run({**RTN, "export": ["hf"]}, folder, out, evaluation=evaluation_tokens)
    assert open_folder(folder).dtype == load_measured(folder).dtype == kind
    for made in (out, out / "hf"):
        assert json.loads((made / "config.json").read_text())["dtype"] == dtype
        loaded = transformers.AutoModelForCausalLM.from_pretrained(made)
        assert loaded.dtype == load_measured(made).dtype == kind
        assert compress.evaluate(loaded, evaluation_tokens).perplexity == report.rows[-1].perplexity


def test_a_file_of_float64_is_computed_with_in_float32(folder: Path) -> None:
    configure(folder, dtype=None)
    change(folder, lambda t: t.update({name: value.double() for name, value in t.items()}))
    assert open_folder(folder).dtype == load_measured(folder).dtype == torch.float32


def test_exports_are_planned_in_the_type_of_the_weights_where_config_json_names_none(folder: Path) -> None:
    def half(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.half() for name, value in tensors.items()})

    def planned() -> int:
        opened = open_folder(folder)
        return plan.make(steps, opened.artifact.graph, opened.dtypes).disk.total

    steps = load_pipeline({**RTN, "export": ["hf"]})
    change(folder, half)
    configure(folder, dtype="float16")
    said = planned()
    configure(folder, dtype=None)
    assert planned() == said


def test_the_type_that_a_pipeline_sets_is_the_type_of_the_result(folder: Path, tmp_path: Path) -> None:
    configure(folder, dtype=None, torch_dtype="float32")
    compress.run({**RTN, "dtype": "bfloat16"}, folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "entry",
    [
        {"rtn": {"scheme": "w4g32", "exclude": ["*.gate_proj"]}},
        {"average": {"models": ["SELF"], "exclude": ["*gate*"]}},
    ],
    ids=["excluded", "not merged"],
)
def test_a_matrix_that_no_pass_looks_at_must_be_finite_too(
    entry: dict[str, Any], value: float, folder: Path, tmp_path: Path
) -> None:
    change(folder, lambda t: t[GATE].view(-1)[7:8].fill_(value))
    entry = json.loads(json.dumps(entry).replace("SELF", str(folder)))
    with pytest.raises(NonFiniteError, match=f"{GATE}: 1 of 8192"):
        compress.run({"passes": [entry]}, folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "nothing was started"


def test_a_number_that_the_computing_type_cannot_hold_is_refused(folder: Path) -> None:
    change(folder, lambda t: t[GATE].view(-1)[:2].fill_(1e5))
    artifact = open_folder(folder).artifact
    for dtype in (torch.float32, torch.bfloat16):
        refuse_non_finite(artifact, dtype, Bars(drawn=False))
    with pytest.raises(NonFiniteError, match=r"2 of 8192 weights are too large for float16.*dtype: bfloat16"):
        refuse_non_finite(artifact, torch.float16, Bars(drawn=False))


def test_a_plain_export_that_overflows_its_type_is_not_written(folder: Path, tmp_path: Path) -> None:
    from compress.api.export import export_to
    from compress.io.manifest import write_manifest

    change(folder, lambda t: t[GATE].view(-1)[:1].fill_(1e5))
    compress.run(RTN, folder, tmp_path / "out")
    pipeline = tmp_path / "out" / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text().replace("dtype: auto", "dtype: float16"))
    write_manifest(tmp_path / "out")
    with pytest.raises(NonFiniteError, match=f"{GATE} holds numbers that are too large for float16"):
        export_to(tmp_path / "out", [compress.Hf()])
    assert not list((tmp_path / "out").glob("hf*"))


# --- tokenizers and settings ------------------------------------------------------------------------------------------


def unknown_step(folder: Path) -> None:
    configure(folder, "tokenizer.json", pre_tokenizer={"type": "Newest"})


def cut_off(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:999])


def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    configure(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def own_code(folder: Path) -> None:
    configure(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda f: (f / "tokenizer.json").unlink(), "it holds none of tokenizer.json"),
    "cut off": (cut_off, "tokenizer.json is cut off or damaged; fetch it again"),
    "no settings": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is cut off"),
    "newer": (unknown_step, "this version of the package tokenizers cannot use tokenizer.json"),
    "sentencepiece": (sentencepiece_only, "tokenizer.model"),
    "own code": (own_code, "never run here"),
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("with_tokenizer"))


@pytest.mark.parametrize(("damage", "words"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_whatever_is_wrong_with_a_tokenizer_is_one_sentence(
    damage: Callable[[Path], object], words: str, with_tokenizer: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_tokenizer, tmp_path / "model"))
    damage(folder)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"max_new_tokens": -1}'])
def test_broken_settings_of_generation_are_found_before_work(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    both_refuse(folder, "generation_config.json")


def test_a_compressed_folder_is_checked_for_absurd_settings_too(folder: Path, tmp_path: Path) -> None:
    from compress.export.packed import open_packed

    compress.run(RTN, folder, tmp_path / "out")
    configure(tmp_path / "out", num_hidden_layers=10_000)
    for opening in (load_measured, open_packed):
        with pytest.raises(CheckpointError, match="num_hidden_layers is 10000"):
            opening(tmp_path / "out")


def test_what_a_class_declares_to_leave_out_is_nothing_that_the_model_has(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    model.save_pretrained(tmp_path / "model")
    assert any(re.search(each, "h.0.attn.c_attn.bias") for each in model._keys_to_ignore_on_load_unexpected)
    steps = {"passes": [{"rtn": {"bits": 4, "group_size": 16}}]}
    compress.run(steps, tmp_path / "model", tmp_path / "out")
    names = load_file(tmp_path / "out" / "compress.safetensors")
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert compress.export_to(tmp_path / "out", [compress.Hf()])["hf"]["max_logit_difference"] == 0


def test_an_encoder_that_was_saved_without_its_head_is_the_model_without_it(tmp_path: Path) -> None:
    bert(transformers.BertModel, pad_token_id=0).save_pretrained(tmp_path / "in")
    configure(tmp_path / "in", architectures=["BertForMaskedLM"])
    opened = open_folder(tmp_path / "in")
    assert type(opened.artifact.graph.model).__name__ == "BertModel"
    assert any("no head of a BertForMaskedLM: it is taken for a BertModel" in note for note in opened.notes)
    compress.run({"passes": ["rtn"]}, tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_damaged_encoder_is_still_an_error(tmp_path: Path) -> None:
    bert(BertForMaskedLM).save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    del stored["bert.encoder.layer.0.output.dense.weight"]
    save_file(stored, tmp_path / WEIGHTS, {"format": "pt"})
    both_refuse(tmp_path, "1 parameters or buffers of BertForMaskedLM are not in the files")
