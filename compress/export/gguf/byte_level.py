"""Byte-level BPE: merges of bytes, and the names that llama.cpp has for the ways text is cut up before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.gguf.tokens import Cut, refuse_changes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compress.export.gguf.tokens import Tokens

# The expressions that readers know by a name, as tokenizer.json has them.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = _BEFORE + _UPPER + "*" + _LOWER + "+{0}|" + _BEFORE + _UPPER + "+" + _LOWER + "*{0}"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
    _CASED.replace("{0}", "") + r"|\p{N}" + _TAIL: "tekken",
    _CASED.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _TAIL: "gpt-4o",
    r" ?[^(\s|[.,!?…。，、।۔،])]+": "bloom",
}


def cut(data: Mapping[str, Any], tokens: Tokens, config: Any, file: Path) -> Cut:
    """How a tokenizer of this kind cuts text."""
    model = data["model"]
    refuse_changes(model, file, "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    normalizer = data.get("normalizer")
    # NFC joins letters with their accents, as nearly every text has them already; llama.cpp leaves text as it is.
    if normalizer and normalizer["type"] != "NFC" and normalizer.get("normalizers") != []:
        refuse_changes(data, file, "normalizer")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = config.type_vocab_size if getattr(config, "model_type", "") == "bert" else 0
    return Cut("gpt2", _splits(data, file), merges, kinds_of_text=kinds)


def _splits(data: Mapping[str, Any], file: Path) -> str:
    steps = data["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *before, last = steps
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        kinds = [step["type"] for step in before]
        if last.get("use_regex", True):
            if not kinds:
                return "gpt-2"
            if kinds == ["Digits"] and before[0]["individual_digits"]:
                return "smollm"
        elif kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0].get("invert"):
            pattern = before[0]["pattern"].get("Regex")
            if pattern in SPLITS:
                return SPLITS[pattern]
    raise UsageError(
        f"{file} cuts text up in a way that llama.cpp has no name for that we know; known are those of "
        f"{', '.join(('gpt-2', 'smollm', *SPLITS.values()))}; export hf"
    )
