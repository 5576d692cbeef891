"""Run by `test_solver_kernels.py`, with TRITON_INTERPRET=1: what the kernels of solvers differ by, as JSON."""

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from textbook import inputs, mask, target, weight
from torch import Tensor

from compress.lazy import function
from compress.passes import Gptq, LinearPass, SparseGpt, Wanda
from compress.passes.quantize import division_kernel, learned
from compress.passes.quantize.flexround import Divide
from compress.passes.solvers import descent, obs
from compress.runtime import launch

ROWS, COLUMNS = 6, 24
SOLVERS: dict[str, LinearPass] = {
    "gptq": Gptq(bits=3, group_size=8, tile=16),
    "gptq of whole rows": Gptq(tile=10),
    "gptq of one scale": Gptq(granularity="tensor"),
    "gptq, groups in order": Gptq(bits=3, group_size=8, act_order=False, tile=16),
    "gptq, wide groups in order": Gptq(bits=3, group_size=12, act_order=False, symmetric=True, tile=4),
    "gptq and descent": Gptq(bits=3, group_size=8, rounds=2, scale_search="weighted"),
    "gptq and descent over rows": Gptq(bits=2, symmetric=True, rounds=1),
    "gptq and descent with one scale": Gptq(granularity="tensor", rounds=1),
    "sparsegpt": SparseGpt(sparsity=0.5, tile=10),
    "sparsegpt 2:4": SparseGpt(sparsity="2:4", tile=16),
    "sparsegpt 3:8": SparseGpt(sparsity="3:8", tile=4),
    "wanda with update": Wanda(sparsity="2:4", update="obs"),
}
# rows, groups, columns of a group, rows of scales
DIVISIONS = {"groups": (5, 3, 16, 5), "rows": (3, 1, 1100, 3), "one scale": (4, 1, 37, 1)}
LOOK_UPS = {"one table": (1, 1030), "tables of rows": (3, 7)}  # tables, columns


def anywhere(tensor: Tensor) -> bool:
    """Stands for `has_kernels`."""
    return tensor.dtype == torch.float32


def nowhere(tensor: Tensor) -> bool:
    """Stands for `has_kernels`."""
    return False


def solved(pass_: LinearPass, masked: bool) -> list[Tensor]:
    """The weight, and its codes or mask."""
    kept = mask(ROWS, COLUMNS) if masked else None
    edit = pass_.run(target(weight(ROWS, COLUMNS), inputs(COLUMNS), kept))
    if edit.encoding is not None:
        return [edit.encoding.dequantize(), edit.encoding.codes]
    assert edit.weight is not None
    assert edit.mask is not None
    return [edit.weight, edit.mask]


def divided(kernel: bool, rows: int, groups: int, columns: int, scales: int, device: str = "cpu") -> list[Tensor]:
    """Weights on the grid, and the gradients of what is learned."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    w, first, low = (
        drawn(rows, groups, columns),
        drawn(scales, groups, 1).abs() / 5 + 0.1,
        torch.full((1,), -7.0, device=device),
    )
    own = [(drawn(*shape) / 10).requires_grad_() for shape in (first.shape, w.shape, (rows, groups, 1))]
    s1, s2, s3 = own
    low = low.expand(first.shape).contiguous()
    if kernel:
        made: Tensor = function(division_kernel.FusedDivide).apply(w, first, s1, s2, s3, low, 15)
    else:
        made = function(Divide).apply(w, first, s1, s2 + s3, low, low + 15)
    return [made, *torch.autograd.grad(made, own, drawn(*made.shape))]


def to_look_up(tables: int, columns: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Tables of eight entries, which are learned; numbers of entries; and of the tables they are in, if several."""
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(tables, 8, generator=generator, device="cpu").to(device).requires_grad_()
    index = torch.randint(0, 8, (5, columns), generator=generator, device="cpu").to(device)
    return entries, index, (torch.arange(5, device=device) % tables) if tables > 1 else None


def looked_up(kernel: bool, tables: int, columns: int, device: str = "cpu") -> list[Tensor]:
    """Entries of tables of eight, and the gradient of the tables."""
    entries, index, table_of = to_look_up(tables, columns, device)
    before, learned.has_kernels = learned.has_kernels, anywhere if kernel else nowhere
    found = learned.look_up(entries, index, table_of)
    made = [found, *torch.autograd.grad(found.sin().sum(), [entries])]
    learned.has_kernels = before
    return made


def off(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """How far each is from what is expected, relative to its size."""
    pairs = zip([t.detach() for t in found], [t.detach() for t in expected], strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


def solved_both_ways(pass_: LinearPass, masked: bool) -> list[float]:
    expected = solved(pass_, masked)
    before, obs.has_kernels, descent.has_kernels = obs.has_kernels, anywhere, anywhere
    found = off(solved(pass_, masked), expected)
    obs.has_kernels = descent.has_kernels = before
    return found


def divided_both_ways(*sizes: int) -> list[float]:
    return off(divided(True, *sizes), divided(False, *sizes))


def looked_up_both_ways(tables: int, columns: int) -> list[float]:
    return off(looked_up(True, tables, columns), looked_up(False, tables, columns))


CASES: dict[str, Callable[[], list[float]]] = {
    **{f"{name}, masked": partial(solved_both_ways, pass_, True) for name, pass_ in SOLVERS.items()},
    **{name: partial(solved_both_ways, pass_, False) for name, pass_ in SOLVERS.items()},
    **{f"flexround, {name}": partial(divided_both_ways, *sizes) for name, sizes in DIVISIONS.items()},
    **{f"entries, {name}": partial(looked_up_both_ways, *sizes) for name, sizes in LOOK_UPS.items()},
}
# One of every kind: `make test` runs these, `make real` all.
QUICK = (
    "gptq, masked", "gptq and descent over rows", "sparsegpt 2:4", "wanda with update, masked", "flexround, groups",
    "entries, tables of rows",
)  # fmt: skip


def main(names: list[str]) -> None:
    found = {name: CASES[name]() for name in names} if launch.available() else None
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
