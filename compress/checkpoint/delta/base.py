"""Which model a delta belongs to: names, types and shapes of its tensors, and a digest of samples of each.

A tensor of up to `SAMPLES * LENGTH` elements is read whole. Of a larger one, samples at equal distances from its first
element to its last: another fine-tune differs all over its tensors, and is found without reading them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.io.keys import key_of
from compress.io.safetensors_file import bytes_of
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.sources import Source

SAMPLES, LENGTH = 16, 1024


def described_tensors(base: Artifact) -> dict[str, str]:
    """Tensor -> its type, shape and digest, as in `bfloat16 192x576 0123456789abcdef`."""
    return {name: _described_tensor(base, name) for name, tensor in base.graph.tensors() if tensor.is_floating_point()}


def class_of(base: Artifact) -> str:
    """The name of the model's class."""
    return type(base.graph.model).__name__


def digest_of_tensors(base: Artifact) -> str:
    """One digest of what `described_tensors` says, for files that would be mostly that."""
    return key_of(described_tensors(base))


def refuse_another(base: Artifact, made_for: str, digest: str, delta: str) -> None:
    """Refuse a base that a delta was not made for, of which only `digest_of_tensors` is known.

    Raises:
        UsageError: it is another.
    """
    if made_for != class_of(base):
        raise UsageError(f"{delta} was made for a {made_for}, and the base is a {class_of(base)}")
    if digest != digest_of_tensors(base):
        raise UsageError(
            f"{delta} was made for another base: types, shapes or values of some tensors differ. Give the very model "
            "that it was made from"
        )


def refuse_other(base: Artifact, made_for: str, tensors: Mapping[str, str], delta: str) -> None:
    """Refuse a base that a delta was not made for.

    Args:
        base: the model that the delta is to be added to.
        made_for: the class of the model that it was made for.
        tensors: what `described_tensors` said of that model.
        delta: what the user calls the delta.

    Raises:
        UsageError: names what differs.
    """
    if made_for != class_of(base):
        raise UsageError(f"{delta} was made for a {made_for}, and the base is a {class_of(base)}")
    here = described_tensors(base)
    alone = sorted(tensors.keys() ^ here.keys())
    if alone:
        has, lacks = ("its base", "this one") if alone[0] in tensors else ("this base", "its base")
        raise UsageError(f"{delta} was made for another base: {has} has a tensor {alone[0]}, and {lacks} has none")
    differing = [name for name, said in tensors.items() if said != here[name]]
    for name in differing:
        meant, found = tensors[name].rpartition(" ")[0], here[name].rpartition(" ")[0]
        if meant != found:
            raise UsageError(f"{delta} was made for another base: {name} was {meant} there, and is {found} here")
    if differing:
        raise UsageError(
            f"{delta} was made for another base: {len(differing)} of {len(tensors)} tensors hold other values, such as "
            f"{differing[0]}. Give the very model that it was made from"
        )


def _described_tensor(base: Artifact, name: str) -> str:
    stored = base.name_in_source(name)
    dtype, shape = str(base.source.dtype(stored)).removeprefix("torch."), base.source.shape(stored)
    digest = hashlib.sha256()
    for sample in _samples(base.source, stored):
        digest.update(bytes_of(sample))
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'} {digest.hexdigest()[:16]}"


def _samples(source: Source, name: str) -> Iterator[Tensor]:
    total, dtype = torch.Size(source.shape(name)).numel(), source.dtype(name)
    if total <= SAMPLES * LENGTH:
        yield source.piece(name, 0, total).to(dtype)
        return
    for i in range(SAMPLES):
        start = i * (total - LENGTH) // (SAMPLES - 1)
        yield source.piece(name, start, start + LENGTH).to(dtype)
