"""The choice of options that a budget allows: what each would weigh, and the one that loses least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compress.checkpoint.packed_layout import forecast_size
from compress.errors import UsageError
from compress.planning.budget import Knapsack, Option
from compress.report.fitted import FittedLayer, Point
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.engine.fit.sensitivity import Losses
    from compress.models.site import Site

FRONT = 24  # budgets of the front


@dataclass(frozen=True)
class Choices:
    """All that may be chosen.

    Attributes:
        artifact: the original model.
        losses: of each group of layers with each option.
        labels: what the options are called.
    """

    artifact: Artifact
    losses: Losses
    labels: Sequence[str]

    @cached_property
    def knapsack(self) -> Knapsack:
        """Groups as parts of a budget."""
        parts = [
            [Option(sum(self._spec(site.name, i).num_bytes for site in group), loss) for i, loss in enumerate(each)]
            for group, each in zip(self.losses.groups, self.losses.losses, strict=True)
        ]
        return Knapsack(parts, sum(max(option.size for option in options) for options in parts))

    @cached_property
    def weights(self) -> int:
        """How many weights are chosen for."""
        return sum(site.shape[0] * site.shape[1] for group in self.losses.groups for site in group)

    @cached_property
    def smallest(self) -> list[int]:
        """The number of the option of each group that takes fewest bytes."""
        return [kept[0] for kept in self.knapsack.useful]

    def within_size(self, size: int) -> list[int]:
        """What loses least in a file of weights of so many bytes.

        Raises:
            UsageError: the smallest choice takes more; says how much.
        """
        least = self.size(self.smallest)
        if size < least:
            raise too_small(size, least, self.knapsack.least)
        room = size - (least - self.knapsack.least)
        while True:
            chosen = self.knapsack.choose(max(room, self.knapsack.least))
            over = self.size(chosen) - size  # the header of the file grows with the numbers in it
            if over <= 0:
                return chosen
            room -= over

    def within_bits(self, bits: float) -> list[int]:
        """What loses least with so many stored bits for each weight of the layers that are chosen for.

        Raises:
            UsageError: the smallest choice takes more; says how many.
        """
        room = int(bits * self.weights / 8)
        if room < self.knapsack.least:
            raise too_few_bits(bits, self.knapsack.least, self.weights)
        return self.knapsack.choose(room)

    def size(self, chosen: Sequence[int]) -> int:
        """Bytes of the file of weights."""
        specs = {s.name: self._spec(s.name, i) for group, i in self._each(chosen) for s in group}
        return forecast_size(self.artifact, specs)

    def point(self, chosen: Sequence[int]) -> Point:
        """A choice in numbers."""
        knapsack = self.knapsack
        return Point(self.size(chosen), 8 * knapsack.size(chosen) / self.weights, knapsack.loss(chosen))

    def uniform(self) -> dict[str, Point]:
        """Option -> what it would be for all layers."""
        return {label: self.point([i] * len(self.losses.groups)) for i, label in enumerate(self.labels)}

    def front(self) -> tuple[Point, ...]:
        """The best choices for budgets from the smallest to the largest."""
        least, most = (
            self.knapsack.least,
            sum(
                options[kept[-1]].size for options, kept in zip(self.knapsack.parts, self.knapsack.useful, strict=True)
            ),
        )
        found: list[list[int]] = []
        for i in range(FRONT):
            chosen = self.knapsack.choose(least + (most - least) * i // (FRONT - 1))
            if chosen not in found:
                found.append(chosen)
        return tuple(map(self.point, found))

    def layers(self, chosen: Sequence[int]) -> dict[str, FittedLayer]:
        """What was chosen for each layer."""
        found = {}
        for number, (group, i) in enumerate(self._each(chosen)):
            for site in group:
                options = self.losses.swept.sites[site.name].options
                errors = {label: each.relative for label, each in zip(self.labels, options, strict=True)}
                found[site.name] = FittedLayer(self.labels[i], options[i].spec.num_bytes, number, errors)
        return found

    def by_group(self) -> tuple[dict[str, float], ...]:
        """For each group, option -> predicted loss."""
        return tuple(dict(zip(self.labels, each, strict=True)) for each in self.losses.losses)

    def _spec(self, name: str, option: int) -> Spec:
        return self.losses.swept.sites[name].options[option].spec

    def _each(self, chosen: Sequence[int]) -> Iterator[tuple[list[Site], int]]:
        return zip(self.losses.groups, chosen, strict=True)


def refuse_out_of_reach(
    artifact: Artifact, options: Sequence[Mapping[str, Spec]], *, size: int | None, bits: float | None
) -> None:
    """Refuse a budget that no choice meets, or that the original does, by what options are planned to take.

    Args:
        artifact: the original model.
        options: of each option, how every layer would be stored.
        size: bytes of the file of weights.
        bits: instead of it, stored bits for each weight of these layers.

    Raises:
        UsageError: says what the smallest choice takes, or what the original does.
    """
    smallest = {name: min((each[name] for each in options), key=lambda spec: spec.num_bytes) for name in options[0]}
    chosen = sum(spec.num_bytes for spec in smallest.values())
    if size is not None:
        least, whole = forecast_size(artifact, smallest), forecast_size(artifact, {})
        if size < least:
            raise too_small(size, least, chosen)
        if size >= whole:
            raise UsageError(
                f"a file of {size} bytes has room for the model as it is, {whole} bytes ({size_text(whole)}): there is "
                "nothing to do; give less"
            )
    elif bits is not None:
        shapes = {name: math.prod(spec.shape) for name, spec in smallest.items()}
        weights = sum(shapes.values())
        if int(bits * weights / 8) < chosen:
            raise too_few_bits(bits, chosen, weights)
        stored = sum(8 * artifact.store_dtype(artifact.sites[n]).itemsize * count for n, count in shapes.items())
        if bits >= stored / weights:
            raise UsageError(
                f"the layers take {stored / weights:g} bits per weight as they are, and {bits:g} are allowed: there is "
                "nothing to do; give less"
            )


def too_small(size: int, least: int, chosen: int) -> UsageError:
    """Why a file is too small for the smallest choice, which takes `least` bytes, `chosen` of them for its layers."""
    return UsageError(
        f"a file of {size} bytes is too small: the smallest choice takes {least} bytes ({size_text(least)}), "
        f"of which {size_text(least - chosen)} are no layers that were chosen for; give more, or options with fewer "
        "bits"
    )


def too_few_bits(bits: float, chosen: int, weights: int) -> UsageError:
    """Why bits per weight are too few for the smallest choice, which takes `chosen` bytes."""
    least = -(-8 * chosen * 10_000 // weights) / 10_000
    return UsageError(
        f"{bits:g} bits per weight are too few: the smallest choice takes {least:.4f} bits per weight, scales counted; "
        "give more, or options with fewer bits"
    )


__all__ = ["Choices", "refuse_out_of_reach"]
