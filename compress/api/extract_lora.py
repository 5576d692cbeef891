"""What a fine-tune adds to its base, as a LoRA adapter of the PEFT library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.api.output_folder import (
    RESULT,
    clear_result,
    publish_folder,
    refuse_destination,
    working_for,
)
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.adapters import PREFIX
from compress.checkpoint.opening import open_folder, open_model
from compress.engine.merge.checks import open_alike
from compress.errors import CheckpointError, NonFiniteError, UsageError
from compress.export.peft import ADAPTER, CONFIG, adapter_config, expressible
from compress.io.atomic import write_json, writing
from compress.io.keys import Watch
from compress.io.safetensors_file import in_range, write_as_made
from compress.models import adapters
from compress.models.companions import copy_companions
from compress.models.symmetry import is_transposed
from compress.passes.solvers.truncated import truncated
from compress.progress import Bars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.opening import OpenedModel

EXTRACTED = "extracted.json"
PIECE = 1 << 22  # numbers that are compared at once


@undisturbed()
def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
    bars: Bars | None = None,
) -> dict[str, Any]:
    """Write what a fine-tune adds to its base as an adapter: of every matrix the largest singular values.

    Linear layers, plain convolutions and untied embeddings become factors. Norms and biases are small, and are kept as
    they are in the fine-tune. What an adapter has no place for (fused experts, tied embeddings) is left out and listed.
    One matrix is in memory at a time. What was written is opened again and compared with the fine-tune.

    Args:
        base: the model that the fine-tune was made from: `demo`, a local folder or a hub id.
        tuned: the fine-tune; an adapter or a compressed delta, too.
        out: the folder to write; must not exist.
        rank: of every matrix, at most.
        energy: the share of a matrix' squared changes that is kept at least, 0 to 1; with `rank`, no more than that.
        overwrite: replace an existing `out`.
        bars: progress; by default, bars where stderr is a terminal.

    Returns:
        The rank and relative error of every layer, what is kept whole, what was left out, and the size.

    Raises:
        UsageError: models that do not belong together or do not differ: before anything is written.
        NonFiniteError: NaN or infinity in one of them.
    """
    _refuse_amount(rank, energy)
    destination, bars = Path(out).absolute(), bars or Bars()
    opened = open_model(base)
    if opened.adapter is not None:
        raise UsageError(f"{base} is an adapter; an adapter belongs to a model with weights of its own: give that")
    parent = open_alike(str(tuned), opened.artifact)
    read = {"base": opened.folders, "fine-tune": adapters.existing_parts(str(tuned))}
    refuse_destination(destination, read, overwrite)
    _refuse_existing(destination, overwrite)
    with bars.shown():
        found = _Differing.between(opened.artifact, parent, bars)
    if not found.layers:  # PEFT loads no adapter without factors
        others = [*found.whole, *found.left_out]
        why = f"they differ in {others[0]}, and in no matrix that has factors" if others else "the models are equal"
        raise UsageError(f"{tuned} adds nothing to {base} that an adapter could hold: {why}")
    with working_for(destination) as work, clear_result(work), bars.shown():
        _refuse_existing(destination, overwrite)
        watch = Watch.over([*opened.artifact.source.files(), *parent.source.files(), *opened.companions])
        made = work / RESULT
        made.mkdir()
        ranks = _write(found, made / ADAPTER, rank, energy, bars)
        local = Path(base).exists() or str(base) == "demo"
        config = adapter_config(opened.artifact.graph, ranks, str(opened.folder.absolute() if local else base))
        whole = sorted({owner for name in found.whole if (owner := _kept_module(found.base, name))})
        config |= {"modules_to_save": whole or None, "bias": "all" if found.biases else "none"}
        write_json(config, made / CONFIG)
        facts = _compared(found, opened, made, ranks, bars)
        write_json({"base": str(base), "tuned": str(tuned), "rank": rank, "energy": energy, **facts}, made / EXTRACTED)
        for part in adapters.existing_parts(str(tuned)):
            if part.is_dir():
                copy_companions(part, made)
        watch.refuse_changed()
        publish_folder(made, destination)
    return facts


def _refuse_amount(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise UsageError("say how much is kept: a rank, such as 16, or a share of the energy, such as 0.9")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy:g}: must be above 0 and at most 1")


def _refuse_existing(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise UsageError(f"{destination} exists; choose another -o, or give --overwrite")


@dataclass
class _Differing:
    """Where a fine-tune differs from its base.

    Attributes:
        base, tuned: the two.
        layers: names of modules whose matrices become factors.
        whole: parameters that are kept as they are in the fine-tune.
        left_out: tensors that an adapter has no place for.
    """

    base: Artifact
    tuned: Artifact
    layers: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def between(cls, base: Artifact, tuned: Artifact, bars: Bars) -> _Differing:
        """Compare every tensor, a piece at a time.

        Raises:
            NonFiniteError: NaN or infinity in one of them.
        """
        found, names = cls(base, tuned), [name for name, _ in base.graph.tensors()]
        for name in bars.over(names, len(names), "compare", "end"):
            if not found._differs(name):
                continue
            owner = name.rpartition(".")[0]
            if found._factors(name):
                found.layers.append(owner)
            elif name in base.graph.tied.values() or not (name.endswith(".bias") or _kept_module(base, name)):
                found.left_out.append(name)
            else:
                kept = _kept_module(base, name)
                inside = base.graph.model.get_submodule(kept).state_dict() if kept else ()  # PEFT wants all of it
                names_kept = [
                    each for leaf in inside if base.name_in_source(each := f"{kept}.{leaf}") in base.stored
                ] or [name]
                found.whole += [each for each in names_kept if each not in found.whole]
        return found

    @property
    def biases(self) -> list[str]:
        """Those of `whole` whose layers are not kept themselves."""
        return [name for name in self.whole if not _kept_module(self.base, name)]

    def pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, fine-tune), float32 or wider, flattened."""
        models = (self.base, self.tuned)
        sources = [(model.source, model.name_in_source(name)) for model in models]
        total = torch.Size(self.base.source.shape(sources[0][1])).numel()
        for start in range(0, total, PIECE):
            ours, theirs = (s.piece(stored, start, min(start + PIECE, total)) for s, stored in sources)
            yield ours.double(), theirs.double()

    def delta(self, name: str) -> Tensor:
        """What the fine-tune adds, float32."""
        ours, theirs = (model.source.read(model.name_in_source(name)) for model in (self.base, self.tuned))
        return theirs.float() - ours.float()

    def _differs(self, name: str) -> bool:
        differs = False
        for ours, theirs in self.pieces(name):
            if not in_range(ours) or not in_range(theirs):
                raise NonFiniteError(f"{name} holds NaN or infinity in one of the models; get a clean checkpoint")
            differs |= not torch.equal(ours, theirs)
        return differs

    def _factors(self, name: str) -> bool:
        """Whether PEFT adds factors to a parameter."""
        graph = self.base.graph
        owner, _, leaf = name.rpartition(".")
        module = graph.model.get_submodule(owner)
        plain = isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)
        plain |= isinstance(module, nn.Conv2d) and expressible(module)
        return plain and leaf == "weight" and name not in graph.tied.values()


def _kept_module(base: Artifact, name: str) -> str:
    """The module that is kept whole for a parameter's sake, such as a norm; empty where there is none."""
    owner = name.rpartition(".")[0]
    module = base.graph.model.get_submodule(owner)
    layer = isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) or is_transposed(module)
    parameters = list(module.parameters())
    small = bool(parameters) and all(p.dim() == 1 for p in parameters)
    return owner if owner and small and not layer and not list(module.children()) else ""


def _write(found: _Differing, file: Path, rank: int | None, energy: float | None, bars: Bars) -> dict[str, int]:
    """Write the factors, and what is kept whole.

    Returns:
        Layer -> the rank that it got.
    """
    base, layers, ranks = found.base, set(found.layers), dict[str, int]()
    modules = dict(base.graph.model.named_modules())

    def factor_names(layer: str) -> tuple[str, str]:
        looked_up = isinstance(modules[layer], nn.Embedding)
        parts = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
        return f"{PREFIX}{layer}.{parts[0]}", f"{PREFIX}{layer}.{parts[1]}"

    def whole_name(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{PREFIX}{owner}.base_layer.{leaf}" if owner in layers else PREFIX + name

    def made() -> Iterator[tuple[str, Tensor]]:
        for layer in found.layers:
            name, module = f"{layer}.weight", modules[layer]
            dtype = base.source.dtype(base.name_in_source(name))
            delta = found.delta(name)
            turned = is_transposed(module) or isinstance(module, nn.Embedding)
            best = truncated(delta.T if turned else delta.flatten(1), rank, energy)
            a, b = best.a, best.b
            if isinstance(module, nn.Conv2d):
                a, b = a.view(-1, *delta.shape[1:]), b[:, :, None, None]
            ranks[layer] = len(a)
            yield from zip(factor_names(layer), (a.to(dtype), b.to(dtype)), strict=True)
        for name in found.whole:
            dtype = base.source.dtype(base.name_in_source(name))
            yield whole_name(name), found.tuned.source.read(found.tuned.name_in_source(name)).to(dtype)

    names = [each for layer in found.layers for each in factor_names(layer)] + [whole_name(n) for n in found.whole]
    with writing(file):
        write_as_made(file, bars.over(made(), len(names), "extract: tensors"), names, {"format": "pt"})
    return ranks


def _compared(
    found: _Differing, opened: OpenedModel, folder: Path, ranks: dict[str, int], bars: Bars
) -> dict[str, Any]:
    """Open what was written, and measure how far the base with it is from the fine-tune.

    Raises:
        CheckpointError: it cannot be opened, or holds something else than what was written.
    """
    merged = _Differing(open_folder(opened.folder, folder).artifact, found.tuned)
    names = [f"{layer}.weight" for layer in found.layers] + found.whole + found.left_out
    squares = {}
    for name in bars.over(names, len(names), "compare the adapter", "end"):
        lost = sum(float((a - b).square().sum()) for a, b in merged.pieces(name))
        squares[name] = lost, sum(float((a - b).square().sum()) for a, b in found.pieces(name))
        if not math.isfinite(lost):
            raise CheckpointError(f"{name} of the adapter reads back with NaN or infinity; the numbers are too large")

    def error(*of: str) -> float:
        total = sum(squares[name][1] for name in of)
        return math.sqrt(sum(squares[name][0] for name in of) / total) if total else 0.0

    return {
        "error": error(*names),
        "bytes": (folder / ADAPTER).stat().st_size,
        "layers": {layer: {"rank": ranks[layer], "error": error(f"{layer}.weight")} for layer in found.layers},
        "whole": found.whole,
        "left_out": found.left_out,
    }
