"""Key-value caches of 8 bits, or 4: keys and values are rounded as they enter the cache.

Shapes: H heads of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.encodings.cache import WIDTHS, CacheGrid, CacheNumbers, Per, in_words
from compress.passes.base import OptionError, Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KvCache(Pass):
    """Round keys, behind the rotary embedding, and values as they enter the cache; weights are untouched.

    All calibration data run through the model once, and the largest magnitude of the keys of every attention layer, and
    that of its values, become the largest number of the grid. What is larger later is cut. A cache of 8 bits holds
    twice as many tokens as one of 16.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv 2209.05433, for E4M3 with one scale for a
    tensor; Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", 2024,
    arXiv 2401.18079, for scales from calibration. Differs from KVQuant in: keys are rounded behind the rotary embedding
    and not before it, with a scale for all channels or for those of a head, on even steps or floats, because that is
    what engines read.

    Args:
        include: shell wildcards on full names of attention layers; empty: all that keep keys and values.
        exclude: attention layers whose cache stays as it is.
        bits: of a number; 8, or on the grid `int` also 4, which engines do not read.
        grid: `fp8` are E4M3 numbers, `int` even steps with zero in their middle.
        per: one scale for all keys of a layer and one for its values (`tensor`), or one for each of their heads
            (`head`).

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=8, length=64)
        >>> result = compress.apply(model, [compress.KvCache()], calibration=tokens)
        >>> result.report.caches[0]["form"]
        'fp8 per tensor'
    """

    bits: Literal[4, 8] = 8
    grid: CacheNumbers = "fp8"
    per: Per = "tensor"

    key: ClassVar[str] = "kv_cache"
    reach: ClassVar[Reach] = "cache"

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def words(self) -> str:
        """The form in words."""
        return in_words(self.bits, self.grid, self.per)

    def produces(self, kind: str) -> str:
        return kind

    def refusal(self, kind: str) -> str | None:
        return None  # weights stay as they are, of whatever kind

    def check(self) -> Iterator[OptionError]:
        if self.overrides:
            yield OptionError("overrides", "engines read one form for the whole cache; choose with include and exclude")
        if self.bits not in WIDTHS[self.grid]:
            yield OptionError("bits", f"{self.grid} has 8 bits; set `grid: int` for {self.bits}")

    def chosen(self, layers: Iterable[str]) -> list[str]:
        """The attention layers whose cache is rounded, of all that keep one."""
        included = self.include or ("*",)
        return [
            name
            for name in layers
            if any(fnmatchcase(name, p) for p in included) and not any(fnmatchcase(name, p) for p in self.exclude)
        ]

    def run(self, keys: Tensor, values: Tensor) -> CacheGrid:
        """How a layer rounds. keys, values: (H,), the largest magnitude of each head."""
        return CacheGrid.fit(keys, values, self.bits, self.grid, self.per)
