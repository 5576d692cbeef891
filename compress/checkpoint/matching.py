"""The tensors of a folder, matched with the model that config.json describes: each has one place, or is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.artifact import Artifact
from compress.checkpoint.converted import Conversions, ConvertedSource
from compress.errors import CheckpointError
from compress.lazy import torch, transformers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from compress.checkpoint.sources import Source
    from compress.models.graph import Graph

RUNNING = ("running_mean", "running_var")  # without them a batch normalisation is another one
# Endings of what quantizers store beside or in the place of a weight.
QUANTIZED = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".input_scale", ".absmax", ".quant_map", ".SCB",
)  # fmt: skip
# Constants that old checkpoints hold, and that models compute themselves now.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.masked_bias)$")
PIECE = 1 << 22  # numbers that are compared at once


@dataclass
class _Found:
    """What of the files has which place.

    Attributes:
        source: the files, under the names of the model where it puts parameters together of several tensors.
        places: name in the model, tied ones once -> names in `source`.
        extra: names in the files without a place.
    """

    source: Source
    places: dict[str, list[str]] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Matched:
    """A folder's weights with the structure that they fit.

    Attributes:
        artifact: the weights.
        notes: sentences on tensors that the model has no place for.
    """

    artifact: Artifact
    notes: tuple[str, ...]


def match(folder: Path, source: Source, graph: Graph) -> Matched:
    """A folder's weights matched with the model that its configuration describes.

    Args:
        folder: for messages.
        source: the weights.
        graph: of the model; a transformers model.

    Raises:
        CheckpointError: names, shapes or types do not fit the model; two tensors for one place that differ; tensors
            that the model has no place for.
    """
    model = graph.model
    assert isinstance(model, transformers.PreTrainedModel)
    spelling = Spelling(model)
    found = _placed(source, graph, spelling)
    quantized = next((name for name in found.extra if name.endswith(QUANTIZED)), None)
    if quantized is not None:
        _already_quantized(folder, f"it has tensors such as {quantized}")
    renamed: dict[str, str] = {}
    absent = _refuse_missing(folder, graph, source, found)
    carried = _refuse_extra(folder, graph, source, spelling, found.extra)
    for name, tensor in graph.tensors():
        stored = found.places.get(name)
        if stored is None:
            continue
        _refuse_other(folder, found.source, stored, tensor)
        _refuse_two(folder, found.source, name, stored)
        tied = [n for n, kept in graph.tied.items() if kept == name]
        renamed.update({n: stored[0] for n in (name, *tied) if n != stored[0]})
    graph = replace(graph, buffers=tuple(name for name in graph.buffers if name not in absent))
    notes = [
        f"{type(model).__name__} of transformers makes no use of {len(carried)} tensors of the files, such as {name}; "
        "they are in the result as they are"
        for name in carried[:1]
    ]
    return Matched(Artifact(graph, found.source, renamed, carried=tuple(carried)), tuple(notes))


def _refuse_missing(folder: Path, graph: Graph, source: Source, found: _Found) -> set[str]:
    """Refuse a parameter without a tensor; returns the buffers without one, which the model computes."""
    without = [name for name, _ in graph.tensors() if name not in found.places]
    absent = {name for name in without if name in graph.buffers and not name.endswith(RUNNING)}
    missing = [name for name in without if name not in absent]
    kind = type(graph.model).__name__
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} parameters or buffers of {kind} are not in the files, such as {missing[0]} "
            f"(the files have, for example, {min(source.names())}); the files are not whole, or config.json belongs "
            "to another model: fetch both from one place"
        )
    return absent


class Spelling:
    """How a name of the files may be spelled in the model: as it is, with or without the base model's prefix."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        conversions = get_model_conversion_mapping(model)
        # Old spellings that transformers renames while loading, such as GPT-NeoX's embed_out for lm_head.
        self.renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        # What makes parameters out of several tensors, or several of one.
        self.converters = [each for each in conversions if isinstance(each, WeightConverter)]

    def renamed(self, name: str) -> str:
        """The name that transformers looks for, every renaming applied in turn."""
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def converted(self, name: str) -> tuple[Any, str, str] | None:
        """The first converter that takes a tensor, the name of what it makes, and which of its patterns that was."""
        renamed = self.renamed(name)
        for converter in self.converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                return converter, target, pattern
        return None

    def place(self, stored: str, names: Collection[str]) -> str | None:
        """Which of the model's names a tensor of a file has, or begins to make; None where it has no place."""
        made = self.converted(stored)
        if made is not None:
            return next((s for s in self.prefixed(made[1]) if s in names), None)
        return next((s for s in self.of(stored) if s in names), None)

    def of(self, name: str) -> list[str]:
        """All spellings, the likeliest first."""
        return [spelled for each in (name, self.renamed(name)) for spelled in self.prefixed(each)]

    def prefixed(self, name: str) -> tuple[str, str, str]:
        """A name as it is, without the base model's prefix, and with it."""
        return name, name.removeprefix(self.prefix), self.prefix + name


def _placed(source: Source, graph: Graph, spelling: Spelling) -> _Found:
    """Every name of the files, under that in the model."""
    names = {name: name for name in graph.buffers}
    names |= {name: graph.tied.get(name, name) for name, _ in graph.model.named_parameters(remove_duplicate=False)}
    order = {name: i for i, name in enumerate(names)}
    conversions = Conversions(graph.model)
    whole: list[str] = []
    for stored in source.names():
        made = spelling.converted(stored)
        target = next((s for s in spelling.prefixed(made[1]) if s in names), None) if made else None
        if made is None or target is None:
            whole.append(stored)
        else:
            conversions.add(made[0], target, made[2], stored)
    recipes = conversions.recipes()
    found = _Found(ConvertedSource(source, recipes) if recipes else source)
    ranks = {}
    for stored in [*whole, *(name for name in found.source.names() if name not in set(whole))]:
        spellings = spelling.of(stored)
        name = next((s for s in spellings if s in names), None)
        if name is None:
            found.extra.append(stored)
        else:
            ranks[stored] = (order[name], spellings.index(name))
            found.places.setdefault(names[name], []).append(stored)
    for several in found.places.values():
        several.sort(key=lambda stored: ranks[stored])
    return found


def _refuse_other(folder: Path, source: Source, stored: Iterable[str], tensor: torch.Tensor) -> None:
    """Refuse another shape, and codes in the place of weights."""
    for name in stored:
        dtype = source.dtype(name)
        if tensor.is_floating_point() and (dtype.itemsize == 1 or not dtype.is_floating_point):
            _already_quantized(folder, f"{name} is {source.dtype(name)}".replace("torch.", ""))
        if source.shape(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {source.shape(name)}, but config.json says {tuple(tensor.shape)}; "
                "the configuration belongs to another model"
            )


def _already_quantized(folder: Path, because: str) -> None:
    raise CheckpointError(
        f"{folder} is already quantized: {because}, though config.json has no quantization_config; a pipeline starts "
        "from the uncompressed model"
    )


def _refuse_two(folder: Path, source: Source, name: str, stored: Sequence[str]) -> None:
    """Refuse a second tensor for one place, unless it holds the same numbers."""
    count = torch.Size(source.shape(stored[0])).numel()
    for other in stored[1:]:
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            if not torch.equal(
                source.piece(stored[0], start, stop).double(), source.piece(other, start, stop).double()
            ):
                raise CheckpointError(
                    f"{folder}: the files hold both {stored[0]} and {other}, which differ, and the configuration makes "
                    f"them one tensor ({name}). If both are meant, set tie_word_embeddings to false in config.json; "
                    "else take the other out of the file"
                )


def _refuse_extra(folder: Path, graph: Graph, source: Source, spelling: Spelling, extra: Sequence[str]) -> list[str]:
    """Refuse tensors that the model has no place for; returns those that transformers declares to ignore.

    What the model computes itself, such as rotary frequencies that old checkpoints hold, is neither.
    """
    model: Any = graph.model
    computed = {name for name, _ in model.named_buffers()}
    left: list[str] = []
    unknown: list[str] = []
    for name in sorted(extra):
        spellings = spelling.of(name)
        if not computed.isdisjoint(spellings) or COMPUTED.search(spellings[0]):
            continue
        known = bool(ignored(model, spellings))
        if known and source.shape(name)[:2] == (1, 1):
            continue  # a causal mask, which is computed now
        (left if known else unknown).append(name)
    if unknown:
        _refuse_unknown(folder, graph, source, spelling, unknown)
    return left


def ignored(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some names of a file that a class of transformers declares to leave out when it is loaded.

    What the model has is none of them: GPT-2 leaves out `h.0.attn.bias`, and means no `h.0.attn.c_attn.bias`.
    """
    own = model.state_dict().keys()
    declared = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return tuple(name for name in names if name not in own and any(pattern.search(name) for pattern in declared))


def _refuse_unknown(folder: Path, graph: Graph, source: Source, spelling: Spelling, unknown: Sequence[str]) -> None:
    """Say what the first telling tensor without a place is."""
    kind = type(graph.model).__name__
    layers = {name.rpartition(".")[0] for name, _ in graph.model.named_parameters()}
    biases = [n for n in unknown if n.endswith(".bias")]
    biases = [n for n in biases if not layers.isdisjoint(s.removesuffix(".bias") for s in spelling.of(n))]
    if biases:
        raise CheckpointError(
            f"{folder}: the files hold {biases[0]} ({len(biases)} such biases), but by config.json {kind} has no bias "
            "there and computes something else; config.json has lost a setting (such as attention_bias) or belongs "
            "to another model: fetch it again"
        )
    beyond = _blocks_beyond(graph, unknown)
    if beyond is not None:
        raise CheckpointError(
            f"{folder}: {beyond} belongs to a block beyond the {len(graph.blocks)} that config.json describes, and "
            "would be dropped; config.json belongs to another model: fetch it again"
        )
    raise CheckpointError(
        f"{folder}: {kind} has no place for {unknown[0]} ({len(unknown)} of {len(list(source.names()))} tensors have "
        "none); they would be dropped. If the model does not need them, take them out of the files"
    )


def _blocks_beyond(graph: Graph, names: Iterable[str]) -> str | None:
    """The first name that belongs to a block that the model does not have."""
    # A block may lie in a list that lies in a list: stages.0.layers.1.
    parts = [name.split(".") for name in graph.blocks]
    known = {".".join(p[: i + 1]) for p in parts for i, part in enumerate(p) if part.isdigit()}
    lists = {name.rpartition(".")[0] for name in known} - {""}
    for name in names:
        for prefix in lists:
            tail = name.removeprefix(f"{prefix}.")
            first = tail.split(".")[0]
            if tail != name and first.isdigit() and f"{prefix}.{first}" not in known:
                return name
    return None
