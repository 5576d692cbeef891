"""How what one process has made is taken to another: as facts that JSON holds, and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compress.encodings import Spec, Weight, pack, unpack
from compress.engine.ledger import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.engine.devices import Devices

Done = TypeVar("Done")
Parcel = tuple[Any, "Mapping[str, Tensor]"]


class Carrier(Protocol[Done]):
    """Takes what was made of a piece of work apart, and puts it together again."""

    def packed(self, done: Done) -> Parcel:
        """Facts and tensors, wherever these are."""

    def unpacked(self, facts: Any, tensors: Mapping[str, Tensor]) -> Done:
        """The inverse of `packed`; the tensors are in the host's memory."""


class Facts(Carrier[Any]):
    """Carries what JSON holds."""

    def packed(self, done: Any) -> Parcel:
        return done, {}

    def unpacked(self, facts: Any, tensors: Mapping[str, Tensor]) -> Any:
        return facts


class NotedTensor(Carrier[tuple["Tensor", Any]]):
    """Carries a tensor, and something that JSON holds."""

    def packed(self, done: tuple[Tensor, Any]) -> Parcel:
        return done[1], {"tensor": done[0]}

    def unpacked(self, facts: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        return tensors["tensor"], facts


@dataclass(frozen=True)
class Records(Carrier[list[Record]]):
    """Carries weights as they are stored.

    Attributes:
        devices: where they are computed with.
    """

    devices: Devices

    def packed(self, done: list[Record]) -> Parcel:
        facts, tensors = [], {}
        for i, record in enumerate(done):
            assert isinstance(record.weight, Weight)
            spec, stored = pack(self.devices.to_store(record.weight))
            facts.append([record.site, spec.to_json(), record.notes])
            tensors.update({f"{i}.{leaf}": value for leaf, value in stored.items()})
        return facts, tensors

    def unpacked(self, facts: Any, tensors: Mapping[str, Tensor]) -> list[Record]:
        found = []
        for i, (site, said, notes) in enumerate(facts):
            spec, begin = Spec.from_json(said), f"{i}."
            stored = {name.removeprefix(begin): v for name, v in tensors.items() if name.startswith(begin)}
            found.append(Record(site, self.devices.to_compute(unpack(spec, stored)), notes))
        return found


__all__ = ["Carrier", "Facts", "NotedTensor", "Parcel", "Records"]
