"""Small tokenizers of every kind that is written as GGUF, changes to them, and texts that they cut."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

LETTERS = [*map(chr, range(97, 123)), *"ABC012,.!é"]
TEXTS = [
    "the other weather", "  two  spaces, there.", "The 12 cafés at 10!", "a\nb 🦙 the", "<s>then the</s> end", " the",
    "<s> then the </s>  end", "It's THE theThe's 1234567 caf!!\n\n  x\t\ty", "ab; x+y = (z)/w //\n q  ",
    "a <tool> b<tool>",
]  # fmt: skip


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


def bytes_with(steps: Any, whole: bool = False) -> Tokenizer:
    """Every byte, cut up by some steps. `whole`: the one token that no merges make is taken (ignore_merges)."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
    words = ["<s>", "</s>", *bytes_to_unicode().values(), *("".join(m) for m in merges), "Ġcaf"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, ignore_merges=whole))
    made.pre_tokenizer = steps
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<tool>"])
    return made


def split(pattern: str, whole: bool = False) -> Tokenizer:
    """Cut up by an expression."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])
    return bytes_with(steps, whole)


def digits() -> Any:
    """The steps of SmolLM."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(steps)


def around(single: str) -> Tokenizer:
    """Puts tokens around every text."""
    found = bytes_of_words()
    names = [name for name in single.split() if not name.startswith("$")]
    special = [(name, found.token_to_id(name)) for name in names]
    found.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return found


def metaspace(scheme: str, split: bool, prepend: bool = False) -> Tokenizer:
    """Characters, with spaces written by Metaspace; or before it by a normalizer that puts one before every text."""
    found = characters(prepend)
    if not prepend:
        found.normalizer = None
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return found


def added(made: Tokenizer, **options: bool) -> Tokenizer:
    """With a token of its own."""
    made.add_tokens([AddedToken("<tool>", **{"normalized": False, **options})])
    return made


def of_phi_3() -> Tokenizer:
    """Some special tokens take the spaces after them, as those of Phi 3 do."""
    data = json.loads(characters().to_str())
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    made: Tokenizer = Tokenizer.from_str(json.dumps(data))
    plain, taking = AddedToken("<|endoftext|>", normalized=False), AddedToken("<tool>", rstrip=True, normalized=False)
    made.add_special_tokens([plain, taking])
    return made


def edited(made: Tokenizer | None = None, **changes: Any) -> dict[str, Any]:
    """tokenizer.json with other entries of its own or of its model."""
    data: dict[str, Any] = json.loads((made or bytes_of_words()).to_str())
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["model"][key] = value
    return data
