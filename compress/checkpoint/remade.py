"""A source of which some tensors are what passes made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.checkpoint.artifact import Packed
from compress.checkpoint.sources import ChangedSource
from compress.encodings import spec_of
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Weight


class RemadeSource(ChangedSource):
    """The source of an artifact, some tensors as they stand in it. They have the shape and type that the source has.

    Args:
        made: where they are read when asked for; it must not change any more.
        remade: name in the source -> parameter in the model.
    """

    def __init__(self, made: Artifact, remade: Mapping[str, str]):
        super().__init__(made.source)
        self._made, self._remade = made, dict(remade)
        self._held: tuple[str, int, Tensor] | None = None  # of what is read piece by piece: name, number, values

    def read(self, name: str) -> Tensor:
        if name not in self._remade:
            return self.before.read(name)
        return self._made.tensor(self._remade[name]).to(self.dtype(name), copy=True)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._remade:
            return self.before.piece(name, start, stop)
        size = math.prod(self.shape(name)) // self._count(name)
        parts = []
        for number in range(start // size, -(-stop // size)):
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            parts.append(self._part(name, number)[first:last].to(self.dtype(name), copy=True))
            if last == size:
                self._held = None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _count(self, name: str) -> int:
        """How many parts a tensor is read in: the experts of a fused one."""
        return max(1, len(self._made.made_sites(self._remade[name])))

    def _part(self, name: str, number: int) -> Tensor:
        """One of them, flattened, held until its end was asked for."""
        if self._held is None or self._held[:2] != (name, number):
            sites = self._made.made_sites(self._remade[name])
            if sites and sites[0].is_expert:
                value = sites[number].ref.laid(self._made.weight(sites[number]).dequantize())
            else:
                value = self.read(name)
            self._held = name, number, value.flatten()
        return self._held[2]


def settled(artifact: Artifact) -> Artifact:
    """The same model, in which what passes made dense counts as the original.

    What they masked, quantized or factored is still compared with what it was before. A bias that a layer was given
    has no place in the source: it is restated.
    """
    sites = {p: artifact.sites_of(p) for p in dict.fromkeys(artifact.sites[n].parameter for n in artifact.committed)}
    dense = {p for p, own in sites.items() if all(_is_dense(artifact.committed.get(s.name)) for s in own)}
    added = {name: made for name, made in artifact.vectors.items() if artifact.added(name)}
    remade = {artifact.name_in_source(name): name for name in (*dense, *artifact.vectors.keys() - added.keys())}
    if not remade and not added:
        return artifact
    gone = {site.name for parameter in dense for site in sites[parameter]}
    return replace(
        artifact,
        source=RemadeSource(artifact, remade),
        committed={name: made for name, made in artifact.committed.items() if name not in gone},
        restated={name: made for name, made in artifact.restated.items() if name not in gone} | added,
        vectors=added,
    )


def _is_dense(made: Weight | Packed | None) -> bool:
    if made is None:
        return True
    spec = made.spec if isinstance(made, Packed) else spec_of(made)
    return spec.is_dense


__all__ = ["RemadeSource", "settled"]
