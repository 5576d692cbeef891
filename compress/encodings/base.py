"""What every family of encodings promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Stored: TypeAlias = "dict[str, tuple[tuple[int, ...], torch.dtype]]"  # name of a stored tensor -> its shape and type


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """Everything about an encoding that its stored tensors do not say. Fields are JSON-able.

    Attributes:
        bits: width of a code in the packed stream.
        family: what this is called in files.
        stores_idle: codes under a mask are stored too, because others depend on them.
    """

    bits: int
    family: ClassVar[str]
    stores_idle: ClassVar[bool] = False

    @abstractmethod
    def tables(self, shape: tuple[int, int]) -> Stored:
        """What is stored beside the codes of an (out, in) weight."""

    @abstractmethod
    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Encoding:
        """(out, in) uint8 codes and the stored tables -> the encoding, on whatever device they are."""


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

    @abstractmethod
    def idle(self) -> Tensor:
        """The code that stands under a masked weight, for each position: expands to (out, in)."""

    @abstractmethod
    def defect(self) -> str | None:
        """What is impossible about codes or tables, or None."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of a dense matrix, all tables counted."""
        tables = sum(t.numel() * t.element_size() * 8 for t in self.tables().values())
        return self.form.bits + tables / self.codes.numel()

    def _codes_defect(self) -> str | None:
        if self.codes.dtype != torch.uint8 or int(self.codes.max()) >= 2**self.form.bits:
            return f"codes that do not fit {self.form.bits} bits"
        return None
