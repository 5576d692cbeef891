"""Rotary position embeddings as files state them: keys, and tensors of a factor for each frequency.

llama.cpp scales evenly (`linear`) and by YaRN itself, from keys. Scalings of other forms are tensors: a frequency is
divided by its factor. Those of Llama 3 are the same for every text; LongRoPE has some for short and some for long ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compress.export.gguf.architectures import FULL, SLIDING, head_width
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.export.gguf.architectures import Architecture

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
USES_FACTORS = ("llama", "arcee", "exaone4")  # architectures whose code looks for FACTORS
USES_LONGROPE = ("phi3",)
BETAS = {"beta_fast": 32, "beta_slow": 1}  # of YaRN; llama.cpp takes no others from a file


def rope_of(config: Any, kind: str = FULL) -> Mapping[str, Any]:
    """The parameters of the layers of some kind, or {} of a model that rotates nothing."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get(kind) or {} if FULL in found or SLIDING in found else found


def rotated(config: Any) -> int:
    """How many channels of a head are rotated."""
    return int(head_width(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def unfit_rope(config: Any, architecture: Architecture) -> Iterator[str]:
    """What of the rotation a file of some architecture cannot state."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    where = f"cannot be said in a GGUF file of architecture {architecture.name}; export hf"
    known = ["default", "linear", "yarn"]
    known += ["llama3"] if architecture.name in USES_FACTORS else []
    known += ["longrope"] if architecture.name in USES_LONGROPE else []
    if kind not in known or (kind != "default" and architecture.fixed.get("rope.scaling.type") == "none"):
        yield f"this model's rope_type, {kind}, {where}"
    if kind == "yarn":
        usual = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
        given = rope.get("attention_factor")
        scales = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
        if architecture.name == "deepseek2":  # scales queries and keys by one alone, and rotates without any
            odd = {} if scales["mscale"] and len(set(scales.values())) == 1 else {"mscale": scales["mscale"]}
        else:
            odd = {name: scale for name, scale in scales.items() if scale}
        odd |= {"attention_factor": given} if given is not None and abs(given - usual) > 1e-6 else {}
        odd |= {"truncate": False} if rope.get("truncate") is False else {}
        odd |= {name: rope[name] for name, only in BETAS.items() if rope.get(name) not in (None, only)}
        yield from (f"this model's {name} of YaRN, {value}, {where}" for name, value in odd.items())
    if not architecture.partial and rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"this model's partial_rotary_factor, {rope['partial_rotary_factor']}, {where}"
    local = rope_of(config, SLIDING).get("rope_type", "default")
    if local != "default" and (local != kind or FULL in (config.rope_parameters or {})):
        yield f"this model's rope_type of layers with a window, {local}, {where}"


def rope_keys(config: Any) -> dict[str, Any]:
    """What a file says of the rotation, without the name of its architecture."""
    rope = rope_of(config)
    if "rope_theta" not in rope:
        return {}
    found: dict[str, Any] = {
        "rope.dimension_count": rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    local = rope_of(config, SLIDING)
    if local is not rope and "rope_theta" in local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn", "longrope"):
        found["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = _original(config, rope)
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = _attention(config, rope)
    return found


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Name -> (rotated / 2,) float32: factors that frequencies are divided by."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        of = {LONG: rope["long_factor"], SHORT: rope["short_factor"]}
        return {name: torch.tensor(factors, dtype=torch.float32) for name, factors in of.items()}
    if kind != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = rotated(config)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return {FACTORS: plain / scaled}


def _original(config: Any, rope: Mapping[str, Any]) -> int:
    given = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(given or config.max_position_embeddings)


def _attention(config: Any, rope: Mapping[str, Any]) -> float:
    """What LongRoPE multiplies queries and keys with."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    longer = config.max_position_embeddings / _original(config, rope)
    return math.sqrt(1 + math.log(longer) / math.log(_original(config, rope))) if longer > 1 else 1.0
