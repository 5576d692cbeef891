"""An embedding whose table stays packed in memory, and heads that multiply with the table of an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.encodings.rows import decode_rows, row_starts, streamed
from compress.runtime.lazy_weight import lazy_weight
from compress.runtime.linear import PackedLinear
from compress.runtime.lookup import GpuLookup
from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.encodings import Spec
    from compress.runtime.linear import Quick


class PackedEmbedding(PackedModule, nn.Embedding):
    """Replaces an `Embedding`: decodes the rows that are looked up, and no others.

    A class that looks up by the forward of `nn.Embedding` and does more with it keeps that: see `packed_embedding`.

    Attributes:
        like: of no length, in the type that rows are given in.
        described: whether `weight` only says its type, shape and where it is not: while tensors are read, and while a
            class that does more asks for it.
        starts: of `row_starts`, once it is counted.
    """

    like: Tensor
    described: bool
    starts: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integers -> (..., width), in the type the model has."""
        found = self.holder.rows(ids.reshape(-1))
        return found.to(self.like.dtype).view(*ids.shape, self.embedding_dim)

    @property
    def holder(self) -> PackedEmbedding:
        """What holds the tensors: itself, or the embedding that it is tied to."""
        found: PackedEmbedding = self.__dict__.get("owner", self)
        return found

    def rows(self, rows: Tensor) -> Tensor:
        """(N,) numbers of rows -> (N, width) float32."""
        tensors, arranged = super().stored(), self._arranged()
        if self.starts is None and streamed(self.spec):
            with torch.no_grad(), torch.inference_mode(False):
                self.starts = row_starts(self.spec, tensors)
        codes = None if arranged is None or not len(rows) else arranged.codes_of(rows)
        return decode_rows(self.spec, tensors, rows, self.starts, codes)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(rows, width), in the type the model has, unpacked once its numbers are asked for: all of them then."""
        if self.described or self.like.is_meta:
            return torch.empty(self.spec.shape, dtype=self.like.dtype, device="meta")
        return lazy_weight(self.spec.shape, self.like, lambda: self.dequantize().to(self.like.dtype))

    def _arranged(self) -> GpuLookup | None:
        """The kernel of a head that keeps the codes in its own order, in the place of the stored ones."""
        head: SharedLinear | None = self.__dict__.get("arranging")
        return None if head is None else head.kernel  # type: ignore[return-value]

    def stored(self) -> dict[str, Tensor]:
        """The packed tensors under their names in the file; codes in another order are put back, in a copy."""
        if self.holder is not self:
            return self.holder.stored()
        found, arranged = super().stored(), self._arranged()
        return found if arranged is None else {**found, "codes": arranged.stream()}

    def _released(self) -> None:
        """Codes are as they are stored, and nothing is known of them any longer."""
        self.starts = None
        if self.__dict__.get("arranging") is not None:
            self.__dict__["arranging"].use(None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.holder is not self:
            return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        self._released()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._arranged() is not None:
            destination[f"{prefix}codes"] = self.stored()["codes"]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._released()
        super()._load_from_state_dict(*args, **options)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return super().extra_repr().removesuffix(", bias=False")


def packed_embedding(old: nn.Embedding, spec: Spec, owner: PackedEmbedding | None = None) -> PackedEmbedding:
    """What replaces an embedding, with tensors to be read or those of `owner`; all else that it has is kept.

    A subclass is replaced by a class between itself and `nn.Embedding`: its own forward, which may scale rows or shift
    positions, then looks up in the packed table.
    """
    kind = PackedEmbedding if type(old) is nn.Embedding else _derived(type(old))
    made = kind.__new__(kind)
    PackedModule.__init__(made, spec, bias=False)
    if owner is not None:
        _borrow(made, owner)
    made.register_buffer("like", torch.empty(0, dtype=old.weight.dtype), persistent=False)
    buffers = {name: value for name, value in old._buffers.items() if value is not None}
    for name, value in buffers.items():
        made.register_buffer(name, value, persistent=name not in old._non_persistent_buffers_set)
    made._modules.update(old._modules)
    for name, other in vars(old).items():
        if name not in vars(made):
            made.__dict__[name] = other
    made.training, made.starts, made.described = old.training, None, False
    return made


def _borrow(module: PackedModule, owner: PackedEmbedding) -> None:
    """Take the tensors of another module in the place of its own; no child is made of it: they are there once."""
    for name in module.spec.tensors():
        del module._buffers[name]
    module.__dict__["owner"] = owner


def _derived(cls: type[nn.Embedding]) -> type[PackedEmbedding]:
    """A class that does what another one does, on a packed table."""

    def forward(self: PackedEmbedding, *args: Any, **kwargs: Any) -> Any:
        before, self.described = self.described, True
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            self.described = before

    return type(f"Packed{cls.__name__}", (cls, PackedEmbedding), {"forward": forward, "__doc__": cls.__doc__})


class SharedLinear(PackedLinear):
    """What is tied to an embedding: it has no tensors of its own but a bias, and multiplies with the table's.

    A kernel that orders codes as it likes to read them does so in the table, which looks rows up there from then on.
    """

    def __init__(self, owner: PackedEmbedding, *, bias: bool, dtype: torch.dtype = torch.float32):
        """`owner` holds the tensors, `dtype` is the type of the bias."""
        super().__init__(owner.spec, bias=bias, transposed=False, dtype=dtype)
        _borrow(self, owner)

    @property
    def owner(self) -> PackedEmbedding:
        """What holds the tensors."""
        found: PackedEmbedding = self.__dict__["owner"]
        return found

    def stored(self) -> dict[str, Tensor]:
        return self.owner.stored()

    def rounded(self, x: Tensor) -> Tensor:
        """The input: a table that is looked up has no grid for what it is multiplied with."""
        return x

    def use(self, kernel: Quick | GpuLookup | None) -> None:
        owner = self.owner
        if owner.__dict__.get("arranging") is self:
            assert isinstance(self.kernel, GpuLookup)
            owner.get_buffer("codes").copy_(self.kernel.stream())
            owner.__dict__["arranging"] = None
        super().use(kernel)
        codes, form = owner._buffers.get("codes"), self.spec.form
        if (
            not isinstance(kernel, GpuLookup)
            or codes is None
            or form is None
            or owner.__dict__.get("arranging") is not None
        ):
            return
        if kernel.take_place(codes, form.bits):
            owner.__dict__["arranging"] = self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.use(None)  # wherever the table is then, it looks for a kernel again
        self.automatic = True
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]


__all__ = ["PackedEmbedding", "SharedLinear", "packed_embedding"]
