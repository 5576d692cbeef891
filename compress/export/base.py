"""What an exporter is: a frozen dataclass whose fields are its options, that writes one folder and checks it.

An exporter reads a finished packed folder. It neither rounds nor fits anything: what it cannot hold as it is, it
refuses, before a run.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
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
    """

    key: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    used: ClassVar[tuple[str, str]]
    computes: ClassVar[str | None] = None
    libraries: ClassVar[int] = 0
    bounded: ClassVar[bool] = False

    def check(self) -> Iterator[OptionError]:
        """Every option that the others make impossible; types and ranges are declared on the fields."""
        return iter(())

    def mistakes(self) -> Iterator[OptionError]:
        """Every impossible option."""
        return self.check()

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        """Why it could not hold a model.

        Args:
            graph: its structure.
            specs: of every site that was worked on.
            added: layers that were given a bias their class of model has not.
        """
        return iter(())

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


def refuse_added(graph: Graph, added: Collection[str]) -> Iterator[str]:
    """Why new biases do not fit a container that a plain model class reads; nothing where there are none."""
    if added:
        first = next(iter(added))
        yield (
            f"a plain {type(graph.model).__name__} has no place for the biases that {len(added)} layers are given, "
            f"such as {first}; leave new biases out, or this format out of `export:`"
        )


def refuse_tables(graph: Graph, specs: Mapping[str, Spec], why: str) -> Iterator[str]:
    """Why packed embeddings do not fit a container; nothing where there are none. `why`: what it lacks."""
    packed = [site.name for site in graph.sites if site.looked_up and site.name in specs]
    if packed:
        yield (
            f"{why}, and {len(packed)} are packed, such as {packed[0]}; leave embeddings out of the passes (`exclude`, "
            "or no `embeddings:`), or this format out of `export:`"
        )


def refuse_shared(graph: Graph, specs: Mapping[str, Spec], container: str) -> Iterator[str]:
    """Why packed layers that blocks share do not fit a container; nothing where there are none."""
    shared = [site for site in graph.sites if site.shared and not site.looked_up and site.name in specs]
    if shared:
        yield (
            f"{container} has each layer once for each module, and {len(shared)} are shared by blocks, such as "
            f"{shared[0].name}; export hf, or leave this format out of `export:`"
        )


def refuse_experts(graph: Graph, names: Collection[str], container: str) -> Iterator[str]:
    """Why matrices that are no layers, such as experts, do not fit a container of layers; nothing without any.

    Args:
        graph: of the model.
        names: of the sites that the container would have to hold as layers of their own.
        container: what it is called.
    """
    experts = [site.name for site in graph.sites if site.is_expert and site.name in names]
    if experts:
        yield (
            f"{container} holds layers, and {len(experts)} of the compressed matrices are experts that the model keeps "
            f"together in one tensor, such as {experts[0]}; `exclude` them, or export hf"
        )
    yield from refuse_read(graph, names, container)


def refuse_read(graph: Graph, names: Collection[str], container: str) -> Iterator[str]:
    """Why matrices that a module multiplies with itself do not fit a container of layers; nothing without any.

    Takes what `refuse_experts` does.
    """
    read = [site.name for site in graph.sites if site.read_by is not None and site.name in names]
    if read:
        yield (
            f"{container} holds layers, and {len(read)} of the compressed matrices are read by a module of torch "
            f"itself, such as {read[0]}; `exclude` them, or export hf"
        )


def refuse_missing(package: str, extra: str) -> Iterator[str]:
    """How to install the library that writes or reads a container, if it is missing; `extra` brings it."""
    if importlib.util.find_spec(package) is None:
        yield f"the Python package {package} is not installed; pip install 'compress-pipeline[{extra}]'"
