"""One line for all of a model: layers with the options of a quantizer, embedding and head with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from compress.passes.base import LinearPass, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(LinearPass):
    """A quantizer of single matrices that works on embedding and head too, if it is told to.

    Args:
        embeddings: work on the embedding and the output head too, with these options in the place of the pass's own:
            `{bits: 8}`, in a file also `w8` or `w8g64`. Their inputs are not rounded.
    """

    embeddings: Mapping[str, Any] | None = None

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        if self.embeddings is not None:
            for error in replace(self, overrides=(), embeddings=None, **self.embeddings).check():
                yield OptionError(f"embeddings.{error.option}", error.message)

    def alternatives(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield from super().alternatives()
        if self.embeddings is not None:
            yield "embeddings.", self.embeddings

    def at(self, name: str) -> Self:
        found = super().at(name)
        return found if found.embeddings is None else replace(found, embeddings=None)
