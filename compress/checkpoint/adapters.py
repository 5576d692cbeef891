"""A base and a LoRA adapter, read as the model that they make: W + scale * B A, one tensor at a time.

The numbers are those of `merge_and_unload` in PEFT 0.21: factors and their product in float32, the sum rounded once to
the base's type (of an embedding the product is rounded first). Shapes: A (r, in), B (out, r); a convolution's A is one
of the same window, its B one of a single place; an embedding's A (r, tokens), B (width, r).
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compress.checkpoint.matching import Spelling
from compress.checkpoint.sources import ChangedSource, FolderSource
from compress.errors import CheckpointError
from compress.io.keys import digest_of_file, key_of
from compress.lazy import nn, torch
from compress.models.adapters import CONFIG, WEIGHTS, LoraConfig
from compress.models.symmetry import is_transposed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.sources import Source
    from compress.models.graph import Graph

PREFIX = "base_model.model."
# layer . what it is . (the adapter's name, in files that were not written by save_pretrained) . weight or bias
FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.default)?"
    r"(?:\.(?P<leaf>weight|bias))?"
)
WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")  # around what was trained whole
CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class Addition:
    """What is added to one weight of the base.

    Attributes:
        a, b: names of the factors.
        scale: what their product is multiplied with.
        turned: whether it is added to a weight that lies as (in, out).
        embedding: whether the weight has a row for every token.
        magnitude: name of the lengths that rows get then (DoRA); empty without.
    """

    a: str
    b: str
    scale: float
    turned: bool = False
    embedding: bool = False
    magnitude: str = ""


@dataclass(frozen=True)
class Changes:
    """What an adapter changes, by the name of each tensor in the base's files.

    Attributes:
        added: products of factors.
        biases: name of a trained bias of B, and what it is multiplied with before it is added.
        whole: name of what stands in the place of the base's, or is a tensor more.
    """

    added: Mapping[str, Addition]
    biases: Mapping[str, tuple[str, float]]
    whole: Mapping[str, str]


class AdapterTensors(Protocol):
    """What an adapter holds, under its own names."""

    @property
    def folder(self) -> Path:
        """Where its file is."""

    def names(self) -> Iterable[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""

    def files(self) -> list[Path]:
        """The files that it reads, its own first."""


class AdapterSource(ChangedSource):
    """The tensors of a base with an adapter merged, under the names of the base's files.

    The tensor that was changed last is kept: pieces are mostly asked for in order.
    """

    def __init__(self, base: Source, adapter: AdapterTensors, changes: Changes):
        super().__init__(base)
        self._adapter, self._changes = adapter, changes
        there = set(base.names())
        self._names = [*base.names(), *(name for name in changes.whole if name not in there)]
        self._changed = {*changes.added, *changes.biases, *changes.whole}
        self._new = set(self._names) - there
        self._last: tuple[str, Tensor] | None = None

    @property
    def folder(self) -> Path:
        """The adapter's."""
        return self._adapter.folder

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._adapter.shape(self._changes.whole[name]) if name in self._new else self.before.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._adapter.dtype(self._changes.whole[name]) if name in self._new else self.before.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._merged(name).clone() if name in self._changed else self.before.read(name)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._changed:
            return self.before.piece(name, start, stop)
        return self._merged(name).flatten()[start:stop].clone()

    def fingerprint(self) -> str:
        return key_of(self.before.fingerprint(), *(digest_of_file(file) for file in self._own_files()))

    def files(self) -> list[Path]:
        return [*self.before.files(), *self._own_files()]

    def _own_files(self) -> list[Path]:
        return [*self._adapter.files(), self.folder / CONFIG]

    def _merged(self, name: str) -> Tensor:
        # Part of a product is not always the product of parts, to the bit: it is made whole.
        if self._last is None or self._last[0] != name:
            self._last = None  # one of them in memory, not two
            self._last = name, self._made(name)
        return self._last[1]

    def _made(self, name: str) -> Tensor:
        changes, dtype = self._changes, self.dtype(name)
        wide = torch.promote_types(dtype, torch.float32)
        whole = changes.whole.get(name)
        value = self.before.read(name) if whole is None else self._adapter.read(whole).to(dtype)
        if name in changes.biases:
            bias, scale = changes.biases[name]
            return value.to(wide).add_(self._factor(bias) * scale).to(dtype)
        addition = changes.added.get(name)
        if addition is None:
            return value
        with _in_float32():
            delta = _product(self._factor(addition.a), self._factor(addition.b)).mul_(addition.scale)
        if addition.turned or addition.embedding:
            delta = delta.T
        if addition.embedding:
            delta = delta.to(dtype)
        total = value.to(wide).add_(delta)
        if addition.magnitude:
            lengths = torch.linalg.norm(total.T if addition.turned else total, dim=1)
            factors = (self._factor(addition.magnitude).flatten() / lengths).view(-1, 1)
            total = (factors.T if addition.turned else factors) * total
        return total.to(dtype)

    def _factor(self, name: str) -> Tensor:
        return self._adapter.read(name).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """B A: (out, in), or of a convolution's shape."""
    if a.dim() == 2:
        return b @ a
    if a.shape[2:] == (1, 1):
        return (b[:, :, 0, 0] @ a[:, :, 0, 0])[:, :, None, None]
    made: Tensor = getattr(nn.functional, CONVOLUTIONS[a.dim()])(a.transpose(0, 1), b)
    return made.transpose(0, 1)


@contextmanager
def _in_float32() -> Iterator[None]:
    """While open, products on the processor are exact, whoever asks: what is read must not depend on it."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fp32_precision = before


def with_adapter(base: Source, adapter: Path, graph: Graph) -> AdapterSource:
    """The model that a base and an adapter make; reads headers, no weight.

    Args:
        base: the weights, under the names of their files.
        adapter: the adapter's folder.
        graph: of the base.

    Raises:
        CheckpointError: no adapter that can be merged, or one of another model.
    """
    config = LoraConfig.read(adapter)
    if not (adapter / WEIGHTS).is_file():
        pickled = next(iter(sorted(adapter.glob("adapter_model*.bin"))), None)
        hint = f"; {pickled.name} is a pickle, which is never loaded: let peft save it anew" if pickled else ""
        raise CheckpointError(f"{adapter}: no {WEIGHTS}{hint}")
    tensors = FolderSource(adapter, WEIGHTS)
    return AdapterSource(base, tensors, addable(base, tensors, graph, config))


def addable(base: Source, adapter: AdapterTensors, graph: Graph, config: LoraConfig) -> Changes:
    """What an adapter changes in a base; reads headers, no weight.

    Raises:
        CheckpointError: no adapter that can be merged, or one of another model.
    """
    return _Reader(base, adapter, graph, config).found()


class _Reader:
    """Finds the place in the base of everything that an adapter holds."""

    def __init__(self, base: Source, adapter: AdapterTensors, graph: Graph, config: LoraConfig):
        self.base, self.adapter, self.graph, self.config = base, adapter, graph, config
        self.file = adapter.files()[0]
        self.spelling = Spelling(graph.model)
        self.there = set(base.names())
        self.names = {name for name, _ in graph.model.named_parameters(remove_duplicate=False)} | set(graph.buffers)
        self.modules = dict(graph.model.named_modules())
        self.places: dict[str, str] = {}  # name in the model -> in the files, where it is not made of several
        for stored in base.names():
            if self.spelling.converted(stored) is None:
                name = next((s for s in self.spelling.of(stored) if s in self.names), None)
                self.places.setdefault(name or stored, stored)

    def found(self) -> Changes:
        """What it changes."""
        factors: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in self.adapter.names():
            name = key.removeprefix(PREFIX)
            matched = FACTOR.fullmatch(name)
            if matched:
                part = matched["part"] + (".bias" if matched["leaf"] == "bias" else "")
                factors.setdefault(matched["layer"], {})[part] = key
                self._refuse_codes(key, torch.float32)
            elif "lora_" in name or ".original_module." in name or "token_adapter" in name:
                raise CheckpointError(f"{self.file} holds {key}, which is no part of a plain LoRA; merge it in peft")
            else:
                whole[self._whole(WRAPPERS.sub("", name), key)] = key
        if not factors and not whole:
            raise CheckpointError(f"{self.file} holds no tensor; fetch it again")
        added: dict[str, Addition] = {}
        biases: dict[str, tuple[str, float]] = {}
        for layer, parts in factors.items():
            self._refuse_tied(f"{layer}.weight", layer)
            stored, module = self._place(f"{layer}.weight")
            if stored in added:
                raise CheckpointError(f"{self.file} holds factors for {stored} twice; fetch it again")
            added[stored] = self._addition(layer, dict(parts), stored, module)
            if "lora_B.bias" in parts:
                bias, _ = self._place(f"{layer}.bias")
                self._refuse_shape(parts["lora_B.bias"], self.base.shape(bias), bias)
                biases[bias] = parts["lora_B.bias"], self.config.scale_of(layer)
        return Changes(added, biases, whole)

    def _whole(self, name: str, key: str) -> str:
        """The place of a tensor that was trained whole."""
        known = next((s for s in self.spelling.of(name) if s in self.graph.tied or s in self.graph.tied.values()), None)
        if known is not None and known not in self.places:
            return known  # the second name of a tied tensor: matched, and compared with the first, later
        stored, _ = self._place(name)
        self._refuse_shape(key, self.base.shape(stored), stored)
        self._refuse_codes(key, self.base.dtype(stored))
        return stored

    def _place(self, name: str) -> tuple[str, nn.Module | None]:
        """Where a parameter of the adapter's model lies in the base's files, and which module it belongs to.

        Raises:
            CheckpointError: nowhere.
        """
        spellings = self.spelling.of(name)
        for spelled in spellings:
            if spelled in self.places:
                return self.places[spelled], self.modules.get(spelled.rpartition(".")[0])
        for spelled in spellings:  # one expert, where transformers makes one parameter of all
            if spelled in self.there:
                return spelled, None
        kind = type(self.graph.model).__name__
        made = next((s for s in spellings if s in self.names), None)
        if made is not None:
            raise CheckpointError(
                f"{self.file} changes {made}, which the files of the base hold in several parts or in another order; "
                "merge it in peft (merge_and_unload, then save_pretrained)"
            )
        task = f" (it was trained for {self.config.task})" if self.config.task else ""
        raise CheckpointError(
            f"{self.file} changes {name}, and the base, a {kind}, has none{task}; it belongs to another model: give "
            f"the right one as BASE+{self.adapter.folder}"
        )

    def _refuse_tied(self, name: str, layer: str) -> None:
        tied = self.graph.tied
        for spelled in self.spelling.of(name):
            other = tied.get(spelled) or next((n for n, kept in tied.items() if kept == spelled), None)
            if other is not None:
                raise CheckpointError(
                    f"{self.file} changes {layer} alone, which the base ties to {other.rpartition('.')[0]}: merged, "
                    "both would change. Untie them in the base (save it with a head of its own and "
                    "tie_word_embeddings: false), or train without that layer"
                )

    def _addition(self, layer: str, parts: dict[str, str], stored: str, module: nn.Module | None) -> Addition:
        """What is added to a layer's weight.

        Raises:
            CheckpointError: half a pair, shapes that do not fit, or a layer that nothing is added to here.
        """
        parts.pop("lora_B.bias", None)
        magnitude = parts.pop("lora_magnitude_vector", "")
        embedding = "lora_embedding_A" in parts
        wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(parts) != set(wanted):
            raise CheckpointError(
                f"{self.file} holds {' and '.join(sorted(parts)) or 'no factor'} of {layer}, and not just "
                f"{wanted[0]} and {wanted[1]}; it is not whole: fetch it again"
            )
        a, b = (parts[part] for part in wanted)
        rank, shape = self.config.rank_of(layer), self.base.shape(stored)
        turned = module is not None and is_transposed(module)
        lies = shape[::-1] if turned or embedding else shape
        plain = len(shape) == 2 and isinstance(module, nn.Embedding) == embedding
        grouped = getattr(module, "groups", 1) != 1
        if not (plain or (len(shape) in CONVOLUTIONS and hasattr(module, "kernel_size"))) or grouped:
            raise CheckpointError(
                f"{self.file} changes {stored} of shape {shape}, a {type(module).__name__}, and adapters are merged "
                "into linear layers, embeddings and convolutions without groups; merge it in peft"
            )
        self._refuse_shape(a, (rank, *lies[1:]), stored)
        self._refuse_shape(b, (lies[0], rank, *[1] * (len(shape) - 2)), stored)
        if magnitude and (embedding or len(shape) != 2):
            raise CheckpointError(
                f"{self.file} holds lengths of rows (DoRA) of {layer}, and of those only linear layers are merged; "
                "merge it in peft (merge_and_unload, then save_pretrained)"
            )
        if magnitude:
            self._refuse_shape(magnitude, (lies[0],), stored)
        return Addition(a, b, self.config.scale_of(layer), turned, embedding, magnitude)

    def _refuse_codes(self, key: str, meant: torch.dtype) -> None:
        dtype = self.adapter.dtype(key)
        if meant.is_floating_point and not dtype.is_floating_point:
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.file}: {key} is {name}, not numbers; save it without quantization")

    def _refuse_shape(self, key: str, wanted: tuple[int, ...], stored: str) -> None:
        shape = self.adapter.shape(key)
        if shape == wanted:
            return
        more = len(shape) == len(wanted) and shape[1:] == wanted[1:] and "lora_" not in key
        why = (
            "a vocabulary of another size was trained: give the base with so many rows (resize_token_embeddings)"
            if more
            else f"{CONFIG} or the base belongs to another adapter: fetch both from one place"
        )
        raise CheckpointError(
            f"{self.file}: {key} has shape {shape}, and for {stored} of the base it must be {wanted}; {why}"
        )
