"""The kernel for graphics processors: every encoding is a step or a lookup, times a scale."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from compress.encodings.bits import pack_bits
from compress.encodings.decode import Decoder
from compress.runtime.arrange import ROWS, arrange, restore
from compress.runtime.kernels import numbered
from compress.runtime.launch import (
    GATHER,
    NO_ESCAPE,
    PAIRS,
    STEPS,
    TABLE,
    Product,
    aligned,
    multiply,
    packed_tables,
    usable,
)  # fmt: skip
from compress.runtime.pairs import Pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.encodings import Spec, Weight
    from compress.encodings.lookup import Lookup

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HALVES = ("bfloat16", "float16")
AT_ONCE = 512  # rows that are looked up among arranged codes: each brings its block into memory
ARRANGED_BITS = {1: 2, 7: 8}  # widths that are arranged as others


class GpuLookup(nn.Module):
    """y = x W^T with codes arranged for the kernels; what a correction adds is two thin products beside it.

    Its tensors are no part of a state dict and never move: a layer on another device makes another one.
    """

    name = "lookup"
    words: Tensor
    first: Tensor
    zero: Tensor
    scale: Tensor
    a: Tensor
    b: Tensor
    tables_float16: Tensor
    table_float16: Tensor

    def __init__(self, product: Product | None, tensors: dict[str, Tensor], pairs: Pairs | None = None):
        """`product` is None where two factors are all there is. `tensors`: what the operator takes, and `a` and `b`."""
        super().__init__()
        self.product, self.pairs = product, pairs
        self.numbers = [] if product is None else product.numbers()
        for name, tensor in tensors.items():
            self.register_buffer(name, aligned(tensor), persistent=False)
        self.device = next(iter(tensors.values())).device
        self.corrected = "a" in tensors
        self.taken: dict[torch.dtype, tuple[Tensor, ...]] = {}  # by type of the input
        if product is not None:
            # A table may hold numbers that float16 does not.
            fits = {kind: bool(torch.isfinite(self.get_buffer(f"table_{kind}")).all()) for kind in TYPES}
            self.taken = {dtype: self._for_type(dtype) for kind, dtype in TYPES.items() if fits[kind]}

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        """Make it from the stored tensors of a layer, or return None where it does not fit."""
        if not usable(next(iter(stored.values())).device):
            return None
        factors: dict[str, Tensor] = {}
        if spec.low_rank is not None:
            a, b = spec.low_rank.low_rank(stored, spec.shape).factors()
            factors = {"a": stored.get("lora_a", a), "b": stored.get("lora_b", b)}
        if weight.factored:
            return cls(None, factors)
        if weight.encoding is None:
            return None
        lookup = weight.encoding.form.lookup(spec.shape, stored)
        if lookup.offset is not None:
            return None
        scale = torch.ones(1, 1, device=weight.encoding.codes.device)
        if lookup.scale is not None:
            scale = lookup.scale.as_stored().contiguous()
        meaning = (
            _steps(weight, lookup) or _pairs(spec, weight, lookup, stored) or _values(spec, weight, lookup, stored)
        )
        if meaning is None:
            return None
        mode, codes, bits, tables, pairs = meaning
        group = 0 if scale.shape[1] == 1 else spec.shape[1] // scale.shape[1]
        product = Product(
            *spec.shape, mode, bits, group, int(len(scale) > 1), "zero" in tables, "first" not in tables,
            NO_ESCAPE if pairs is None else pairs.escape,
        )  # fmt: skip
        none = _nothing(scale.device)
        tensors = {"words": arrange(codes, bits, nibbles=product.nibbles), "scale": scale}
        return cls(product, {"zero": none, "first": none, **tensors, **tables, **factors}, pairs)

    def forward(self, x: Tensor) -> Tensor:
        """(M, I) of a float type -> (M, O) of the same, without bias."""
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The same, without what torch does around the call of a module."""
        y = None if self.product is None else self._product(x, self.product)
        if not self.corrected:
            assert y is not None
            return y
        added = linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return added if y is None else added.add_(y)

    def _product(self, x: Tensor, product: Product) -> Tensor:
        taken = self.taken.get(x.dtype)
        if taken is None:
            return self._product(x.float(), product).to(x.dtype)
        # Outside of compilers and the like, the way through torch's dispatcher takes longer than some kernels.
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return multiply(x, product, taken)
        found: Tensor = torch.ops.compress.packed_product(x, *self._for_type(x.dtype), self.numbers)
        return found

    def _for_type(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the operator takes beside an input of some type."""
        kind = str(dtype).removeprefix("torch.")
        tables = self.tables_float16 if kind == "float32" else self.get_buffer(f"tables_{kind}")
        return self.words, tables, self.get_buffer(f"table_{kind}"), self.first, self.zero, self.scale

    def codes(self) -> Tensor:
        """(O, I) uint8, in the order and with the meaning they are stored with; what is masked has one too."""
        assert self.product is not None
        shape = self.product.rows, self.product.columns
        codes = restore(self.words, shape, self.product.bits, nibbles=self.product.nibbles)
        return codes if self.pairs is None else self.pairs.stored(codes)

    def codes_of(self, rows: Tensor) -> Tensor:
        """(N,) numbers of rows -> (N, I) uint8, as `codes` has them; only blocks of rows that hold them are read."""
        assert self.product is not None
        columns, found = self.product.columns, []
        blocks = self.words.view(-(-self.product.rows // ROWS), -1)
        for part in torch.split(rows, AT_ONCE):
            shape = ROWS * len(part), columns
            codes = restore(blocks[part // ROWS].flatten(), shape, self.product.bits, nibbles=self.product.nibbles)
            found.append(codes[torch.arange(len(part), device=part.device) * ROWS + part % ROWS])
        codes = torch.cat(found)
        return codes if self.pairs is None else self.pairs.stored(codes)

    def take_place(self, stored: Tensor, bits: int) -> bool:
        """Put the arranged codes in the place of the stored stream (O, B), where they are as many bytes.

        Args:
            stored: the codes of all weights; overwritten, and kept from then on. `stream` gives them back.
            bits: of a code.

        Returns:
            Whether that was done.
        """
        if self.product is None or self.product.bits != bits or self.words.numel() != stored.numel():
            return False
        stored.view(-1).copy_(self.words)
        self.words = stored  # the same tensor, to be counted once
        self.taken = {dtype: self._for_type(dtype) for dtype in self.taken}
        return True

    def stream(self) -> Tensor:
        """(O, B) uint8: the codes as they are stored."""
        assert self.product is not None
        return pack_bits(self.codes(), self.product.bits)

    def num_bytes(self, stored: dict[str, Tensor]) -> int:
        """Bytes that are kept beside the stored tensors."""
        theirs = {t.data_ptr() for t in stored.values()}
        return sum(t.numel() * t.element_size() for t in self.buffers() if t.data_ptr() not in theirs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return "" if self.product is None else str(self.product)


Meaning = tuple[int, Tensor, int, dict[str, Tensor], Pairs | None]  # mode, codes (O, I), their bits, tables, pairs


def _steps(weight: Weight, lookup: Lookup) -> Meaning | None:
    assert weight.encoding is not None
    if not weight.encoding.form.steps:
        return None
    bits = weight.encoding.form.bits
    zero = {} if lookup.zero is None else {"zero": lookup.steps_from().contiguous()}
    device = weight.encoding.codes.device
    return STEPS, weight.encoding.codes, ARRANGED_BITS.get(bits, bits), zero | _no_tables(device), None


def _pairs(spec: Spec, weight: Weight, lookup: Lookup, stored: dict[str, Tensor]) -> Meaning | None:
    assert weight.encoding is not None
    pairs = Pairs.of(lookup.table) if lookup.row_table is None else None
    if pairs is None or not _zero_where_masked(spec, weight, lookup, stored):
        return None
    bits, codes = weight.encoding.form.bits, pairs.recode(weight.encoding.codes)
    magnitudes = pairs.magnitudes() if bits == 4 else torch.zeros(1, 16, device=codes.device)
    return PAIRS if bits == 4 else GATHER, codes, bits, _tables(magnitudes, pairs.values()), pairs


def _values(spec: Spec, weight: Weight, lookup: Lookup, stored: dict[str, Tensor]) -> Meaning | None:
    # Where codes under a mask mean zero anyway, no entry must be added for them.
    found = numbered(replace(weight, mask=None) if _zero_where_masked(spec, weight, lookup, stored) else weight, lookup)
    if found is None:
        return None
    codes, table, first = found
    bits = max(2, (table.shape[1] - 1).bit_length())
    bits = ARRANGED_BITS.get(bits, bits)
    table = pad(table, (0, 2**bits - table.shape[1]))
    few = table if bits <= 4 else torch.zeros(1, 16, device=table.device)
    tables = _tables(few, table.flatten()) | ({} if lookup.row_table is None else {"first": first})
    return TABLE if bits <= 4 else GATHER, codes, bits, tables, None


def _zero_where_masked(spec: Spec, weight: Weight, lookup: Lookup, stored: dict[str, Tensor]) -> bool:
    assert weight.encoding is not None
    mask, codes = weight.mask, weight.encoding.codes
    if mask is None:
        return True
    parts = Decoder(spec, stored).tiles()
    return not any(bool(lookup.units(codes[part], part).masked_fill_(mask[part], 0.0).any()) for part in parts)


# What a kernel is given and does not read is the same for all layers: a compiled model then has one input for it.
@cache
def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.uint8, device=device)


@cache
def _no_tables(device: torch.device) -> dict[str, Tensor]:
    none = torch.zeros(1, 16, device=device)
    return _tables(none, none.flatten())


def _tables(few: Tensor, every: Tensor) -> dict[str, Tensor]:
    """(T, 16) values to look up by their bytes, and all of them in one row to read one by one, for each type of x."""
    times = 8 if len(few) == 1 else 1  # of a table for all rows there are copies, see `load_tables`
    packed = {f"tables_{kind}": packed_tables(few.to(TYPES[kind])).repeat(times, 1) for kind in HALVES}
    return packed | {f"table_{kind}": every.to(dtype) for kind, dtype in TYPES.items()}
