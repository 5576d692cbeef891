"""What stages that transform a model without changing what it computes keep of their work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.artifact import finite_weight
from compress.engine.ledger import Record
from compress.engine.validate import observed, observed_vector
from compress.errors import NonFiniteError
from compress.passes.base import Edit

if TYPE_CHECKING:
    from torch import Tensor

    from compress.engine.context import Context
    from compress.passes.base import Pass


@dataclass
class Transformed:
    """Tensors of a part of a model while they are transformed: matrices (out, in) and vectors, in float32.

    Attributes:
        context: where they are read when first asked for.
        pass_: that transforms them.
        values: by name, of sites and of vectors.
        notes: site -> facts for the report.
    """

    context: Context
    pass_: Pass
    values: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = {site.parameter: name for name, site in self.context.artifact.sites.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A site or a vector as it is by now; a parameter that is a site's counts as that."""
        name = self.owners.get(name, name)
        if name not in self.values:
            site = self.context.artifact.sites.get(name)
            made = self.context.tensor(name).float() if site is None else finite_weight(site, self.context.weight(site))
            self.values[name] = made
        return self.values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.values[self.owners.get(name, name)] = value

    def records(self) -> list[Record]:
        """Everything that was asked for, as it is committed.

        Raises:
            NonFiniteError: a number is too large for the type that it is kept in.
        """
        return [self._record(name, value) for name, value in self.values.items()]

    def _record(self, name: str, value: Tensor) -> Record:
        artifact, pass_ = self.context.artifact, self.pass_
        site = artifact.sites.get(name)
        store = artifact.vector_dtype(name) if site is None else artifact.store_dtype(site)
        if value.abs().amax() > torch.finfo(store).max:
            raise NonFiniteError(
                f"{pass_.key} makes {name} larger than {store} holds; give it the model in bfloat16 or float32"
            )
        if site is None:
            before = self.context.tensor(name).float()
            return Record(name, observed_vector(name, pass_, before, Edit(weight=value), store), {})
        weight, _ = observed(site, pass_, self.context.weight(site), value, Edit(weight=value), store)
        return Record(name, weight, {pass_.key: self.notes[name]} if name in self.notes else {})


__all__ = ["Transformed"]
