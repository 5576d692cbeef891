"""The published algorithms written the slow and plain way, in float64, inverses explicit; and what they are given."""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.calibration.training import TrainingStore as TrainingStore
from compress.encodings import Uniform, fit
from compress.testing.merging import Wholes as Wholes
from compress.testing.merging import block_of as block_of
from compress.testing.merging import hash_of as hash_of
from compress.testing.merging import merged as merged
from compress.testing.seen import block as block
from compress.testing.seen import channels_seen as channels_seen
from compress.testing.seen import device_of as device_of
from compress.testing.seen import dropped as dropped
from compress.testing.seen import experts_seen as experts_seen
from compress.testing.seen import inputs as inputs
from compress.testing.seen import mask as mask
from compress.testing.seen import seen_by as seen_by
from compress.testing.seen import statistics as statistics
from compress.testing.seen import target as target
from compress.testing.seen import units_seen as units_seen
from compress.testing.seen import weight as weight
from compress.testing.seen import whole as whole

Values = dict[str, Tensor]


def output_error(before: Tensor, after: Tensor, x: Tensor) -> float:
    """||(before - after) X||^2."""
    return float((x.double() @ (before - after).double().T).square().sum())


def inverse_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U for the damped H in a given order of columns."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    h[dead, dead] = 1
    if order is not None:
        h = h[order][:, order]
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def sweep_columns(w: Tensor, u: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Column by column: `choose` gives the values to keep of column j of the current weight; errors go right."""
    w = w.double().clone()
    out = torch.zeros_like(w)
    for j in range(w.shape[1]):
        out[:, j] = choose(j, w).double()
        error = (w[:, j] - out[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    return out


def gptq(
    w: Tensor,
    gram: Tensor,
    kept: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    search: str = "minmax",
    per_tensor: bool = False,
) -> Uniform:
    rows, columns = w.shape
    width = group_size or columns
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    u = inverse_factor(gram, damping, order)
    options = {"symmetric": symmetric, "search": search}
    if act_order or group_size is None:
        scale, zero = fit(w, bits, groups=columns // width, per_tensor=per_tensor, **options)
        scale = scale.float().expand(rows, -1).clone()
        zero = zero.expand(rows, -1).clone()
    else:
        scale, zero = torch.zeros(rows, columns // width), torch.zeros(rows, columns // width, dtype=torch.uint8)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)

    def choose(j: int, current: Tensor) -> Tensor:
        place = int(order[j])
        group = place // width
        if not act_order and group_size is not None and j % width == 0:
            s, z = fit(current[:, j : j + width].float(), bits, **options)
            scale[:, group], zero[:, group] = s[:, 0].float(), z[:, 0]
        s, z = scale[:, group].double(), zero[:, group].double()
        code = ((current[:, j] / s).round() + z).clamp(0, 2**bits - 1)
        if kept is not None:
            code = torch.where(kept[:, place], code, z)
        codes[:, place] = code.to(torch.uint8)
        return (code - z) * s

    sweep_columns(w[:, order], u, choose)
    return Uniform(codes, scale, zero, bits, symmetric)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` lowest scores of the whole matrix."""
    chosen = torch.ones(scores.numel(), dtype=torch.bool)
    chosen[torch.argsort(scores.flatten(), stable=True)[:count]] = False
    return chosen.view(scores.shape)


def sparsegpt(
    w: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    n_of_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    tile: int = 128,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    u = inverse_factor(gram, damping)
    every = n_of_m[1] if n_of_m else tile
    chosen = torch.ones(w.shape, dtype=torch.bool)

    def choose(j: int, current: Tensor) -> Tensor:
        if j % every == 0:
            stop = min(j + every, w.shape[1])
            scores = current[:, j:stop] ** 2 / u.diagonal()[j:stop] ** 2
            if kept is not None:
                scores = scores.masked_fill(~kept[:, j:stop], -1)
            if n_of_m:
                part = torch.stack([lowest(row, n_of_m[1] - n_of_m[0]) for row in scores])
            else:
                part = lowest(scores, int(scores.numel() * sparsity))
            chosen[:, j:stop] = part if kept is None else part & kept[:, j:stop]
        return current[:, j] * chosen[:, j]

    return sweep_columns(w, u, choose), chosen


def rows_that_differ(a: Tensor, b: Tensor) -> int:
    """Rows are solved independently; a tie broken by the last bit can change one row, a wrong formula changes all."""
    return int((a != b).any(dim=1).sum())


def fine_tunes(count: int, size: float = 0.1) -> list[Values]:
    """A model of three blocks, and `count` others that are a little different."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"first.weight": (9, 4), "last.weight": (5, 5)}
    shapes |= {
        f"blocks.{k}.{name}": shape for k in range(3) for name, shape in (("mlp.weight", (6, 8)), ("bias", (7,)))
    }
    names = sorted(shapes, key=lambda n: (n.startswith("last"), not n.startswith("first"), n))
    base = {name: torch.randn(shapes[name], generator=generator) for name in names}
    return [
        base,
        *({n: v + size * torch.randn(v.shape, generator=generator) for n, v in base.items()} for _ in range(count)),
    ]
