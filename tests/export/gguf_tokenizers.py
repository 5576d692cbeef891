"""Small tokenizers of every kind that is written as GGUF, and texts that they cut."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = [*map(chr, range(97, 123)), *"ABC012,.!é"]
TEXTS = ["the other weather", "  two  spaces, there.", "The 12 cafés at 10!", "a\nb 🦙 the", "<s>then the</s> end"]


def characters(space: bool = True) -> Tokenizer:
    """BPE of characters with bytes for what is unknown, as SentencePiece makes it; a space before every text or not."""
    special = ["<unk>", "<s>", "</s>"]
    wholes = ["th", "the", "er", "▁the", "▁▁", "at", "her", "▁t", "▁th"]  # the first is the first to be merged
    words = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, *wholes]
    known = set(words)
    merges = [
        (whole[:i], whole[i:])
        for whole in wholes
        for i in range(1, len(whole))
        if whole[:i] in known and whole[i:] in known
    ]
    numbers = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space else spaces
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def word_pieces(lowercase: bool = True) -> Tokenizer:
    """WordPiece as BERT has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [
        *special,
        "the",
        "we",
        "##the",
        "##ther",
        "##r",
        "other",
        "cafe",
        "##s",
        "at",
        "end",
        "!",
        ",",
        ".",
        "1",
        "##2",
    ]
    words += [letter for letter in "abcdefghijklmnopqrstuvwxyz0" if letter not in words]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.add_special_tokens(special)
    return made


def bytes_of_words() -> Tokenizer:
    """Printable ASCII, a few merges, and one special token."""
    letters = [*map(chr, range(33, 127)), "Ġ"]  # a space
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    words = ["<|end|>", *letters, *("".join(m) for m in merges)]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<tool>"])
    return made


def around(before: str) -> Tokenizer:
    """Puts a token before every text."""
    found = bytes_of_words()
    found.post_processor = processors.TemplateProcessing(
        single=f"{before} $A", special_tokens=[(before, found.token_to_id(before))]
    )
    return found


def split(pattern: str) -> Tokenizer:
    found, regex = bytes_of_words(), Regex(pattern)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(regex, "isolated"), bytes_only])
    return found


def edited(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(bytes_of_words().to_str())
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["model"][key] = value
    return data
