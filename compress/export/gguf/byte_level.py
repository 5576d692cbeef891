"""Byte-level BPE: merges of bytes, and the names that llama.cpp has for the ways text is cut up before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.gguf.tokens import Cut, is_passed_over, refuse_changes

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
_THREE_DIGITS = _WORDS + r"|\p{N}{1,3}" + _REST
GPT2, SMOLLM = "gpt-2", "smollm"  # named by other steps than an expression
# Such an expression, and whether words that are tokens are taken whole (ignore_merges) -> the name of both.
SPLITS = {
    (_THREE_DIGITS, True): "llama-bpe",
    (_THREE_DIGITS, False): "smaug-bpe",
    (_WORDS + r"|\p{N}" + _REST, False): "qwen2",
    (_CASED.replace("{0}", "") + r"|\p{N}" + _TAIL, True): "tekken",
    (_CASED.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _TAIL, False): "gpt-4o",
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", False): "bloom",
}


def cut(data: Mapping[str, Any], tokens: Tokens, config: Any, file: Path) -> Cut:
    """How a tokenizer of this kind cuts text."""
    model = data["model"]
    refuse_changes(model, file, "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if not is_passed_over(data.get("normalizer")):
        refuse_changes(data, file, "normalizer")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = config.type_vocab_size if getattr(config, "model_type", "") == "bert" else 0
    return Cut("gpt2", _splits(data, file), merges, kinds_of_text=kinds)


def _splits(data: Mapping[str, Any], file: Path) -> str:
    whole = bool(data["model"].get("ignore_merges"))
    name = _name(data["pre_tokenizer"], whole)
    if name is None:
        raise UsageError(
            f"{file} cuts text up in a way that llama.cpp has no name for that we know"
            f"{', with ignore_merges' if whole else ''}; known are those of "
            f"{', '.join((GPT2, SMOLLM, *SPLITS.values()))}; export hf"
        )
    return name


def _name(steps: Mapping[str, Any], whole: bool) -> str | None:
    """What llama.cpp calls the steps before merging. `whole`: words that are tokens are not merged."""
    *before, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    kinds = [step["type"] for step in before]
    if last.get("use_regex", True):
        if whole or kinds not in ([], ["Digits"]):
            return None
        return GPT2 if not kinds else SMOLLM if before[0]["individual_digits"] else None
    if kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0].get("invert"):
        return SPLITS.get((before[0]["pattern"].get("Regex"), whole))
    return None
