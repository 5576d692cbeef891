"""tokenizer.json as GGUF files keep it: byte-level BPE, its tokens and merges, and the name of how text is cut up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.io.small_file import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
# The expressions that readers know by a name, as tokenizer.json has them.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {_WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"|\p{N}" + _REST: "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    Attributes:
        tokens: by id, as many as the model has embeddings.
        types: of each.
        merges: in order, the two parts with a space between.
        splits: the name of how text is cut up before merging.
        special: `bos`, `eos` and `pad` -> their ids, where the model has one.
        begins: whether every text is begun with `bos`.
        ends: whether every text is ended with `eos`.
        chat: the template of conversations, or None.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    splits: str
    special: dict[str, int]
    begins: bool
    ends: bool
    chat: str | None


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The tokenizer of a folder, for a model of some configuration.

    Raises:
        UsageError: there is none, or it is of another kind.
    """
    file, size = folder / "tokenizer.json", config.vocab_size
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        model = data["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            kind = "BPE of characters" if model.get("byte_fallback") else model.get("type")
            raise UsageError(f"{file}: only byte-level BPE can be written, and this is {kind}; export hf")
        changed = [k for k in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(k)]
        changed += ["normalizer"] if data.get("normalizer") else []
        if changed:
            raise UsageError(f"{file}: GGUF has no place for its {changed[0]}; export hf")
        added = data.get("added_tokens", [])
        named = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        if named and max(named.values()) >= size:
            raise UsageError(f"{file} has tokens up to {max(named.values())}, and the model embeds only {size}")
        tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
        for text, number in named.items():
            tokens[number], types[number] = text, NORMAL
        for token in added:
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        special, (first, last) = _special(config), _template_ends(data.get("post_processor"))
        for text, kind in ((first, "bos"), (last, "eos")):
            if text is not None and named.get(text) != special.get(kind):
                raise UsageError(
                    f"{file} puts {text} around every text, and config.json's {kind}_token_id is {special.get(kind)}; "
                    "GGUF can only add that one: correct it, or export hf"
                )
        splits = _splits(data, file)
        return Vocabulary(tokens, types, merges, splits, special, first is not None, last is not None, _chat(folder))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} has no tokenizer.json, and llama.cpp reads the tokenizer from the same file; save it there with "
            "save_pretrained, or export hf"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is not a tokenizer that can be written: {error!r}; export hf") from error


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


def _special(config: Any) -> dict[str, int]:
    found = {kind: getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    first = {kind: value[0] if isinstance(value, list) and value else value for kind, value in found.items()}
    return {kind: value for kind, value in first.items() if isinstance(value, int)}


def _template_ends(post_processor: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """What the template of a single text puts before and after it."""
    steps = [post_processor] if post_processor else []
    steps = [inner for step in steps for inner in step.get("processors", [step])]
    template: list[dict[str, Any]] = next(
        (step["single"] for step in steps if step["type"] == "TemplateProcessing"), []
    )
    around = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in template]
    return (around[0], around[-1]) if around else (None, None)


def _chat(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
