"""OUT/gguf: one file for llama.cpp, with codes in blocks of GGML whose values are exactly those of the packed model.

llama.cpp rotates pairs of a head's channels that are next to each other, transformers pairs that are half a head apart:
rows of query and key layers change their order.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CompressError, UsageError
from compress.export.base import Exporter, refuse_added, refuse_missing
from compress.export.blocks import Blocks, misfit, to_blocks
from compress.export.hf import Dense, refuse_rounded
from compress.export.vocabulary import read_vocabulary
from compress.io.atomic import writing
from compress.io.safetensors_file import type_name
from compress.lazy import np, torch, transformers
from compress.models.graph import forward
from compress.models.loading import build

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import Logits, PackedFolder
    from compress.models.graph import Graph
    from compress.progress import Bars

FILE = "model.gguf"
PLAIN = ("F32", "F16", "BF16")


def unfit(config: Any) -> Iterator[str]:
    """What a file of architecture `llama` cannot say about a model."""
    rope = getattr(config, "rope_parameters", None) or {}
    wrong = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "sliding_window": getattr(config, "sliding_window", None),
        "hidden_act": getattr(config, "hidden_act", "silu") not in ("silu", "swish") and config.hidden_act,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0 and rope["partial_rotary_factor"],
        "rope_type": rope.get("rope_type", "default") != "default" and rope["rope_type"],
    }
    for name, value in wrong.items():
        if value:
            yield f"this model's {name}, {value}, cannot be said in a GGUF file of architecture llama; export hf"


def names_in_file(graph: Graph) -> dict[str, str]:
    """Parameter -> its name in the file; one that has no place there is left out."""
    known, found = graph.family.export_names(Gguf.key), {}
    for parameter, _ in graph.tensors():
        module, _, leaf = parameter.rpartition(".")
        number = next((part for part in module.split(".") if part.isdigit()), "")
        template = known.get(module.replace(f".{number}.", ".{}.") if number else module)
        if template is not None:
            found[parameter] = f"{template.format(number)}.{leaf}"
    return found


@dataclass(frozen=True)
class Contents:
    """The tensors of a file."""

    made: PackedFolder

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.made.artifact.graph.model.config

    def tensors(self) -> dict[str, str]:
        """Parameter -> its name in the file, in the model's order; tied ones once."""
        names = names_in_file(self.made.artifact.graph)
        return {parameter: names[parameter] for parameter, _ in Dense(self.made.artifact, None).layout()}

    def read(self, parameter: str) -> Blocks:
        """One tensor as it stands in the file.

        Raises:
            CompressError: its codes fit no type.
        """
        artifact = self.made.artifact
        sites = artifact.made_sites(parameter)  # one: architectures with fused experts are refused
        encoding = artifact.weight(sites[0]).encoding if sites else None
        if encoding is None:
            values = Dense(artifact, None).read(parameter)[parameter]
            values = values if values.dim() == 2 and type_name(values.dtype) in PLAIN else values.float()  # norms
            blocks = Blocks(type_name(values.dtype), values.contiguous().view(torch.uint8))
        else:
            found = to_blocks(encoding)
            if isinstance(found, str):
                raise CompressError(
                    f"{parameter} fits no type of GGUF exactly, because of {found}; leave gguf out of `export:`, or "
                    "quantize with symmetric: true. What is done is kept: run the same command again"
                )
            blocks = found
        order = self.order(parameter, len(blocks.data))
        return blocks if order is None else replace(blocks, data=blocks.data[order])

    def order(self, parameter: str, rows: int) -> Tensor | None:
        """(rows,) which row of a parameter stands where, or None where they keep their places."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(parameter.rpartition(".")[0].rpartition(".")[2])
        return None if count is None else torch.arange(rows).view(count, 2, -1).transpose(1, 2).flatten()


@dataclass(frozen=True, kw_only=True)
class Gguf(Exporter):
    """One file for llama.cpp and what is built on it."""

    key: ClassVar[str] = "gguf"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    computes: ClassVar[str | None] = "float32"

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_missing("gguf", self.key)
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)
        names = names_in_file(graph)
        without = [parameter for parameter, _ in graph.tensors() if parameter not in names]
        if without:
            detail = f" (its {without[0]} has no name there)" if names else ""
            name = type(graph.model).__name__
            yield (
                f"only models built like Llama can be written, not {name}{detail}; export hf, which llama.cpp converts"
            )
            return
        config: Any = graph.model.config
        yield from unfit(config)
        source = Path(config.name_or_path)
        if source.is_dir():
            try:
                read_vocabulary(source, config)
            except UsageError as error:
                yield str(error)
        coded = {name: spec for name, spec in specs.items() if spec.form is not None}
        corrected = [name for name, spec in coded.items() if spec.low_rank is not None]
        if corrected:
            yield (
                f"blocks have no place for low-rank corrections, and {len(corrected)} layers have one, such as "
                f"{corrected[0]}; leave eora out, or export peft or hf"
            )
        wrong = {name: why for name, spec in coded.items() if (why := misfit(spec))}
        for why, count in Counter(wrong.values()).items():
            example = next(name for name, reason in wrong.items() if reason == why)
            yield f"{count} layers, such as {example}, have {why}"

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        import gguf

        folder.mkdir(parents=True, exist_ok=True)
        contents = Contents(made)
        names = contents.tensors()
        writer = gguf.GGUFWriter(folder / FILE, "llama")
        types: Counter[str] = Counter()
        for parameter in bars.over(names, len(names), "fit: gguf"):
            blocks = contents.read(parameter)
            kind, data = gguf.GGMLQuantizationType[blocks.type], blocks.data.numpy()
            writer.add_tensor_info(names[parameter], data.shape, data.dtype, data.nbytes, raw_dtype=kind)
            types[blocks.type] += data.ndim == 2
        describe(writer, contents, types.most_common(1)[0][0])
        with writing(folder / FILE), closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for parameter in bars.over(names, len(names), "write: gguf"):
                writer.write_tensor_data(contents.read(parameter).data.numpy())

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        import gguf

        contents = Contents(made)
        names = contents.tensors()
        there = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
        if there.keys() != set(names.values()):
            raise CompressError(f"{folder / FILE}: its tensors read back differently; the disk may be failing")
        types: Counter[str] = Counter()
        for parameter in bars.over(names, len(names), "read back: gguf"):
            tensor, values = there[names[parameter]], made.artifact.tensor(parameter).float()
            order = contents.order(parameter, len(values))
            meant = (values if order is None else values[order]).numpy()
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if not np.array_equal(found.view(np.int32), meant.view(np.int32)):
                raise CompressError(f"{folder / FILE}: {tensor.name} reads back differently; the disk may be failing")
            types[tensor.tensor_type.name] += 1
        return {"tensors_equal": len(names), "types": dict(types.most_common())}

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        return 1e-5

    def runner(self, made: PackedFolder, folder: Path) -> Logits:
        graph = replace(made.artifact.graph, model=read_back(folder))

        def logits(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = forward(graph, inputs).logits
            return found.float()

        return logits


def describe(writer: Any, contents: Contents, most: str) -> None:
    """Write what the model is, and its tokenizer. `most` is the type of most matrices."""
    import gguf

    config, vocabulary = contents.config, read_vocabulary(contents.made.folder, contents.config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kind = {"F32": "ALL_F32"}.get(most, f"MOSTLY_{most}")
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splits)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for kind, number in vocabulary.special.items():
        add[kind](number)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(vocabulary.ends)
    if vocabulary.chat:
        writer.add_chat_template(vocabulary.chat)


def read_back(folder: Path) -> Any:
    """A written file as transformers reads it, in float32."""
    # from_pretrained(folder, gguf_file=...) does the same, but wants the accelerate package installed.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = build(transformers.AutoConfig.from_pretrained(folder, gguf_file=FILE))
    with redirect_stderr(StringIO()):  # a progress bar
        tensors = load_gguf_checkpoint(str(folder / FILE), return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompressError(f"{folder / FILE}: transformers does not find {missing[0]} in it")
    return model.eval()
