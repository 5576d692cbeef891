"""Which weights go: the shared selection rules of the pruners. Ties are broken by position, so results repeat."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK
from compress.lazy import torch
from compress.passes.base import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MOST_COMPARED = 16  # neighbours of which each is compared with each; more are sorted

Sparsity = Annotated[float, Ge(0), Lt(1)] | str  # share of zeros, or "keep:of" such as "2:4"


def pattern(sparsity: Sparsity) -> tuple[int, int] | None:
    """("2:4") -> (keep, of); None for a share."""
    if isinstance(sparsity, str):
        keep, of = sparsity.split(":")
        return int(keep), int(of)
    return None


def check_sparsity(sparsity: Sparsity) -> Iterator[OptionError]:
    """What is wrong with a `sparsity` option."""
    if isinstance(sparsity, str):
        match = re.fullmatch(r"(\d+):(\d+)", sparsity)
        if not match:
            yield OptionError("sparsity", f"{sparsity!r} is neither a share such as 0.5 nor keep:of such as '2:4'")
        elif not 0 < int(match[1]) < int(match[2]):
            yield OptionError("sparsity", f"{sparsity!r} keeps {match[1]} of {match[2]}; keep must be from 1 to of - 1")


def pattern_misfit(sparsity: Sparsity, shape: tuple[int, int]) -> str | None:
    """Why an N:M pattern cannot lie on an (out, in) matrix, or None."""
    of = pattern(sparsity)
    if of and shape[1] % of[1]:
        return f"sparsity {sparsity} needs a number of columns that {of[1]} divides; it has {shape[1]}"
    return None


def masked_out(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with weights that are already gone below every other, so they are chosen first."""
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def count_in_share(total: int, share: float) -> int:
    """floor(total * share), where 0.57 of 100 is 57 although the product is 56.99999999999999."""
    return math.floor(round(total * share, 6))


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """(O, I) scores -> mask with floor(I * sparsity) zeros in every row, lowest scores first."""
    return _keep_all_but(scores, count_in_share(scores.shape[1], sparsity))


def keep_pattern(scores: Tensor, keep: int, of: int) -> Tensor:
    """(O, I) scores -> mask that keeps the `keep` highest in every run of `of` columns; of equals the later ones."""
    runs = scores.reshape(-1, of)
    if of > MOST_COMPARED:
        return _keep_all_but(runs, of - keep).view(scores.shape)
    found = torch.empty(runs.shape, dtype=torch.bool)
    at_once = rows_in_piece(CHUNK, of, runs.device)
    for start in range(0, len(runs), at_once):
        part = slice(start, start + at_once)
        found[part] = (_places(runs[part].T.contiguous()) >= of - keep).T
    return found.view(scores.shape)


def _places(runs: Tensor) -> Tensor:
    """(of, N) -> uint8, the place of each number in its run, the lowest first and equals in order; NaN comes first."""
    places = torch.zeros(runs.shape, dtype=torch.uint8)
    for i, score in enumerate(runs):
        ahead = score <= runs[i + 1 :]
        places[i + 1 :] += ahead
        places[i] += (~ahead).sum(0, dtype=torch.uint8)
    return places


def keep_share(scores: Tensor, sparsity: float) -> Tensor:
    """(O, I) scores -> mask with floor(O * I * sparsity) zeros anywhere in the matrix."""
    return keep_all_but(scores, count_in_share(scores.numel(), sparsity))


def keep_all_but(scores: Tensor, count: int) -> Tensor:
    """(O, I) scores -> mask with `count` zeros anywhere in the matrix."""
    return _keep_all_but(scores.reshape(1, -1), count).view(scores.shape)


def _keep_all_but(scores: Tensor, count: int) -> Tensor:
    mask = torch.ones(scores.shape, dtype=torch.bool)
    if count:
        lowest = torch.argsort(scores, dim=1, stable=True)[:, :count]
        mask.scatter_(1, lowest, False)
    return mask
