"""OUT/gguf: one file for llama.cpp, with codes in blocks of GGML whose values are exactly those of the packed model."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CompressError, UsageError
from compress.export.base import Exporter
from compress.export.gguf import keys
from compress.export.gguf.architectures import KINDS, UNWRITTEN, architecture_of
from compress.export.gguf.blocks import largest_bytes, misfit, sort_of
from compress.export.gguf.reading import read_back
from compress.export.gguf.rope import rope_tensors, unfit_rope
from compress.export.gguf.tensors import Contents, Layout
from compress.export.gguf.unfit import unfit
from compress.export.gguf.vocabulary import read_vocabulary
from compress.export.refusals import refuse_added, refuse_corrected, refuse_missing, refuse_rounded
from compress.io.atomic import writing
from compress.lazy import np, torch
from compress.models.graph import forward

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import Logits, PackedFolder
    from compress.models.graph import Graph
    from compress.progress import Bars

FILE = "model.gguf"
MIXTURES = ("Q3_K", "Q4_K", "Q5_K")  # types with which llama.cpp mixes others, more of them (M) or fewer (S)


@dataclass(frozen=True, kw_only=True)
class Gguf(Exporter):
    """One file for llama.cpp and what is built on it."""

    key: ClassVar[str] = "gguf"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    used: ClassVar[tuple[str, str]] = ("console", "llama-server -m FOLDER/model.gguf")
    computes: ClassVar[str | None] = "float32"

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_missing("gguf", self.key)
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)
        config: Any = getattr(graph.model, "config", None)
        architecture = architecture_of(config)
        if architecture is None:
            yield _unknown(graph)
            return
        yield from unfit(config, architecture)
        yield from unfit_rope(config, architecture)
        nameless = Layout(graph, architecture).nameless()
        if nameless:
            yield (
                f"a GGUF file of architecture {architecture.name} has no place for {len(nameless)} tensors of this "
                f"model, such as {nameless[0]}; export hf"
            )
        source = Path(config.name_or_path)
        if source.is_dir():
            try:
                read_vocabulary(source, config)
            except UsageError as error:
                yield str(error)
        yield from _misfits(specs)
        yield from _mixed(graph, specs)

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        return super().expected_bytes(spec, computed) if spec.form is None else largest_bytes(spec)

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        import gguf

        folder.mkdir(parents=True, exist_ok=True)
        contents = _contents(made)
        pieces, factors = contents.pieces, rope_tensors(contents.layout.config)
        writer = gguf.GGUFWriter(folder / FILE, contents.layout.architecture.name)
        types: Counter[str] = Counter()
        in_blocks: set[str] = set()
        for piece in bars.over(pieces, len(pieces), "fit: gguf"):
            blocks = contents.read(piece)
            kind, data = gguf.GGMLQuantizationType[blocks.type], blocks.data.numpy()
            writer.add_tensor_info(piece.name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
            types[blocks.type] += data.ndim >= 2
            in_blocks |= {blocks.type} if piece.name.startswith("blk.") and data.ndim >= 2 else set()
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.numpy().dtype, values.nbytes)
        describe(writer, contents, made.folder, file_type(types.most_common(1)[0][0], in_blocks))
        with writing(folder / FILE), closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for piece in bars.over(pieces, len(pieces), "write: gguf"):
                writer.write_tensor_data(contents.read(piece).data.numpy())
            for values in factors.values():
                writer.write_tensor_data(values.numpy())

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        import gguf

        contents = _contents(made)
        meant = rope_tensors(contents.layout.config)
        there = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
        if there.keys() != {piece.name for piece in contents.pieces} | meant.keys():
            raise CompressError(f"{folder / FILE}: its tensors read back differently; the disk may be failing")
        types: Counter[str] = Counter()
        for piece in bars.over(contents.pieces, len(contents.pieces), "read back: gguf"):
            _hold(there[piece.name], contents.meant(piece), folder)
            types[there[piece.name].tensor_type.name] += 1
        for name, values in meant.items():
            _hold(there[name], values, folder)
        return {"tensors_equal": len(there), "types": dict(types.most_common())}

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        return 1e-5

    def runner(self, made: PackedFolder, folder: Path) -> Logits | None:
        model = read_back(folder / FILE, made.artifact.graph.model.config)
        if model is None:
            return None
        graph = replace(made.artifact.graph, model=model)

        def logits(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = forward(graph, inputs).logits
            return found.float()

        return logits


def describe(writer: Any, contents: Contents, source: Path, kind: str) -> None:
    """Write what the model is, and its tokenizer. `kind` is what llama.cpp calls the types of its matrices."""
    import gguf

    layout = contents.layout
    writer.add_type("model")
    keys.add(writer, layout.architecture.name, keys.keys(layout.config, layout.architecture))
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    read_vocabulary(source, layout.config).say(writer)


def file_type(most: str, in_blocks: Collection[str]) -> str:
    """What llama.cpp calls a file by the type of most matrices, and by all that the blocks of the model have."""
    if most in MIXTURES:
        mixed = any(kind.endswith("_K") and kind != most for kind in in_blocks)
        return f"MOSTLY_{most}_{'M' if mixed else 'S'}"
    return {"F32": "ALL_F32"}.get(most, f"MOSTLY_{most}")


def _contents(made: PackedFolder) -> Contents:
    graph = made.artifact.graph
    architecture = architecture_of(graph.model.config)
    assert architecture is not None
    return Contents(made.artifact, Layout(graph, architecture))


def _hold(found: Any, meant: Tensor, folder: Path) -> None:
    import gguf

    values = gguf.quants.dequantize(found.data, found.tensor_type)
    if not np.array_equal(values.view(np.int32), meant.contiguous().numpy().view(np.int32)):
        raise CompressError(f"{folder / FILE}: {found.name} reads back differently; the disk may be failing")


def _unknown(graph: Graph) -> str:
    kind = getattr(getattr(graph.model, "config", None), "model_type", "")
    why = f": {UNWRITTEN[kind]}" if kind in UNWRITTEN else ""
    return (
        f"a {type(graph.model).__name__} is not written as GGUF{why}; known are {', '.join(sorted(KINDS))}; export hf, "
        "which llama.cpp converts"
    )


def _misfits(specs: Mapping[str, Spec]) -> Iterator[str]:
    coded = {name: spec for name, spec in specs.items() if spec.form is not None}
    yield from refuse_corrected(coded, "GGUF")
    wrong = {name: why for name, spec in coded.items() if (why := misfit(spec))}
    for why, count in Counter(wrong.values()).items():
        example = next(name for name, reason in wrong.items() if reason == why)
        yield f"{count} layers, such as {example}, have {why}"


def _mixed(graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
    """Experts that are one tensor of a file, of codes that no type of block has in common."""
    sorts: dict[str, dict[str, str]] = {}
    for site in graph.sites:
        form = specs[site.name].form if site.name in specs else None
        if site.is_expert and form is not None:
            sorts.setdefault(site.parameter, {}).setdefault(sort_of(form), site.name)
    mixed = [names for names in sorts.values() if len(names) > 1]
    if mixed:
        (first, one), (second, other) = sorted(mixed[0].items())[:2]
        yield (
            f"all experts that the model keeps in one tensor are blocks of one type, and {one} has {first}, {other} "
            f"{second} ({len(mixed)} such tensors); quantize them alike, or export hf"
        )
