"""tokenizer.json as GGUF files keep it: its tokens with their types, what merges them, and what is put around a text.

Three kinds: byte-level BPE, BPE of characters as SentencePiece makes it, and WordPiece. llama.cpp cuts text up before
merging in ways that it has names for. Its own converter finds the name by a hash of one encoded text; here it is found
by the steps of `pre_tokenizer`, which are what the hash stands for, so that a fine-tune with new tokens is known too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.gguf import byte_level, sentence_pieces, word_pieces
from compress.export.gguf.tokens import add_tokens, refuse_odd_tokens
from compress.io.small_file import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compress.export.gguf.tokens import Cut, Tokens

# Kind of token -> what a file calls it, its spelling included.
KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask", "cls": "cls",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    Attributes:
        tokens: by id.
        cut: how a text becomes tokens.
        special: `bos`, `eos`, `unk`, `pad`, `sep`, `mask` and `cls` -> their ids, where there is one.
        begins: whether every text is begun with `bos`.
        ends: whether every text is ended with `eos`.
        chat: the template of conversations, or None.
    """

    tokens: Tokens
    cut: Cut
    special: dict[str, int]
    begins: bool
    ends: bool
    chat: str | None

    def say(self, writer: Any) -> None:
        """Put it into a file that is being written."""
        if self.tokens.name is not None:
            writer.add_name(self.tokens.name)
        writer.add_tokenizer_model(self.cut.model)
        writer.add_tokenizer_pre(self.cut.splits)
        writer.add_token_list(self.tokens.texts)
        writer.add_token_types(self.tokens.types)
        if self.cut.scores:
            writer.add_token_scores(self.cut.scores)
        if self.cut.merges:
            writer.add_token_merges(self.cut.merges)
        if self.cut.space is not None:
            writer.add_add_space_prefix(self.cut.space)
        for kind, key in KEYS.items():
            if kind in self.special:
                writer.add_uint32(f"tokenizer.ggml.{key}_token_id", self.special[kind])
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.cut.model == "bert":
            writer.add_add_sep_token(self.ends)
        if self.cut.kinds_of_text:
            writer.add_token_type_count(self.cut.kinds_of_text)
        if self.chat:
            writer.add_chat_template(self.chat)


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The tokenizer of a folder, for a model of some configuration.

    Raises:
        UsageError: there is none, or it is of another kind.
    """
    file = folder / "tokenizer.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = _kind(data, file)
        tokens = add_tokens(data, config.vocab_size, file)
        cut = kind.cut(data, tokens, config, file)
        refuse_odd_tokens(data, tokens, file)
        special = {**_special(config), **cut.special}
        first, last = _around(data.get("post_processor"), file)
        for number, name in ((first, "bos"), (last, "eos")):
            if number is not None and number != special.get(name):
                raise UsageError(
                    f"{file} puts {tokens.texts[number]} around every text, and config.json's {name}_token_id is "
                    f"{special.get(name)}; GGUF can only add that one: correct it, or export hf"
                )
            if number is None and cut.model == "bert":
                raise UsageError(
                    f"{file} does not put [CLS] before and [SEP] after every text, which llama.cpp's WordPiece does; "
                    "export hf"
                )
        return Vocabulary(tokens, cut, special, first is not None, last is not None, _chat(folder))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} has no tokenizer.json, and llama.cpp reads the tokenizer from the same file; save it there with "
            "save_pretrained, or export hf"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UsageError(f"{file} is not a tokenizer that can be written: {error!r}; export hf") from error


def _kind(data: Mapping[str, Any], file: Path) -> Any:
    """The module that knows tokenizers of its kind."""
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind == "WordPiece":
        return word_pieces
    if kind != "BPE":
        raise UsageError(f"{file}: BPE and WordPiece can be written, and this is {kind}; export hf")
    return sentence_pieces if model.get("byte_fallback") else byte_level


def _special(config: Any) -> dict[str, int]:
    found = {kind: getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    first = {kind: value[0] if isinstance(value, list) and value else value for kind, value in found.items()}
    return {kind: value for kind, value in first.items() if isinstance(value, int)}


def _around(post_processor: Mapping[str, Any] | None, file: Path) -> tuple[int | None, int | None]:
    """The tokens that are put before and after a single text, where there are some.

    Raises:
        UsageError: there are more than one before and one after.
    """
    steps = [post_processor] if post_processor else []
    steps = [inner for step in steps for inner in step.get("processors", [step]) if inner["type"] != "ByteLevel"]
    if not steps:
        return None, None
    put = _put(steps[0])
    if len(steps) > 1 or put is None or max(map(len, put)) > 1:
        raise UsageError(
            f"{file}: its post_processor {steps[0]['type']} does more than to put one token before a text and one "
            "after it, and GGUF has no place for that; export hf"
        )
    return next(iter(put[0]), None), next(iter(put[1]), None)


def _put(step: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """All tokens that a step puts before and after a single text; None where it does something else."""
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return [step["cls"][1]], [step["sep"][1]]
    if step["type"] != "TemplateProcessing" or sum("Sequence" in piece for piece in step["single"]) != 1:
        return None
    sides: tuple[list[int], list[int]] = [], []
    side = 0
    for piece in step["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides


def _chat(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
