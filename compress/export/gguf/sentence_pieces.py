"""BPE of characters, as SentencePiece makes it: bytes of what is unknown, and `▁` for spaces.

llama.cpp merges the pair whose token has the highest score, whatever its two parts; tokenizer.json has an order of
merges. They agree where a token's score falls with the place of its first merge, and every way to part a token into
two others is a merge: so it is where merges were made from scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.gguf.tokens import BYTE, UNKNOWN, Cut, refuse_changes
from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from compress.export.gguf.tokens import Tokens

SPACE = "▁"
LAST = -1e6  # the score of what no merge makes


def cut(data: Mapping[str, Any], tokens: Tokens, config: Any, file: Path) -> Cut:
    """How a tokenizer of this kind cuts text; marks unknown and byte tokens by their types."""
    model = data["model"]
    refuse_changes(model, file, "continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, rank)
    added = {token["content"] for token in data.get("added_tokens", [])}
    _refuse_partial(ranks, set(merges), tokens, model["vocab"].keys() - added, file)
    scores = [LAST] * len(tokens.texts)
    for text, rank in ranks.items():
        scores[tokens.numbers[text]] = float(-rank)
    for number in range(256):
        found = tokens.numbers.get(f"<0x{number:02X}>")
        if found is None:
            raise UsageError(f"{file} has no token <0x{number:02X}>, and llama.cpp spells what is unknown in bytes")
        tokens.types[found] = BYTE
    special = {}
    if model.get("unk_token") in tokens.numbers:
        special["unk"] = tokens.numbers[model["unk_token"]]
        tokens.types[special["unk"]] = UNKNOWN
    return Cut("llama", "default", scores=scores, space=_space(data, file), special=special)


def _refuse_partial(
    ranks: Mapping[str, int], merges: set[tuple[str, ...]], tokens: Tokens, plain: Collection[str], file: Path
) -> None:
    """Refuse merges that scores cannot stand for. `plain`: tokens that are not looked for in text before merging."""
    for text in dict.fromkeys((*ranks, *plain)):
        for place in range(1, len(text)):
            pair = text[:place], text[place:]
            if pair not in merges and all(
                part in ranks or (len(part) == 1 and part in tokens.numbers) for part in pair
            ):
                raise UsageError(
                    f"{file} does not merge {pair[0]!r} and {pair[1]!r} though {text!r} is a token, which llama.cpp "
                    "does; export hf"
                )


def _space(data: Mapping[str, Any], file: Path) -> bool:
    """Whether a space is put before a text, and before what follows a special token.

    llama.cpp puts it there whatever the text begins with. Metaspace does not where there is one already, or not after
    special tokens: all other texts are cut the same, so that is said and not refused.

    Raises:
        UsageError: text is changed in another way.
    """
    normalizer = data.get("normalizer")
    spaced = replaced = False
    for step in [] if normalizer is None else normalizer.get("normalizers", [normalizer]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            spaced = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaced = True
        else:
            raise UsageError(f"{file}: GGUF has no place for its normalizer {step['type']}; export hf")
    before = data.get("pre_tokenizer")
    if before is not None and before["type"] == "Metaspace" and before["replacement"] == SPACE:
        replaced = True
        spaced = _spaced_by_metaspace(before, spaced, data["model"], file)
    # Cutting at spaces, which are none any more, does nothing.
    elif before is not None and not (before["type"] == "Split" and before["pattern"] == {"String": " "}):
        raise UsageError(f"{file}: GGUF has no place for its pre_tokenizer {before['type']}; export hf")
    if not replaced:
        raise UsageError(f"{file} leaves spaces as they are, and llama.cpp writes {SPACE!r} for them; export hf")
    return spaced


def _spaced_by_metaspace(step: Mapping[str, Any], spaced: bool, model: Mapping[str, Any], file: Path) -> bool:
    """Whether a text has a space before it behind this step. `spaced`: whether it has one already."""
    inner = next((text for text in model["vocab"] if SPACE in text[1:]), None)
    if step.get("split", True) and inner is not None:
        raise UsageError(
            f"{file} cuts text at spaces before merging (split of Metaspace), and llama.cpp does not, so that it would "
            f"make the token {inner!r}; export hf"
        )
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if scheme == "never" or spaced:
        return spaced
    LOGGER.warning(
        "%s puts a space before a text by the prepend_scheme %s of Metaspace; llama.cpp, like SentencePiece, also puts "
        "one where a text begins with a space%s, and so cuts such texts otherwise",
        file, scheme, " and after special tokens" if scheme == "first" else "",
    )  # fmt: skip
    return True
