"""What all stages that change the shape of a model do with what passes made of it before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.checkpoint.artifact import Packed
from compress.checkpoint.cut import CutSource
from compress.encodings import Weight
from compress.engine.placement import make_room
from compress.models.changed_settings import changed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.engine.context import Context
    from compress.models.cuts import Cut
    from compress.models.fewer_experts import Fewer
    from compress.models.narrow import Narrower
    from compress.models.shorten import Shorter
    from compress.models.turning import Turned
    from compress.models.untie import Untied


def reshaped(
    context: Context, made: Fewer | Narrower | Shorter | Turned | Untied, renamed: Mapping[str, str] | None = None
) -> Context:
    """The model in its new shape: what was done to what is left of it is kept, under the new names.

    Args:
        context: with the model before.
        made: what is left. Nothing of a matrix that is cut is committed.
        renamed: names in the source by the new names of parameters, where these are new.
    """
    before = context.artifact
    of_source = {before.name_in_source(name): cut for name, cut in made.cuts.items()}
    cuts = {name: cut for name, cut in of_source.items() if name in before.stored}
    artifact = replace(
        before,
        graph=made.graph,
        source=CutSource(before.source, cuts) if cuts else before.source,
        renamed=before.renamed if renamed is None else dict(renamed),
        committed=made.moved(before.committed),
        restated=made.moved(_cut(before.restated, made.cuts)),
        vectors=made.moved(_cut(before.vectors, made.cuts)),
        configured=changed(before.configured, made.configured),
    )
    after = replace(context, artifact=artifact)
    for name in artifact.vectors:
        if artifact.added(name):
            make_room(after, name)
    return after


def _cut(made: Mapping[str, Weight | Packed], cuts: Mapping[str, Cut]) -> dict[str, Weight | Packed]:
    """What is left of vectors that passes made, such as the bias of a router, (1, N)."""
    found = dict(made)
    for name in found.keys() & cuts.keys():
        vector = found[name]
        values = (vector.load() if isinstance(vector, Packed) else vector).values
        assert values is not None
        found[name] = Weight(cuts[name].of(values[0])[None])
    return found


__all__ = ["reshaped"]
