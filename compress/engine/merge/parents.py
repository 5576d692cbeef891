"""The models that are merged with the one a pipeline is run on: opened, and compared with it before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from compress.checkpoint.artifact import Artifact
from compress.checkpoint.delta.file import Delta, in_folder, locate
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.opening import open_folder
from compress.checkpoint.sources import FolderSource
from compress.errors import UsageError
from compress.models import adapters
from compress.passes.merge.delta_pass import DeltaPass

if TYPE_CHECKING:
    from compress.models.graph import Graph
    from compress.passes.merge.base import MergePass


def open_parent(model: str, base: Artifact, pass_: MergePass) -> Artifact:
    """A model to merge with, or an adapter or compressed delta that makes one; matched with the base's structure.

    Args:
        model: what the user calls it.
        base: the model that the pipeline is run on, as it was before every pass: what deltas belong to.
        pass_: what it is opened for.

    Raises:
        UsageError: it cannot be read, is of another make than the base, or is a delta of another.
    """
    if isinstance(pass_, DeltaPass) and pass_.codes_factors:
        adapter_of(model)
    parent, graph = _opened(model, base), base.graph
    if parent.graph is not graph:
        _refuse_other_make(model, graph, parent.graph)
    _refuse_other_shapes(model, graph, parent, pass_)
    return parent


def adapter_of(model: str) -> Path:
    """The folder of the adapter that a user names.

    Raises:
        UsageError: it is none.
    """
    found = None if Path(model).is_file() else adapters.locate(model)
    if found is None or found.adapter is None:
        raise UsageError(
            f"{model} is no LoRA adapter, and factors: true codes those of one; leave factors out, or make one of a "
            "fine-tune: compress extract-lora"
        )
    return found.adapter


def _opened(model: str, base: Artifact) -> Artifact:
    """What a user calls a model, whatever it is."""
    found = None if Path(model).is_file() else adapters.locate(model)
    if found is not None and found.adapter is not None:
        return open_folder(found.folder, found.adapter).artifact
    place = locate(model) if found is None else in_folder(found.folder)
    if place.is_file():
        delta = Delta.open(place)
        delta.refuse_other(base, model)
        return with_delta(base, delta)
    if not isinstance(
        base.graph.model, PreTrainedModel
    ):  # a module of its own class: its folder has nothing but values
        return Artifact(base.graph, FolderSource(place), dict(base.graph.tied))
    return open_folder(place).artifact


def _refuse_other_make(model: str, graph: Graph, parent: Graph) -> None:
    ours, theirs = type(graph.model).__name__, type(parent.model).__name__
    if ours != theirs:
        raise UsageError(f"{model} is a {theirs} and the base is a {ours}: only models of one architecture are merged")
    if len(graph.blocks) != len(parent.blocks):
        raise UsageError(
            f"{model} has {len(parent.blocks)} blocks and the base {len(graph.blocks)}: merge fine-tunes of one model"
        )
    alone = sorted(graph.tied.keys() - parent.tied.keys())
    if alone:
        raise UsageError(
            f"{model} has a {alone[0]} of its own, which the base ties to {graph.tied[alone[0]]}: it would be lost. "
            f"Untie it in the base (tie_word_embeddings: false), or tie it in {model}"
        )


def _refuse_other_shapes(model: str, graph: Graph, parent: Artifact, pass_: MergePass) -> None:
    free = vocabulary_names(graph)
    there = parent.stored
    for name, tensor in graph.tensors():
        if not tensor.is_floating_point() or not pass_.selects(name, in_block=True):
            continue
        stored = parent.name_in_source(name)
        if stored not in there:
            raise UsageError(f"{model} has no {name}, which the base has: only models of one architecture are merged")
        ours, theirs = tuple(tensor.shape), parent.source.shape(stored)
        if ours == theirs:
            continue
        if name in free and ours[1:] == theirs[1:]:
            if pass_.vocabulary == "common":
                continue
            raise UsageError(
                f"{model} has {theirs[0]} rows in {name} and the base {ours[0]}: their vocabularies differ. With "
                "vocabulary: common the rows that all have are merged, and the further ones of the base stay"
            )
        raise UsageError(
            f"{name} has shape {theirs} in {model} and {ours} in the base: only models of one shape are merged. "
            "`exclude` it to keep the base's"
        )


def vocabulary_names(graph: Graph) -> set[str]:
    """Names of the tensors with a row for every token."""
    if not graph.takes_tokens:
        return set()
    assert isinstance(graph.model, PreTrainedModel)
    tables = [graph.model.get_input_embeddings(), graph.model.get_output_embeddings()]
    return {
        graph.tied.get(f"{name}.{leaf}", f"{name}.{leaf}")
        for name, module in graph.model.named_modules()
        if any(module is table for table in tables)
        for leaf, _ in module.named_parameters(recurse=False)
    }
