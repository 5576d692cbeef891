"""Weights, encodings and grids on another device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from compress.lazy import torch

T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass of tensors, on a device; the very same object where all of it lies there already."""
    if isinstance(value, torch.Tensor):
        return cast("T", value.to(device))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    before = {field.name: getattr(value, field.name) for field in fields(value)}
    after: dict[str, Any] = {name: moved(each, device) for name, each in before.items()}
    changed = {name: each for name, each in after.items() if each is not before[name]}
    return replace(value, **changed) if changed else value
