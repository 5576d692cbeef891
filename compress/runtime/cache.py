"""Keys and values on their way into the cache: what an attention layer keeps is looked at, or changed, there.

An attention layer of transformers hands its keys, behind the rotary embedding, and its values to `update` of the cache
that it is called with, and goes on with what that returns. Here it is called with a cache that changes both first, and
hands them on to the one it would have had; where it would have had none, as in training and when a text is scored, it
is given back what would have been kept.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.encodings.cache import SCALES, CacheGrid
from compress.lazy import torch, transformers
from compress.models.architecture import predicts_next

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from compress.encodings.cache import CacheForm

ChangeCache: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"  # keys and values (B, H, T, D)

ARGUMENTS = ("past_key_values", "layer_past")  # what layers call their cache: most, and those of GPT-NeoX and its like


def cached_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> attention layer that keeps keys and values of its own, in the order of the model."""
    return {name: module for name, module in model.named_modules() if _keeps(module)}


def _keeps(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or _argument(code) is None:
        return False
    borrows = getattr(module, "is_kv_shared_layer", False) or "CrossAttention" in type(module).__name__
    return "update" in code.co_names and not borrows


def _argument(code: CodeType) -> tuple[int, str] | None:
    """Which argument of a layer, itself not counted, its cache is, and what it is called; None where it takes none."""
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return next(((place, name) for place, name in enumerate(names[1:]) if name in ARGUMENTS), None)


def cannot_round(model: nn.Module) -> str | None:
    """Why the cache of a model cannot be rounded, in words; None where it can."""
    kind, layers = type(model).__name__, cached_layers(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{kind} has an encoder and a decoder, and the caches of both are not known to engines"
    if hasattr(model, "config") and not predicts_next(model):
        return f"{kind} does not write one token after the other, so it keeps no keys and values"
    if not layers:
        return f"no layer of {kind} keeps keys and values in a cache of transformers"
    latent = next((name for name, layer in layers.items() if hasattr(layer, "kv_lora_rank")), None)
    if latent is not None:
        return f"engines keep latents of {latent} of {kind}, not keys and values, and their scales are other ones"
    return None


def change_cache(module: nn.Module, change: ChangeCache) -> RemovableHandle:
    """From now on an attention layer, and copies of it, keeps what `change` makes of its keys and values."""
    return module.register_forward_pre_hook(_ChangingHook(change), with_kwargs=True)


def round_cache(module: nn.Module, form: CacheForm) -> None:
    """From now on an attention layer rounds what it keeps, with scales that are read into it."""
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    for name, (shape, dtype) in form.tensors().items():
        module.register_buffer(name, torch.ones(shape, dtype=dtype, device=device))
    change_cache(module, _Loaded(module, form))


@dataclass
class _Loaded:
    """The rounding of a layer that holds its scales, wherever it is moved."""

    module: nn.Module
    form: CacheForm

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return CacheGrid(self.form, *(self.module.get_buffer(name) for name in SCALES)).apply(keys, values)


@dataclass
class _ChangingHook:
    """A hook that can be copied with its module."""

    change: ChangeCache

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        found = _argument(inspect.unwrap(type(module).forward).__code__)
        assert found is not None
        place, name = found
        if place < len(args):
            return (*args[:place], self._around(args[place]), *args[place + 1 :]), kwargs
        return args, {**kwargs, name: self._around(kwargs.get(name))}

    def _around(self, cache: Any) -> ChangedCache:
        if isinstance(cache, transformers.EncoderDecoderCache):
            cache = cache.self_attention_cache
        return ChangedCache(cache, self.change)


class ChangedCache:
    """What an attention layer takes for its cache.

    Args:
        cache: what keeps keys and values; None where nothing does.
        change: what they are before they are kept.
    """

    def __init__(self, cache: Any, change: ChangeCache):
        self._cache, self._change = cache, change

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep these; all that is kept of the layer."""
        keys, values = self._change(keys, values)
        if self._cache is None:
            return keys, values
        kept: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return kept

    def get_seq_length(self, *args: Any) -> int:
        """How many tokens were kept before."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(*args))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)


__all__ = ["ChangeCache", "cached_layers", "cannot_round", "change_cache", "round_cache"]
