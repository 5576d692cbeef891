"""A tokenizer in a GGUF file cuts text up as the source does, or is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_tokenizers as words
import pytest
from gguf_written import W4, asked, field, needs_llama_cpp, save, saved, small
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from written import write

from compress import ConfigError, Magnitude, Rtn
from compress.errors import UsageError
from compress.export.gguf.byte_level import SPLITS
from compress.export.gguf.vocabulary import read_vocabulary

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tokenizer_in_the_file_cuts_text_up_as_the_source_does(tmp_path: Path) -> None:
    save(small(), tmp_path / "model")
    write("llama", tmp_path, [W4], "gguf")
    text = "the other 12 weathers, theatre<tool>!<|end|> end"
    meant = words.bytes_of_words().encode(text).ids
    read = AutoTokenizer.from_pretrained(tmp_path / "out" / "gguf", gguf_file="model.gguf")
    assert read(text)["input_ids"] == meant
    types = field(tmp_path, "tokenizer.ggml.token_type")
    tokens = field(tmp_path, "tokenizer.ggml.tokens")
    assert len(tokens) == len(types) == 256
    assert (tokens[0], types[0], types[1]) == ("<|end|>", 3, 1)
    assert (tokens[100], types[100]) == ("<tool>", 4)
    assert (tokens[101], types[101]) == ("[PAD101]", 5)
    assert field(tmp_path, "tokenizer.ggml.pre") == "gpt-2"
    assert field(tmp_path, "tokenizer.ggml.eos_token_id") == 0
    assert not field(tmp_path, "tokenizer.ggml.add_bos_token")


def test_a_token_before_every_text_and_a_template_of_conversations_are_in_the_file(tmp_path: Path) -> None:
    save(small(), tmp_path / "model", words.around("<|end|> $A"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    write("llama", tmp_path, [W4], "gguf")
    assert field(tmp_path, "tokenizer.ggml.add_bos_token")
    assert not field(tmp_path, "tokenizer.ggml.add_eos_token")
    assert field(tmp_path, "tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize(("name", "whole"), [("llama-bpe", True), ("smaug-bpe", False), ("qwen2", False)])
def test_expressions_that_readers_know_by_name_are_named(name: str, whole: bool, tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    found = vocabulary(tmp_path, words.split(GGUF_PRE_TOKENIZER_SPLITS[name], whole), bos_token_id=0)
    assert found.cut.splits == name


def test_single_digits_before_bytes_are_those_of_smollm(tmp_path: Path) -> None:
    assert vocabulary(tmp_path, words.bytes_with(words.digits()), bos_token_id=0).cut.splits == "smollm"


UNWRITTEN: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another kind": (lambda: words.edited(type="Unigram"), "BPE and WordPiece can be written, and this is Unigram"),
    "characters": (lambda: words.edited(byte_fallback=True), "has no token <0x00>, and llama.cpp spells"),
    "changes": (lambda: words.edited(normalizer={"type": "Lowercase"}), "no place for its normalizer"),
    "suffix": (lambda: words.edited(end_of_word_suffix="</w>"), "no place for its end_of_word_suffix"),
    "too many": (lambda: words.edited(vocab={"a": 0, "b": 300}, merges=[]),
                 "tokens up to 300, and the model embeds only 2"),
    "another first": (lambda: json.loads(words.around("<tool> $A").to_str()), "puts <tool> around every text"),
    "two before": (lambda: json.loads(words.around("<|end|> <tool> $A").to_str()),
                   "post_processor TemplateProcessing does more than to put one token before a text"),
    "two after": (lambda: json.loads(words.around("$A <tool> <|end|>").to_str()), "does more than to put one token"),
    "nonsense": (lambda: {}, "not a tokenizer that can be written: KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRITTEN)
def test_a_tokenizer_that_it_cannot_write_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    make, message = UNWRITTEN[name]
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(make()))
    with pytest.raises(ConfigError, match=f"export\\.gguf: .*{message}"):
        write("llama", tmp_path, [W4], "gguf")
    assert not (tmp_path / "out.work").exists()


def test_without_a_tokenizer_it_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json, and llama.cpp reads the tokenizer from the same"):
        write("llama", tmp_path, [W4], "gguf")


CHARACTERS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
BYTES = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
WORDS: dict[str, tuple[str, Callable[[], Tokenizer], dict[str, int]]] = {
    "characters": ("llama", words.characters, CHARACTERS),
    "no space": ("gemma", lambda: words.characters(False), CHARACTERS),
    "a token of its own": ("llama", lambda: words.added(words.characters()), CHARACTERS),
    "metaspace": ("llama", lambda: words.metaspace("never", split=False), CHARACTERS),
    "metaspace that has nothing to do": ("llama", lambda: words.metaspace("first", False, prepend=True), CHARACTERS),
    "spaces taken": ("phi3", words.of_phi_3, CHARACTERS),
    "pieces of words": ("bert", words.word_pieces, {}),
    "pieces of words and a token of its own": ("bert", lambda: words.added(words.word_pieces()), {}),
    "bytes, gpt-2": ("gpt2", lambda: words.bytes_with(GPT2), BYTES),
    "bytes, smollm": ("llama", lambda: words.bytes_with(words.digits()), BYTES),
    **{f"bytes, {name}": ("llama", partial(words.split, *cut), BYTES) for cut, name in SPLITS.items()},
}


def vocabulary(folder: Path, tokenizer: Tokenizer, **config: Any) -> Any:
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_vocabulary(folder, SimpleNamespace(**{"vocab_size": 320, "type_vocab_size": 2, **config}))


def test_characters_are_merged_by_scores_that_fall_with_the_order_of_merges(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, words.characters(), bos_token_id=1, eos_token_id=2)
    texts, types, scores = found.tokens.texts, found.tokens.types, found.cut.scores
    assert (found.cut.model, found.cut.splits, found.cut.space) == ("llama", "default", True)
    assert scores[texts.index("th")] > scores[texts.index("the")] > scores[texts.index("▁the")] > scores[0]
    assert types[:4] == [2, 3, 3, 6]
    assert found.begins
    assert not found.ends
    assert not vocabulary(tmp_path, words.characters(False), bos_token_id=1).cut.space


def test_transformers_reads_a_tokenizer_of_characters_back(tmp_path: Path) -> None:
    saved("llama", tmp_path, words.characters(), vocab_size=320, bos_token_id=1, eos_token_id=2)
    write("llama", tmp_path, [Rtn(bits=4, group_size=32, symmetric=True)], "gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "out" / "gguf", gguf_file="model.gguf")
    for text in words.TEXTS[:1]:
        assert read(text)["input_ids"] == words.characters().encode(text).ids


def test_pieces_that_begin_a_word_are_marked_and_the_others_are_not(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, words.word_pieces())
    assert found.tokens.texts[:10] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁the", "▁we", "the", "ther", "r"]
    assert (found.cut.model, found.cut.kinds_of_text) == ("bert", 2)
    assert found.special == {"bos": 2, "cls": 2, "eos": 3, "sep": 3, "unk": 1, "mask": 4}
    assert found.begins
    assert found.ends


def other_merges() -> Tokenizer:
    """A token that can be parted in a way that is no merge."""
    data = json.loads(words.characters().to_str())
    data["model"]["merges"] = [m for m in data["model"]["merges"] if list(m) != ["t", "he"]]
    data["model"]["merges"] += [["h", "e"]]
    data["model"]["vocab"]["he"] = 310
    made: Tokenizer = Tokenizer.from_str(json.dumps(data))
    return made


def changed(made: Tokenizer, **changes: Any) -> Tokenizer:
    found: Tokenizer = Tokenizer.from_str(json.dumps(words.edited(made, **changes)))
    return found


def lowered(made: Tokenizer) -> Tokenizer:
    return changed(made, normalizer={"type": "Lowercase"})


def unmade() -> Tokenizer:
    """A token of two others that has no merge."""
    merges = json.loads(words.characters().to_str())["model"]["merges"]
    return changed(words.characters(), merges=[m for m in merges if list(m) != ["a", "t"]])


BLOOM, TEKKEN = (next(cut[0] for cut, known in SPLITS.items() if known == name) for name in ("bloom", "tekken"))
WRONG: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "merges that are not all": (other_merges, "does not merge 't' and 'he' though 'the' is a token"),
    "a token that no merge makes": (unmade, "does not merge 'a' and 't' though 'at' is a token"),
    "cut at spaces": (lambda: words.metaspace("never", split=True), "would make the token '▁▁'"),
    "a normalizer before": (lambda: lowered(words.metaspace("never", split=False)), "no place for its normalizer L"),
    "spaces left": (lambda: changed(words.characters(), normalizer=None), "leaves spaces as they are"),
    "another expression": (lambda: words.split(r"\w+"), "a way that llama.cpp has no name for .* known are .*gpt-2"),
    "words that are tokens": (lambda: words.split(BLOOM, True), "no name for that we know, with ignore_merges"),
    "gpt-2's words that are tokens": (lambda: words.bytes_with(GPT2, True), "for that we know, with ignore_merges"),
    "words of fewer merges": (lambda: words.split(TEKKEN, False), "no name for that we know;"),
    **{option: (lambda option=option: words.added(words.characters(), **{option: True}), f"'<tool>' has {option}: true")
       for option in ("lstrip", "rstrip", "single_word", "normalized")},
    "capitals": (lambda: words.word_pieces(lowercase=False), "keeps capital letters"),
    "no ends": (lambda: changed(words.word_pieces(), post_processor=None), r"does not put \[CLS\] before and \[SEP\]"),
    "other cuts": (lambda: changed(words.word_pieces(), pre_tokenizer={"type": "Whitespace"}), "than BertPreTokenizer"),
    "no signs of their own": (lambda: changed(words.word_pieces(), normalizer={
        "type": "BertNormalizer", "lowercase": True, "handle_chinese_chars": False, "clean_text": True,
        "strip_accents": None}), "has handle_chinese_chars: false"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "said"), [("always", True), ("first", True), ("never", False)])
def test_which_texts_get_another_space_there_is_said(
    scheme: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = vocabulary(tmp_path, words.metaspace(scheme, split=False), bos_token_id=1)
    assert found.cut.space is said
    assert (f"by the prepend_scheme {scheme} of Metaspace; llama.cpp" in caplog.text) is said


@pytest.mark.parametrize("name", WRONG)
def test_a_tokenizer_that_would_cut_otherwise_there_is_refused(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    with pytest.raises(UsageError, match=message):
        vocabulary(tmp_path, make(), bos_token_id=1)


@pytest.mark.real
@needs_llama_cpp
@pytest.mark.parametrize("name", WORDS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    variant, make, changes = WORDS[name]
    saved(variant, tmp_path, make(), **changes)
    write("llama", tmp_path, [Magnitude(sparsity=0.05)], "gguf")
    assert asked(tmp_path, [], words.TEXTS, False, 1)["cut"] == [make().encode(text).ids for text in words.TEXTS]
