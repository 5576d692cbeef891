"""WordPiece, the tokenizer of BERT: pieces that begin a word have a mark in the file, where BERT marks the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.gguf.sentence_pieces import SPACE
from compress.export.gguf.tokens import CONTROL, UNUSED, USER_DEFINED, Cut

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compress.export.gguf.tokens import Tokens

INSIDE = "##"
MEANINGS = {"bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}


def cut(data: Mapping[str, Any], tokens: Tokens, config: Any, file: Path) -> Cut:
    """How a tokenizer of this kind cuts text; respells the tokens."""
    model, normalizer = data["model"], data.get("normalizer") or {}
    if model.get("continuing_subword_prefix", INSIDE) != INSIDE:
        raise UsageError(f"{file}: GGUF has no place for its continuing_subword_prefix; export hf")
    if normalizer.get("type") != "BertNormalizer" or not normalizer.get("lowercase"):
        raise UsageError(f"{file} keeps capital letters, and llama.cpp's WordPiece makes them small; export hf")
    if normalizer.get("strip_accents") is False:
        raise UsageError(f"{file} keeps accents, and llama.cpp's WordPiece drops them; export hf")
    for option in ("clean_text", "handle_chinese_chars"):
        if normalizer.get(option) is False:
            raise UsageError(f"{file} has {option}: false, and llama.cpp's WordPiece does as with true; export hf")
    if (data.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        raise UsageError(f"{file} cuts text up in another way than BertPreTokenizer, as llama.cpp does; export hf")
    for number, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True)):
        if kind not in (CONTROL, USER_DEFINED, UNUSED):
            tokens.texts[number] = text.removeprefix(INSIDE) if text.startswith(INSIDE) else SPACE + text
    special = {name: tokens.numbers[text] for name, text in MEANINGS.items() if text in tokens.numbers}
    return Cut("bert", "default", special=special, kinds_of_text=config.type_vocab_size)
