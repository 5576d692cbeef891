"""What every family of encodings promises.

Tensors that lie beside the codes have the same names in every family, so that everybody finds them:

| name           | type, shape                           | what                                                 |
|----------------|---------------------------------------|------------------------------------------------------|
| `scale`        | float or uint8 (R, G)                 | one for each block of O / R rows and I / G columns   |
|                | uint8 (O, bytes), packed as codes are | the same in super-blocks                             |
| `outer_scale`  | float (1,); in super-blocks (O, S)    | a scale of the scales                                |
| `offset`       | uint8 (O, bytes), packed as codes are | what is subtracted in a block of a super-block       |
| `outer_offset` | float (O, S)                          | a scale of the offsets                               |
| `zero_point`   | uint8 (R, bytes), packed as codes are | what steps are counted from, one for each scale      |
| `table`        | float (T, E)                          | what codes mean, in units of the scale               |
| `row_group`    | uint8 (1, bytes), packed as codes are | the table of each row, where there are several       |

Shapes: O = out features, I = in features, R = rows of scales, G = groups of columns, S = super-blocks of a row,
T = tables, E = their entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from compress.encodings.bits import unpack_bits
from compress.encodings.lookup import BlockScale, Lookup
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.encodings.lookup import Table

StoredShapes: TypeAlias = (
    "dict[str, tuple[tuple[int, ...], torch.dtype]]"  # name of a stored tensor -> its shape and type
)


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """Everything about an encoding that its stored tensors do not say. Fields are JSON-able.

    Attributes:
        bits: width of a code in the packed stream.
        family: what this is called in files.
        stores_idle: codes under a mask are stored too, because others depend on them.
        whole: codes mean whole numbers of their scale.
        steps: codes count steps of their scale from their zero point, or from the middle code where none is stored;
            other forms have no zero points.
        floats: codes are the bits of floats.
        super_blocks: scales are whole numbers of a scale of their own, one for all blocks of a super-block.
    """

    bits: int
    family: ClassVar[str]
    stores_idle: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    steps: ClassVar[bool] = False
    floats: ClassVar[bool] = False
    super_blocks: ClassVar[bool] = False

    @property
    def multiple(self) -> int:
        """What the columns of a weight must be a multiple of."""
        return 1

    def groups_of(self, columns: int) -> int:
        """How many groups of so many columns have scales of their own."""
        return getattr(self, "groups", 1)

    @abstractmethod
    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        """What is stored beside the codes of an (out, in) weight."""

    @abstractmethod
    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Encoding:
        """(out, in) uint8 codes and the stored tables -> the encoding, on whatever device they are."""

    @abstractmethod
    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        """What codes mean in units of their scale, from the stored tensors."""

    def row_table(self, rows: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """(out,) uint8, the table of each row; None where there is one table."""
        return None

    def scale_table(self, device: torch.device) -> Tensor | None:
        """(256,) float32, what each byte of `scale` means; None where scales are floats."""
        return None

    def lookup(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Lookup:
        """What the codes of an (out, in) weight mean, from its stored tensors, on whatever device they are."""
        scale, zero = tensors.get("scale"), tensors.get("zero_point")
        device = next(iter(tensors.values())).device
        block = None
        if scale is not None:
            if (meanings := self.scale_table(device)) is not None:
                scale = meanings.index_select(0, scale.flatten().int()).view(scale.shape)
            block = BlockScale(scale, shape[0] // len(scale), shape[1] // scale.shape[1], tensors.get("outer_scale"))
            zero = None if zero is None else unpack_bits(zero, self.bits, scale.shape[1])
        return Lookup(self.table(tensors, device), self.row_table(shape[0], tensors), zero, block)


class Encoding(ABC):
    """Integer codes and what they mean. A frozen dataclass in each family.

    Attributes:
        codes: (out, in) uint8, below 2**bits.
    """

    codes: Tensor

    @property
    @abstractmethod
    def form(self) -> Form:
        """What the tables do not say."""

    @abstractmethod
    def tables(self) -> dict[str, Tensor]:
        """What is stored beside the codes: the inverse of `Form.encoding`."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """(out, in) float32."""

    @abstractmethod
    def rows(self, part: slice) -> Self:
        """Some of its rows, as they would have been encoded alone; may share memory."""

    def above(self, others: Sequence[Self]) -> Self:
        """Its rows, and below them those of others that are encoded alike: the inverse of `rows`.

        Only needed of what passes make whose rows are independent.
        """
        raise NotImplementedError(f"rows of {self.form.family} codes are not put together")

    @abstractmethod
    def idle(self) -> Tensor:
        """The code that stands under a masked weight, for each position: expands to (out, in)."""

    @abstractmethod
    def defect(self) -> str | None:
        """What is impossible about codes or tables, or None."""

    def lookup(self) -> Lookup:
        """What its codes mean, as everybody but the family itself reads it."""
        rows, columns = self.codes.shape
        return self.form.lookup((rows, columns), self.tables())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a dense matrix, all tables counted."""
        tables = sum(t.numel() * t.element_size() * 8 for t in self.tables().values())
        return self.form.bits + tables / self.codes.numel()

    def _codes_defect(self) -> str | None:
        if self.codes.dtype != torch.uint8 or int(self.codes.max()) >= 2**self.form.bits:
            return f"codes that do not fit {self.form.bits} bits"
        return None
