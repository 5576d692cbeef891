"""A folder with one good file of every kind that is read, small enough to be copied for every case."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import compress
from compress.api import run as api
from compress.progress import Bars

WORDS = (
    "return", "the", "path", "of", "a", "list", "with", "value", "string", "and", "key", "from", "each", "module",
    "that", "was", "given", "here",
)  # fmt: skip
TEXT = " ".join(WORDS[(7 * i * i + i) % len(WORDS)] for i in range(400))
DATA = "{source: words.txt, samples: 4, length: 8}"
PIPELINE = f"""\
# a pass, and three that run block by block together
calibration: {DATA}
evaluate: {DATA}
seed: 3
passes:
  - wanda: {{sparsity: "2:4", include: ["*.mlp.*"]}}
  - blockwise:
      - magnitude: {{sparsity: 0.9, include: ["*.q_proj"]}}
      - gptq: {{bits: 4, group_size: 16}}
      - eora: {{rank: 2}}
export: [safetensors, entropy]
"""
RTN = "passes: [{rtn: {bits: 4, group_size: 16}}]\n"
MERGEKIT = """\
merge_method: dare_ties
base_model: model
models:
  - model: model
  - model: tuned
    parameters: {weight: 0.5, density: [1, 0.5]}
parameters: {normalize: true, lambda: 0.7}
dtype: float32
"""


def make(folder: Path) -> Path:
    """Make everything; some seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    make_tuned(folder)
    make_shards(folder)
    make_adapter(folder / "adapter")
    (folder / "words.txt").write_text(TEXT)
    rows = (json.dumps({"text": TEXT[i : i + 200]}) for i in range(0, 2000, 200))
    (folder / "words.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "p.yaml").write_text(PIPELINE)
    (folder / "rtn.yaml").write_text(RTN)
    (folder / "calibrated.yaml").write_text(f"calibration: {DATA}\npasses: [{{gptq: {{bits: 4, group_size: 16}}}}]\n")
    (folder / "merge.yaml").write_text(MERGEKIT)
    images = {"images": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4, dtype=torch.int64)}
    save_file(images, folder / "images.safetensors")
    make_table(folder / "words.parquet")
    make_graph(folder / "onnx")
    make_results(folder)
    return folder


def make_model(folder: Path) -> None:
    """A random Llama of some kilobytes, with a tokenizer of whole words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_adapter(folder: Path) -> None:
    """A LoRA adapter of the model, as PEFT writes one, with something trained whole."""
    folder.mkdir()
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    tensors = {f"{layer}.lora_{part}.weight": torch.randn(2, 32) for layer in layers for part in "AB"}
    tensors = {name: value.T.contiguous() if "lora_B" in name else value for name, value in tensors.items()}
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "../model", "r": 2, "lora_alpha": 4, "use_rslora": True,
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.5}, "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def make_tuned(folder: Path) -> None:
    """Another model, not far from the first."""
    shutil.copytree(folder / "model", folder / "tuned")
    values = load_file(folder / "model" / "model.safetensors")
    changed = {name: value + 0.01 * torch.randn(value.shape) for name, value in values.items()}
    save_file(changed, folder / "tuned" / "model.safetensors", {"format": "pt"})


def make_shards(folder: Path) -> None:
    """The model in two files with an index."""
    shutil.copytree(folder / "model", folder / "shards")
    values = load_file(folder / "model" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    where = {}
    for i in range(2):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        part = {key: value for n, (key, value) in enumerate(sorted(values.items())) if n % 2 == i}
        save_file(part, folder / "shards" / name, {"format": "pt"})
        where.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))


def make_table(file: Path) -> None:
    """The text as rows of a table, where that can be written."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        file.write_bytes(b"PAR1")
        return
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT] * 5}), file)


def make_graph(folder: Path) -> None:
    """An ONNX file that gives logits for tokens: a table of them, which is quicker to make than to export a model."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"")
        return
    table = numpy_helper.from_array(torch.randn(32, 32).numpy(), "table")
    words = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["rows", "length"]) for n in ("input_ids", "attention_mask")
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", "length", 32])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    graph = helper.make_graph(nodes, "table", words, [logits], [table])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "model" / name, folder)
    onnx.save(made, folder / "model.onnx")


def make_results(folder: Path) -> None:
    """A finished folder, one that was left before its end, and a delta."""
    bars = Bars(drawn=False)
    with contextlib.chdir(folder):
        compress.run("p.yaml", "model", "out", bars=bars)
        with mock.patch.object(api, "_export", side_effect=InterruptedError), contextlib.suppress(InterruptedError):
            compress.run("p.yaml", "model", "half", bars=bars)
        compress.run({"passes": [{"compeft": {"models": ["tuned"]}}]}, "model", "merged", bars=bars)
        shutil.move("merged/delta", "delta")
        shutil.rmtree("merged")
