"""The largest keys and values that attention layers put into the cache.

Shapes: B samples, H heads of keys and values, T tokens, D numbers of a head.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.calibration.collect import changed_caches
from compress.errors import NonFiniteError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

Seen = dict[str, dict[str, list[float]]]  # layer -> `keys`, `values`: the largest of each head; `numbers`: of a token


class CacheRanges:
    """What attention layers have put into the cache so far.

    Attributes:
        keys, values: layer -> (H,) float32, the largest magnitude of each head.
        numbers: layer -> how many numbers it keeps of a token.
    """

    def __init__(self) -> None:
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.numbers: dict[str, int] = {}

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While open, what these layers put into the cache is looked at."""
        with changed_caches({module: partial(self._see, name) for name, module in layers.items()}):
            yield

    def _see(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Look at keys and values (B, H, T, D)."""
        if keys.dim() != 4 or values.dim() != 4:
            raise UnsupportedModelError(
                f"{name} keeps keys of {keys.dim()} dimensions, not samples, heads, tokens and numbers; leave kv_cache "
                "out"
            )
        for largest, now in ((self.keys, keys), (self.values, values)):
            found = now.detach().abs().amax((0, 2, 3)).float()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found
        self.numbers[name] = sum(now.shape[1] * now.shape[3] for now in (keys, values))
        return keys, values

    def seen(self) -> Seen:
        """What was seen, as JSON has it.

        Raises:
            NonFiniteError: NaN or infinity was among it.
        """
        for name, keys in self.keys.items():
            if not bool(torch.isfinite(keys).all() and torch.isfinite(self.values[name]).all()):
                raise NonFiniteError(
                    f"keys or values of {name} are NaN or infinite on the calibration data, so they have no range; "
                    "look for NaN weights before it, or run with dtype: float32"
                )
        return {
            name: {"keys": keys.tolist(), "values": self.values[name].tolist(), "numbers": [self.numbers[name]]}
            for name, keys in self.keys.items()
        }


def joined(parts: list[Seen]) -> Seen:
    """What several processes have seen together."""
    found: Seen = {}
    for part in parts:
        for name, facts in part.items():
            before = found.get(name, facts)
            found[name] = {key: list(map(max, facts[key], before[key])) for key in facts}
    return found


__all__ = ["CacheRanges", "Seen", "joined"]
