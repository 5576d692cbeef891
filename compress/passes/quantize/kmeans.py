"""One-dimensional weighted k-means.

On a line every cluster is an interval: with running sums over sorted points an iteration costs K look-ups, however many
weights there are. scikit-learn's, for points in space, would visit every weight in every iteration.

Shapes: P = points, K = centres.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.encodings.counting import sums_by_number
from compress.encodings.pieces import rows_in_piece
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20  # values worked on at once
CELLS = 1 << 16  # float16 numbers


def points(values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Different values and how much each counts.

    Of many values those that float16 cannot tell apart become one, their mean: centres are stored in float16, so
    nothing finer is of use.

    Args:
        values: (O, I) float32.
        importance: not negative, expands to (O, I). Values of importance zero are left out.

    Returns:
        Places (P,) ascending and masses (P,), the summed importance, float64. P is at most 65536.
    """
    weights = importance.expand(values.shape)
    if values.numel() <= CELLS:
        few, index = torch.unique(values, return_inverse=True)
        places, masses = few.double(), sums_by_number(index.flatten(), weights.flatten().double(), len(few))
        return places[masses > 0], masses[masses > 0]
    mass, moment = torch.zeros(CELLS, dtype=torch.float64), torch.zeros(CELLS, dtype=torch.float64)
    # A power of two loses no bit, and puts what is nearly too small for float16 far below the largest value.
    unit = 2.0 ** min(15 - math.frexp(float(values.abs().max()))[1], 126)
    rows = rows_in_piece(CHUNK, values.shape[1], values.device)
    for some, counted in zip(torch.split(values, rows), torch.split(weights, rows), strict=True):
        half = (some * unit).half() + 0.0  # one zero, not two
        cell = half.flatten().view(torch.int16).int() & (CELLS - 1)
        each = counted.flatten().double()
        mass += sums_by_number(cell, each, CELLS)
        moment += sums_by_number(cell, each * some.flatten(), CELLS)
    places, order = (moment[mass > 0] / mass[mass > 0]).sort()
    return places, mass[mass > 0][order]


def kmeans(
    places: Tensor,
    masses: Tensor,
    count: int,
    *,
    start: Tensor | None = None,
    iterations: int = 50,
    tolerance: float = 1e-4,
) -> Tensor:
    """Lloyd's algorithm on a line. Deterministic; no iteration makes the squared error larger.

    Source: Lloyd, "Least squares quantization in PCM", 1957 (IEEE Transactions on Information Theory, 1982); the start
    after Panter and Dite, 1951: many centres lie as dense as the cube root of the density they stand for.

    Args:
        places: (P,) float64, ascending.
        masses: (P,) float64, positive.
        count: K.
        start: (K,) ascending centres; by default quantiles of the cube root of the density.
        iterations: at most this many.
        tolerance: an iteration that lowers the error by a smaller share is the last.

    Returns:
        (K,) float64, ascending. With no more places than centres: the places, the last one repeated.
    """
    if len(places) <= count:
        known = places if len(places) else places.new_zeros(1)
        return torch.cat([known, known[-1:].expand(count - len(known))])
    mass, moment = (
        functional.pad(masses.cumsum(0), (1, 0)),
        functional.pad((masses * places).cumsum(0), (1, 0)),
    )
    energy = float((masses * places.square()).sum())
    centres = _density_quantiles(places, masses, count) if start is None else start.double()
    before = math.inf
    for _ in range(iterations):
        borders = (centres[1:] + centres[:-1]) / 2
        cuts = functional.pad(
            functional.pad(torch.searchsorted(places, borders, right=True), (1, 0)), (0, 1), value=len(places)
        )
        inside, sums = mass[cuts].diff(), moment[cuts].diff()
        empty = inside <= 0
        centres = torch.where(empty, centres, sums / inside)
        if bool(empty.any()):  # they go where most is lost
            lost = masses * (places - centres[torch.bucketize(places, borders)]).square()
            centres[empty] = places[lost.topk(int(empty.sum())).indices]
            centres = centres.sort().values
            continue
        error = energy - float((sums * centres).sum())
        if before - error <= tolerance * error:
            break
        before = error
    return centres


def _density_quantiles(places: Tensor, masses: Tensor, count: int) -> Tensor:
    """(K,) places that cut the integral of the cube root of the density into equal parts."""
    steps = (masses * torch.gradient(places)[0].square()).pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64, device=places.device) + 0.5) / count * steps[-1]
    return places[torch.searchsorted(steps, wanted).clamp_(max=len(places) - 1)]
