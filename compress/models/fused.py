"""Layers that engines multiply as one matrix: queries, keys and values; gate and up.

An engine such as vLLM or SGLang puts the codes of such layers one below the other while it loads them, and has one
scheme for all: bits, groups, symmetry, and of NVFP4 one scale of the scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.models.site import Site

# What an engine calls the matrix -> its parts; by `packed_modules_mapping` of the models of vLLM 0.32.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv": ("query", "key", "value"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
WHOLE = {leaf: whole for whole, parts in FUSED.items() for leaf in parts}


def fused_name(name: str) -> str | None:
    """What engines call the matrix that a layer is a part of; None where it is none."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{WHOLE[leaf]}" if leaf in WHOLE and owner else None


def fused_groups(sites: Iterable[Site]) -> dict[str, list[str]]:
    """What engines call a matrix -> the layers that it is made of, where they are several."""
    found: dict[str, list[str]] = {}
    for site in sites:
        whole = fused_name(site.name)
        if whole is not None and not site.is_expert:
            found.setdefault(whole, []).append(site.name)
    return {whole: names for whole, names in found.items() if len(names) > 1}


__all__ = ["fused_groups", "fused_name"]
