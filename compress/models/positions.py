"""How many tokens a model can be shown at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.lazy import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

# MPT, and the decoder of Whisper, say it in words of their own.
NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def longest_window(model: nn.Module) -> int | None:
    """Tokens of the longest window that a model has positions for; None where its configuration does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    said = next((value for name in NAMES if isinstance(value := getattr(config, name, None), int) and value > 0), None)
    if said is None:
        return None
    return min([said, *_counted_from_padding(model)])


def _counted_from_padding(model: nn.Module) -> Iterator[int]:
    """RoBERTa and its kin look up the first position behind the row of the padding: the rows before it are not used."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            yield table.num_embeddings - table.padding_idx - 1
