"""Layers whose inputs are turned while the model runs: how the configuration says it, and the hooks that do it.

`turned_inputs` in config.json has patterns of layers, with an asterisk for the number of a block, and how many
neighbouring channels are turned together. Every model that is built from such a configuration has the hooks, so all
that runs, watches or replaces its layers meets inputs that are turned already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings.turn import factors, multiplied

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import nn

ENTRY = "turned_inputs"
BUFFERS = "turn_left", "turn_right"  # of no checkpoint


@dataclass(frozen=True)
class _TurningHook:
    """A hook that can be copied with its module, which has what it multiplies with: where it is, and where it goes."""

    size: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        left, right = (module.get_buffer(name) for name in BUFFERS)
        return (multiplied(args[0], left, right), *args[1:])


def pattern_of(name: str) -> str:
    """The name of a layer with an asterisk in the place of every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def expression_of(pattern: str) -> str:
    """The regular expression that matches the names of its layers, from their beginning."""
    return re.escape(pattern).replace(r"\*", r"\d+") + "$"


def turn_inputs(model: nn.Module, patterns: Mapping[str, int] | None = None) -> None:
    """From now on the inputs of some layers are turned before they see them. Those that are already stay so.

    Args:
        model: whose layers they are.
        patterns: of names -> channels that are turned together; by default what the model's configuration says.

    Raises:
        ValueError: the patterns are none.
    """
    said = getattr(getattr(model, "config", None), ENTRY, None) if patterns is None else patterns
    if said is None:
        return
    if not isinstance(said, dict) or not all(_is_size(size) for size in said.values()):
        raise ValueError(f"{ENTRY} {said!r:.100} of config.json is not a pattern of layers and a power of two for each")
    there = turned_inputs(model)
    for pattern, size in said.items():
        expression = re.compile(expression_of(pattern))
        for name, module in model.named_modules():
            if expression.match(name) and name not in there:
                _turn(module, size)


def _turn(module: nn.Module, size: int) -> None:
    place = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), "cpu")
    for name, matrix in zip(BUFFERS, factors(size), strict=True):
        module.register_buffer(name, matrix.to(place), persistent=False)
    module.register_forward_pre_hook(_TurningHook(size), prepend=True)


def turned_inputs(model: nn.Module) -> dict[str, int]:
    """The layers whose inputs are turned, and how many neighbouring channels of them together."""
    found = ((name, hook) for name, module in model.named_modules() for hook in module._forward_pre_hooks.values())
    return {name: hook.size for name, hook in found if isinstance(hook, _TurningHook)}


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0 and size & (size - 1) == 0


__all__ = ["ENTRY", "expression_of", "pattern_of", "turn_inputs", "turned_inputs"]
