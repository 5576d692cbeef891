"""Mixtures of super-blocks by the names that llama.cpp gives them: `q4_k_m` is `q4_k` with some layers in `q6_k`.

Values, and what attention and feed-forward put out, lose most by few bits, in some blocks more than in others: those
get more.

| name     | of most | v_proj                     | down_proj                     | o_proj |
|----------|---------|----------------------------|-------------------------------|--------|
| `q2_k`   | `q2_k`  | `q3_k`                     | `q3_k`                        | `q3_k` |
| `q3_k_s` | `q3_k`  |                            |                               |        |
| `q3_k_m` | `q3_k`  | `q4_k`, the first 2 `q5_k` | `q4_k`, the first 16th `q5_k` | `q4_k` |
| `q3_k_l` | `q3_k`  | `q5_k`                     | `q5_k`                        | `q5_k` |
| `q4_k_s` | `q4_k`  | the first 4 `q5_k`         | the first 8th `q5_k`          |        |
| `q4_k_m` | `q4_k`  | some `q6_k`                | some `q6_k`                   |        |
| `q5_k_s` | `q5_k`  |                            |                               |        |
| `q5_k_m` | `q5_k`  | some `q6_k`                | some `q6_k`                   |        |
| `q6_k`   | `q6_k`  |                            |                               |        |

Some are the first 8th of the blocks, the last 8th, and every third between. Embedding and head are `q6_k`.

Source: how `llama-quantize` chooses types (`llama_tensor_get_type` of llama.cpp, 2025). Differs from it in: an
embedding that is not tied is `q6_k` like the head; what depends on the number of experts, on how many queries share a
value, or on queries, keys and values in one matrix, is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = {
    "q2_k": "q2_k", "q3_k_s": "q3_k", "q3_k_m": "q3_k", "q3_k_l": "q3_k", "q4_k_s": "q4_k", "q4_k_m": "q4_k",
    "q5_k_s": "q5_k", "q5_k_m": "q5_k", "q6_k": "q6_k",
}  # fmt: skip
ENDS = "q6_k"  # embedding and head


def more_bits(block: int, blocks: int) -> bool:
    """Whether a block is one of some."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def _first(count: int, scheme: str, others: str | None = None) -> Callable[[int], str | None]:
    return lambda block: scheme if block < count else others


def _some(blocks: int) -> Callable[[int], str | None]:
    return lambda block: "q6_k" if more_bits(block, blocks) else None


def _rules(name: str, blocks: int) -> dict[str, Callable[[int], str | None]]:
    """Name of a layer -> its scheme in each block, or None for that of most."""

    def all_of(scheme: str) -> dict[str, Callable[[int], str | None]]:
        return {leaf: _first(blocks, scheme) for leaf in ("v_proj", "down_proj", "o_proj")}

    return {
        "q2_k": all_of("q3_k"),
        "q3_k_m": {
            "v_proj": _first(2, "q5_k", "q4_k"),
            "down_proj": _first(blocks // 16, "q5_k", "q4_k"),
            "o_proj": _first(blocks, "q4_k"),
        },
        "q3_k_l": all_of("q5_k"),
        "q4_k_s": {"v_proj": _first(4, "q5_k"), "down_proj": _first(blocks // 8, "q5_k")},
        "q4_k_m": {"v_proj": _some(blocks), "down_proj": _some(blocks)},
        "q5_k_m": {"v_proj": _some(blocks), "down_proj": _some(blocks)},
    }.get(name, {})


def mixture(name: str, blocks: int) -> dict[str, Any]:
    """The options of rtn or gptq that a mixture is, of a model of so many blocks.

    Raises:
        UsageError: no mixture of that name.
    """
    if name not in MOST:
        raise UsageError(f"--type {name}: known are {', '.join(MOST)}")
    overrides = []
    for leaf, scheme_of in _rules(name, blocks).items():
        chosen = [scheme_of(block) for block in range(blocks)]
        if None not in chosen and len(set(chosen)) == 1:
            overrides.append({"match": f"*.{leaf}*", "scheme": chosen[0]})
            continue
        for block, scheme in enumerate(chosen):
            if scheme is not None:
                overrides.append({"match": f"*layers.{block}.*{leaf}*", "scheme": scheme})
    return {"scheme": MOST[name], "embeddings": ENDS, **({"overrides": overrides} if overrides else {})}


def blocks_of(model: str) -> int:
    """How many blocks a model has, by its configuration.

    Raises:
        UsageError: its configuration does not say.
    """
    from compress.models import adapters  # which take a while to import
    from compress.models.loading import read_config

    config = read_config(adapters.locate(model).folder).get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UsageError(f"--type: the configuration of {model} does not say how many blocks it has; write a pipeline")
    return count


__all__ = ["ENDS", "MOST", "blocks_of", "mixture", "more_bits"]
