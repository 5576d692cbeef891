"""What was measured of ready-made pipelines and of quantizers on the bundled model, shipped with the package.

`scripts/choosing.py` writes the file from docs/results.json, docs/quantizers.json and the plans of the pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.io.small_file import read_object

FILE = Path(__file__).parent / "measured.json"
GROUPS = ("quantize", "prune", "prune and quantize", "factorize", "merge")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A ready-made pipeline, or one quantizer with bits and group size, and what it did to the bundled model.

    Attributes:
        name: of the ready-made pipeline; empty for a quantizer that has none.
        description: its own words.
        group: what it does, one of GROUPS.
        methods: keys of its passes, in order.
        plain: whether it is one quantizer of which nothing but bits and group size is set.
        bits: of its codes; None without codes.
        group_size: columns that share a scale; None for a row, or without codes.
        super_blocks: whether the columns of every layer must be a multiple of 256.
        rounds_inputs: whether what layers multiply with is rounded, too.
        data: whether it learns from data.
        formats: containers that can hold the result, beside the packed folder.
        perplexity: afterwards; this and the others are None where nothing was measured.
        kl: divergence from the original, in nats per token.
        size: bytes of all weights.
        bits_per_weight: everything counted that is stored for the matrices in the blocks.
        sparsity: share of zeros in them.
        seconds: that its passes took on two processor cores.
    """

    name: str = ""
    description: str = ""
    group: str
    methods: tuple[str, ...]
    plain: bool
    bits: int | None = None
    group_size: int | None = None
    super_blocks: bool = False
    rounds_inputs: bool = False
    data: bool
    formats: tuple[str, ...]
    perplexity: float | None = None
    kl: float | None = None
    size: int | None = None
    bits_per_weight: float | None = None
    sparsity: float | None = None
    seconds: float | None = None

    def fits(self, word: str) -> bool:
        """Whether a word says what it does, with what, or is a part of its name."""
        return word in self.group.split(" and ") or word in (self.group, *self.methods) or word in self.name

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        if self.name:
            return self.name
        scale = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        return f"{self.methods[0]} at {self.bits} bits, {scale}"


@dataclass(frozen=True)
class Original:
    """The bundled model before anything is done: its perplexity, the bytes of its weights, and how many there are."""

    perplexity: float
    size: int
    weights: int


@cache
def original() -> Original:
    """The bundled model."""
    return Original(**_content()["original"])


@cache
def rows() -> tuple[Measured, ...]:
    """Everything that was measured, ready-made pipelines first."""
    found = ({**row, "methods": tuple(row["methods"]), "formats": tuple(row["formats"])} for row in _content()["rows"])
    return tuple(Measured(**row) for row in found)


@cache
def _content() -> dict[str, Any]:
    return read_object(FILE)


__all__ = ["GROUPS", "Measured", "Original", "original", "rows"]
