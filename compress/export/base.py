"""What an exporter is: a frozen dataclass whose fields are its options, that writes one folder and checks it.

An exporter reads a finished packed folder. It neither rounds nor fits anything: what it cannot hold as it is, it
refuses, before a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from compress.runtime.cache import cached_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.encodings.cache import CacheForm
    from compress.errors import OptionError
    from compress.models.graph import Graph
    from compress.progress import Bars

FLOAT = 4
Logits: TypeAlias = "Callable[[Tensor], Tensor]"  # token ids (rows, length), or images -> logits float32


@dataclass(frozen=True)
class PackedFolder:
    """A finished packed folder.

    Attributes:
        folder: where it is.
        artifact: its weights, packed, and everything else in it.
        dtype: what its pipeline computed in.
    """

    folder: Path
    artifact: Artifact
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Exporter(ABC):
    """A container for a compressed model, written as OUT/<key>.

    Attributes:
        files: without one of these the folder is not whole.
        used: how it is run, for its model card: a language of code, and the code, where FOLDER stands for the folder
            and LOADER for the class of transformers that loads the model.
        computes: the type it is compared in; None for the pipeline's own.
        libraries: bytes of memory that what it imports takes.
        bounded: whether it never writes more than it expects to.
        turns: whether it can say that the inputs of a layer are turned while the model runs.
    """

    key: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    used: ClassVar[tuple[str, str]]
    computes: ClassVar[str | None] = None
    libraries: ClassVar[int] = 0
    bounded: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def check(self) -> Iterator[OptionError]:
        """Every option that the others make impossible; types and ranges are declared on the fields."""
        return iter(())

    def mistakes(self) -> Iterator[OptionError]:
        """Every impossible option."""
        return self.check()

    def reasons(
        self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str], caches: Mapping[str, CacheForm]
    ) -> Iterator[str]:
        """Why it cannot hold a model: what concerns every container, and its own `refusals`.

        Args:
            graph: its structure.
            specs: of every site that was worked on.
            added: layers that were given a bias their class of model has not.
            caches: how each attention layer rounds what it keeps that does.
        """
        if graph.turned and not self.turns:
            yield (
                f"it has no place for turned inputs, and those of {len(graph.turned)} layers are, such as "
                f"{next(iter(graph.turned))}; leave `online` out of rotate, or this format out of `export:`"
            )
        yield from self.refusals(graph, specs, added)
        yield from _cache_refusals(self, graph, specs, caches)

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        """Why this container in particular could not hold a model.

        Args:
            graph: its structure.
            specs: of every site that was worked on.
            added: layers that were given a bias their class of model has not.
        """
        return iter(())

    def refuse_cache(self, form: CacheForm, specs: Mapping[str, Spec]) -> str | None:
        """Why it could not hold how a key-value cache is rounded, in words; None where it could.

        Args:
            form: of the rounding.
            specs: of every site that was worked on.
        """
        return (
            f"{self.key} has no place for the scales of kv_cache, so the cache would stay in 16 bits; leave kv_cache "
            "out, or export compressed-tensors"
        )

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        """About how much it writes of a layer that was worked on, rather more than less.

        Args:
            spec: of the layer in the packed folder.
            computed: the type that the pipeline computes in.
        """
        numbers = spec.shape[0] * spec.shape[1]
        if spec.form is None:
            return max(spec.num_bytes, numbers * FLOAT)
        # Not every container knows every width: codes of up to 4 bits take 4, others 8, and their scales.
        narrow = 5 * numbers // 8
        return max(spec.num_bytes, narrow if spec.num_bytes <= narrow else 9 * numbers // 8)

    @abstractmethod
    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        """Write into `folder`, which will be renamed to `final`."""

    @abstractmethod
    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        """Read everything back and compare it with what was meant; returns facts for the report.

        Raises:
            CompressError: something differs.
        """

    def tolerance(self, specs: Mapping[str, Spec]) -> float | None:
        """How far its logits may be from the packed model's; None where nothing runs it here.

        A share of the largest of those, where that is above one.
        """
        return None

    def runner(self, made: PackedFolder, folder: Path) -> Logits | None:
        """The written model in its own runtime, every product as exact as it can be; None where nothing runs it."""
        return None

    def shipped(self, made: PackedFolder, folder: Path) -> Logits | None:
        """The written model as its users run it, where that is not the same."""
        return None

    def first_nan(self, folder: Path, inputs: Tensor) -> str:
        """A sentence about the first NaN in what was written, for inputs whose logits are not finite; or nothing."""
        return ""


def _cache_refusals(
    exporter: Exporter, graph: Graph, specs: Mapping[str, Spec], caches: Mapping[str, CacheForm]
) -> Iterator[str]:
    """Why a container could not hold how attention layers round what they keep.

    Args:
        exporter: of the container.
        graph: the model's structure.
        specs: of every site that was worked on.
        caches: how each layer rounds that does.
    """
    forms = dict.fromkeys(caches.values())
    reasons = [reason for form in forms if (reason := exporter.refuse_cache(form, specs))]
    if reasons:
        yield reasons[0]
    elif len(forms) > 1:
        yield f"{exporter.key} has one form for the whole cache, and the pipeline makes {len(forms)}; use one kv_cache"
    elif forms and (rest := [name for name in cached_layers(graph.model) if name not in caches]):
        yield (
            f"{exporter.key} has one form for the cache of all layers, and that of {len(rest)} is not rounded, such as "
            f"{rest[0]}; leave include and exclude of kv_cache out"
        )
