"""Statistics of the inputs of experts whose matrices a model keeps together in one parameter.

Such a matrix is no module's weight, so there is nothing to hook. What is multiplied with it is seen where that happens:
its place in the memory of the parameter says which expert it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from compress.models.experts import passing_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

See = Callable[[str, "Tensor"], None]  # the name of an expert, and what is multiplied with its matrix, (..., in)

# Functions that multiply -> where among their arguments what is multiplied stands, and the matrix.
_T = torch.Tensor
PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__), (0, 1)),
    **dict.fromkeys((torch.addmm, torch.baddbmm, _T.addmm, _T.baddbmm), (1, 2)),
}


@dataclass(frozen=True)
class FusedParameter:
    """A parameter that holds the matrices of all experts.

    Attributes:
        owner: the module that it belongs to.
        leaf: its name there.
        width: how many inputs an expert has.
        count: how many experts there are.
        names: number of an expert -> its name, of those that are to be seen.
    """

    owner: nn.Module
    leaf: str
    width: int
    count: int
    names: Mapping[int, str]

    @property
    def left(self) -> str:
        """Tells modules of experts apart: by it is said that one has run."""
        return f"experts {id(self.owner)}"

    def expert(self, matrix: Tensor) -> int | None:
        """The expert that a matrix is, -1 for all of them at once; None where it is nothing of this parameter.

        Of a matrix that is taken in parts, the first part counts for all of it.
        """
        whole = self.owner._parameters[self.leaf]
        if whole is None or whole.is_meta or matrix.device != whole.device:
            return None
        if matrix.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        place, size = matrix.storage_offset() - whole.storage_offset(), whole.numel() // self.count
        if not 0 <= place < whole.numel() or place % size:
            return None
        return -1 if matrix.dim() > 2 and len(matrix) == self.count else place // size


class SeenExperts(TorchFunctionMode):
    """While open, tells what is multiplied with which expert.

    Attributes:
        parameters: that are watched.
        see: is told.
        paused: nothing is told for now.
    """

    def __init__(self, parameters: Sequence[FusedParameter], see: See, paused: bool = False):
        super().__init__()
        self.parameters, self.see, self.paused = parameters, see, paused

    def __torch_function__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = None if self.paused else PRODUCTS.get(func)
        if places is not None and len(args) > places[1]:
            self._look(args[places[0]], args[places[1]])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Any, matrix: Any) -> None:
        if not isinstance(matrix, torch.Tensor) or not isinstance(x, torch.Tensor):
            return
        for parameter in self.parameters:
            number = parameter.expert(matrix)
            if number is None or x.shape[-1] != parameter.width:
                continue
            if number >= 0:
                self._tell(parameter, number, x)
                continue
            for each in parameter.names:
                rows = x[each]
                self._tell(parameter, each, rows[rows.any(-1)])  # tokens of other experts are zeros

    def _tell(self, parameter: FusedParameter, number: int, x: Tensor) -> None:
        name = parameter.names.get(number)
        if name is not None and x.numel():
            self.see(name, x)


def shown_to_all(module: nn.Module, hidden: Tensor) -> None:
    """Run every expert of a module on every token, one expert after the other; what comes out is of no use.

    Args:
        module: takes (tokens, in), the experts of each token (tokens, k), and their weights (tokens, k).
        hidden: (tokens, in).
    """
    experts = max(len(p) for p in module._parameters.values() if p is not None and p.dim() > 2)
    for number in range(experts):
        put_out(module, hidden, number)


def put_out(module: nn.Module, hidden: Tensor, number: int) -> Tensor:
    """What one expert of a module makes of tokens, (tokens, in), as if the router gave it all of their weight."""
    chosen = torch.full((len(hidden), 1), number, dtype=torch.int64, device=hidden.device)
    weights = hidden.new_ones(len(hidden), 1)
    if passing_on(module):  # such code (LongCat-Flash) fails on tokens with one choice: the second counts nothing
        beyond = min(len(p) for p in module._parameters.values() if p is not None and p.dim() > 2)
        chosen = torch.cat([chosen, torch.full_like(chosen, beyond)], dim=1)
        weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
    output: Tensor = module.forward(hidden, chosen, weights)
    return output


__all__ = ["FusedParameter", "SeenExperts", "put_out", "shown_to_all"]
