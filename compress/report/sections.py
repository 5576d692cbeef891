"""What a stage tells the report, by kind of stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from compress.models.symmetry import Part
    from compress.report.report import Report

Changes = dict[str, dict[str, float | None]]  # another model -> source of data -> change of the result from it


class Section(Protocol):
    """What a stage tells the report."""

    def add_to(self, report: Report, against: Changes | None) -> None:
        """Put it in. `against`: changes from the models that the result is compared with, where there are any."""


@dataclass(frozen=True)
class LayersChanged:
    """What passes did to layers.

    Attributes:
        layers: site -> pass -> notes.
        fallbacks: where something else was done than asked for, in words.
        trained: pass -> how many numbers it trained.
        parameters: how many the model has.
    """

    layers: Mapping[str, Mapping[str, Any]]
    fallbacks: Sequence[str] = ()
    trained: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0

    def add_to(self, report: Report, against: Changes | None) -> None:
        for site, notes in self.layers.items():
            report.layers.setdefault(site, {}).update(notes)
        report.fallbacks += self.fallbacks
        report.trained += [
            {"pass": name, "numbers": count, "parameters": self.parameters} for name, count in self.trained.items()
        ]


@dataclass(frozen=True)
class BlocksDropped:
    """Which blocks a pass took out.

    Attributes:
        pass_key: of the pass.
        blocks: that went, numbered as before the stage.
        of: how many blocks there were.
        distances: the measured ones by the name of the first block, one mapping per time they were asked for.
        renamed: name of a module before the stage -> its name now; None when it is gone.
    """

    pass_key: str
    blocks: list[int]
    of: int
    distances: list[dict[str, float]]
    renamed: Callable[[str], str | None]

    def add_to(self, report: Report, against: Changes | None) -> None:
        """What was reported of blocks that stay, under their new names."""
        now = ((self.renamed(name), notes) for name, notes in report.layers.items())
        report.layers = {name: notes for name, notes in now if name is not None}
        report.dropped.append(
            {"pass": self.pass_key, "blocks": self.blocks, "of": self.of, "distances": self.distances}
        )


@dataclass(frozen=True)
class ExpertsGone:
    """Which experts a pass took out.

    Attributes:
        pass_key: of the pass.
        kept: how many of every layer stay.
        of: how many there were.
        layers: module of experts -> which went (`gone`), numbered as before the stage, and of all the `scores` that
            decided and the `tokens` that they were sent; and where some became one, `merged`: the number that it
            had -> those of all that it is made of.
        renamed: name of a site before the stage -> its name now; None when it is gone.
    """

    pass_key: str
    kept: int
    of: int
    layers: Mapping[str, Mapping[str, Any]]
    renamed: Callable[[str], str | None]

    def add_to(self, report: Report, against: Changes | None) -> None:
        """What was reported of experts that stay, under their new names."""
        now = ((self.renamed(name), notes) for name, notes in report.layers.items())
        report.layers = {name: notes for name, notes in now if name is not None}
        layers = {name: dict(facts) for name, facts in self.layers.items()}
        report.experts.append({"pass": self.pass_key, "kept": self.kept, "of": self.of, "layers": layers})


@dataclass(frozen=True)
class UnitsGone:
    """How many neurons and heads a pass took out.

    Attributes:
        pass_key: of the pass.
        counts: part of a block -> how many of its units stay, and of how many.
        layers: layer that reads units -> which stay (`kept`, numbered as before the stage), and the notes of the pass.
    """

    pass_key: str
    counts: Mapping[Part, tuple[int, int]]
    layers: Mapping[str, Mapping[str, Any]]

    def add_to(self, report: Report, against: Changes | None) -> None:
        for name, notes in self.layers.items():
            said = {key: value for key, value in notes.items() if key != "kept"}
            report.layers.setdefault(name, {})[self.pass_key] = said
            if "fallback" in said:
                report.fallbacks.append(f"{name}: {said['fallback']}")
        parts = {part: {"kept": kept, "of": of} for part, (kept, of) in self.counts.items()}
        layers = {name: list(notes["kept"]) for name, notes in self.layers.items()}
        report.width.append({"pass": self.pass_key, "parts": parts, "layers": layers})


@dataclass(frozen=True)
class NormsRecounted:
    """Whose statistics a pass counted again.

    Attributes:
        pass_key: of the pass.
        layers: batch norm -> how far its means `moved`, in its old standard deviations (root of the mean square over
            channels), its new variance by its old one (`variance_ratio`, geometric mean), and of how many `batches`.
        unseen: batch norms that no sample reached, which keep what they had.
    """

    pass_key: str
    layers: Mapping[str, Mapping[str, Any]]
    unseen: Sequence[str]

    def add_to(self, report: Report, against: Changes | None) -> None:
        layers = {name: dict(facts) for name, facts in self.layers.items()}
        report.norms.append({"pass": self.pass_key, "layers": layers})
        report.fallbacks += [
            f"{name}: the calibration data never reach it, so it keeps its statistics" for name in self.unseen
        ]


@dataclass(frozen=True)
class CachesRounded:
    """How attention layers round the keys and values that they keep.

    Attributes:
        pass_key: of the pass.
        form: in words.
        layers: attention layer -> `k_scale` and `v_scale`, one or one for each head.
        unseen: layers that put nothing into the cache, which keep what they keep as it is.
        token_bytes: of a token in the caches of these layers, at 16 bits and as they are now.
    """

    pass_key: str
    form: str
    layers: Mapping[str, Mapping[str, list[float]]]
    unseen: Sequence[str]
    token_bytes: tuple[int, int]

    def add_to(self, report: Report, against: Changes | None) -> None:
        layers = {name: dict(scales) for name, scales in self.layers.items()}
        facts = {"pass": self.pass_key, "form": self.form, "token_bytes": list(self.token_bytes), "layers": layers}
        report.caches.append(facts)
        report.fallbacks += [
            f"{name}: the calibration data put nothing into its cache, which stays as it is" for name in self.unseen
        ]


@dataclass(frozen=True)
class ModelsMerged:
    """What was merged.

    Attributes:
        pass_key: of the pass.
        models: the others.
        tensors: how many were merged.
        more: what the pass has to say (`notes`) and the size of a compressed delta (`delta`), where there are any.
    """

    pass_key: str
    models: list[str]
    tensors: int
    more: Mapping[str, Any]

    def add_to(self, report: Report, against: Changes | None) -> None:
        facts = {"pass": self.pass_key, "models": self.models, "tensors": self.tensors, **self.more}
        report.merged.append(facts if against is None else {**facts, "against": against})
