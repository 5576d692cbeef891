"""Models whose tensors compare but do not mean the same: another rope, other heads, another tokenizer.

Two configurations are compared in everything that changes what a model computes and cannot be seen in its tensors'
shapes; two tokenizers in which token an id stands for.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from compress.config.words import shown
from compress.errors import DataError
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Of a configuration: names and versions; what only training, generation or the size of a cache goes by; and what the
# shapes and names of the tensors, or those that are tied, show already.
IRRELEVANT = (
    "*_token_id", "*dropout*", "*pdrop*", "*drop_rate*", "layerdrop", "*initializer*", "init_std", "*_loss_coef",
    "*jitter_noise", "gradient_checkpointing", "use_cache", "output_*", "return_*", "pretraining_tp", "summary_*",
    "problem_type", "num_labels", "transformers_version", "architectures", "*dtype", "_*", "cache_implementation",
    "quantization_config", "reorder_and_upcast_attn", "chunk_size_feed_forward",
    "max_position_embeddings", "n_positions", "n_ctx", "vocab_size", "hidden_size", "hidden_sizes", "n_embd", "n_inner",
    "intermediate_size", "num_hidden_layers", "n_layer", "head_dim", "*_bias", "image_size", "encoder_stride",
    "tie_word_embeddings", "max_window_layers", "use_sliding_window", "id2label", "label2id",
)  # fmt: skip
TOKENIZER = "tokenizer"  # what `accept` calls it


def differences(ours: Any, theirs: Any) -> dict[str, tuple[str, str]]:
    """Where two configurations of one class differ: name of the field -> (ours, theirs), as texts.

    Args:
        ours, theirs: as transformers reads them; of something else, nothing is compared.
    """
    if not hasattr(ours, "to_dict") or not hasattr(theirs, "to_dict"):
        return {}
    first, second = (dict(_fields(config.to_dict(), _known(config))) for config in (ours, theirs))
    names = dict.fromkeys([*first, *second])
    found = {name: (first.get(name), second.get(name)) for name in names}
    return {name: (shown(a), shown(b)) for name, (a, b) in found.items() if a != b} | _labels(ours, theirs)


def other_tokens(ours: Path, theirs: Path) -> tuple[str, str] | None:
    """How two folders' tokenizers differ: (ours, theirs) of the first id that stands for two tokens, and how many do.

    None where they agree in all ids that both have, or where one has no tokenizer that can be read.
    """
    files = [folder / "tokenizer.json" for folder in (ours, theirs)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    first, second = _vocabulary(ours), _vocabulary(theirs)
    other = sorted(number for number in first.keys() & second.keys() if first[number] != second[number])
    if not other:
        return None
    more = f" and {len(other) - 1} more" if len(other) > 1 else ""
    return f"{first[other[0]]!r} as token {other[0]}", f"{second[other[0]]!r}{more}"


def _known(config: Any) -> set[str] | None:
    """What a class of configurations has; others' notes in a file, which no model reads, are not among it."""
    try:
        return {*type(config)().to_dict()}
    except Exception:  # some are made of others, and cannot be made without them
        return None


def _fields(values: Mapping[str, Any], known: set[str] | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of what changes what a model computes; `a.b` inside of others."""
    for name, value in values.items():
        if any(fnmatchcase(str(name), pattern) for pattern in IRRELEVANT) or (known is not None and name not in known):
            continue
        if isinstance(value, dict):
            yield from _fields(value, None, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _labels(ours: Any, theirs: Any) -> dict[str, tuple[str, str]]:
    """Classes that have names, and other ones for the same number."""
    first, second = getattr(ours, "id2label", None) or {}, getattr(theirs, "id2label", None) or {}
    for number in first.keys() & second.keys():
        names = (str(first[number]), str(second[number]))
        if names[0] != names[1] and not any(name.startswith("LABEL_") for name in names):
            return {"id2label": (f"{number}: {names[0]}", f"{number}: {names[1]}")}
    return {}


def _vocabulary(folder: Path) -> dict[int, str]:
    """Number -> token."""
    try:
        return {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
    except DataError:  # a folder without one: nothing to compare
        return {}
