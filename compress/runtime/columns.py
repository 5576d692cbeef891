"""Products that read only the columns of a weight whose inputs are not zero, for layers that skip inputs.

One input, such as a token while a model writes, is multiplied with the columns that it needs: the others are not read.
Several inputs at once need different ones, and are multiplied with all of them.

Shapes: O = out features, I = in features, M = rows of an input, K = columns that are read, G = groups of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch.nn.functional import embedding_bag

from compress.encodings.uniform import CHUNK
from compress.runtime.kernels import Codes, Kernel, scaled

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec, Weight

DENSE_ABOVE = 0.55  # share of float32 columns from which reading all of them, one behind the other, is quicker


class Columns(Kernel):
    """A dense weight whose columns lie one behind the other in memory, in the place of its rows."""

    name = "columns"

    def __init__(self, values: Tensor):
        """`values` (I, O), contiguous: the stored tensor, seen the other way round."""
        self.values = values

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        values = weight.values
        if values is None or weight.mask is not None or not values.T.is_contiguous():
            return None
        return cls(values.T)

    def __call__(self, x: Tensor) -> Tensor:
        alike, wide = x.dtype == self.values.dtype, x.dtype == torch.float32
        kept = x[0].nonzero()[:, 0] if len(x) == 1 and alike else None
        if kept is not None and not (wide and len(kept) > DENSE_ABOVE * x.shape[1]):
            return self._read(x, kept)
        if alike and wide:
            return x @ self.values
        return by_columns(x.float(), self.values).to(x.dtype)  # torch's product of narrow ones is slow in this order

    def _read(self, x: Tensor, kept: Tensor) -> Tensor:
        """One input times the columns of these numbers, summed up in float32."""
        if not len(kept):
            return x.new_zeros(1, self.values.shape[1])  # torch knows no empty bags of equal length
        # A bag of rows is added up by one thread: each thread takes a part of the outputs.
        outputs, parts = self.values.shape[1], torch.get_num_threads()
        parts = parts if outputs % parts == 0 else 1
        numbers = kept * parts + torch.arange(parts)[:, None]
        weights = x[:, kept].expand(parts, -1).contiguous()
        table = self.values.view(-1, outputs // parts)
        return embedding_bag(numbers, table, per_sample_weights=weights, mode="sum").view(1, -1)

    @property
    def num_bytes(self) -> int:
        return 0


class CodeColumns(Kernel):
    """Unpacked whole numbers of one byte, column after column."""

    name = "columns"

    def __init__(self, codes: Tensor, scale: Tensor, middle: Tensor | None):
        """`codes` (I, O) int8; `scale` (O,) float32, or (G, O); `middle` as of `Codes`."""
        self.codes, self.scale, self.middle = codes, scale, middle

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        exact = Codes.prepare(spec, weight, stored)
        if exact is None or exact.codes.dtype != torch.int8:
            return None
        scale = exact.scale if exact.scale.dim() == 1 else exact.scale[..., 0].T.contiguous()
        return cls(exact.codes.T.contiguous(), scale, exact.middle)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.scale.dim() == 1:  # the scale of a row can wait for the sums
            y = by_columns(wide, self.codes)
            return scaled(y if self.middle is None else y.addr_(wide.sum(1), self.middle), self.scale, x)
        y = wide.new_zeros(len(x), self.codes.shape[1])
        group = len(self.codes) // len(self.scale)
        for number, scale in enumerate(self.scale):
            part = slice(number * group, (number + 1) * group)
            y.addcmul_(by_columns(wide[:, part], self.codes[part]), scale)
        return y.to(x.dtype)


def by_columns(x: Tensor, columns: Tensor) -> Tensor:
    """(M, I) float32 times (I, O) of any type: (M, O); one input only times the columns that it needs."""
    made = x.new_zeros(len(x), columns.shape[1])
    step = max(1, CHUNK // columns.shape[1])
    if len(x) == 1:
        for kept in torch.split(x[0].nonzero()[:, 0], step):
            made.addmm_(x[:, kept], columns.index_select(0, kept).float())
        return made
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        made.addmm_(x[:, part], columns[part].float())
    return made
