"""The names that checkpoints have on the hub, for parameters that transformers puts together of several tensors.

What transformers does while it loads a checkpoint it undoes while it saves one (`revert_weight_conversion`), so that
other programs find the names that they know: a matrix for each expert of a mixture. The same is stated here for one
parameter after the other, so that a model need not be in memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

Described = tuple[tuple[int, ...], "torch.dtype"]  # shape and type of a tensor


@dataclass(frozen=True)
class Undone:
    """Parameters that lie together in the tensors of the hub.

    Attributes:
        converter: transformers' own statement, the other way round; None where only names change.
        parts: (pattern of the converter, name of the parameter), in order.
        renamings: that apply to what comes out.
        model: that the parameters belong to.
        first: what the converter calls them together.
    """

    converter: Any
    parts: tuple[tuple[str, str], ...]
    renamings: tuple[Any, ...]
    model: Any
    first: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(name for _, name in self.parts)

    def tensors(self, value: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What the hub has in their place, by its names. `value`: of a parameter, by name."""
        if self.converter is None:
            return {self.first: value(self.parts[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.parts:
            converter.add_tensor(self.first, name, pattern, lambda name=name: value(name))
        found = converter.convert(self.first, model=self.model, config=self.model.config)
        return {
            _renamed(name, self.renamings): (made[0] if isinstance(made, list) else made).contiguous()
            for name, made in found.items()
        }


def undone(model: Any, described: Mapping[str, Described], places: Callable[[str], str | None]) -> list[Undone] | None:
    """How all tensors of a model are named and laid on the hub.

    Args:
        model: of transformers; on the meta device will do.
        described: shape and type of each of its tensors, by name, in order.
        places: name on the hub -> what of the model begins with it, or None.

    Returns:
        One for each group of parameters that lie together; None where all are named as in the model, or where loading
        what comes out would not give them back.
    """
    from transformers import conversion_mapping, core_model_loading

    prefix = getattr(core_model_loading, "PrefixChange", ())
    stated = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    try:
        reversed_ = [each.reverse_transform() for each in stated[::-1] if not isinstance(each, prefix or ())]
    except (ValueError, NotImplementedError, AttributeError, TypeError):
        return None
    converters = [each for each in reversed_ if isinstance(each, core_model_loading.WeightConverter)]
    renamings = tuple(each for each in reversed_ if isinstance(each, core_model_loading.WeightRenaming))
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in described:
        first, converter, pattern = _matched(name, converters)
        first = first if converter is not None else _renamed(name, renamings)
        groups.setdefault(first, (converter, []))[1].append((pattern, name))
    found = [Undone(c, tuple(parts), renamings, model, first) for first, (c, parts) in groups.items()]
    others = any(each.converter is not None or each.first != each.names[0] for each in found)
    return found if others and _comes_back(found, described, places) else None


def _matched(name: str, converters: Sequence[Any]) -> tuple[str, Any, str]:
    for converter in converters:
        first, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return first, converter, pattern
    return name, None, ""


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _comes_back(
    groups: Sequence[Undone], described: Mapping[str, Described], places: Callable[[str], str | None]
) -> bool:
    """Whether each tensor of the hub is part of one of the parameters that it was made of."""
    seen: set[str] = set()
    for group in groups:
        try:
            made = group.tensors(lambda name: torch.empty(described[name][0], dtype=described[name][1], device="meta"))
        except (ValueError, RuntimeError, KeyError, IndexError, AttributeError, TypeError):
            return False
        if not seen.isdisjoint(made) or any(places(name) not in group.names for name in made):
            return False
        seen.update(made)
    return True
