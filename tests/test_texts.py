"""Texts as users have them, the tokens that they are, and the windows that are cut from them."""

import codecs
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compress
from compress import DataError
from compress.calibration import texts, tokens

TEXT = "Über Wälder – naïve café, 語 and a few words more. " * 40
CHAT = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(compress.demo.MODEL_DIR)


@pytest.fixture(scope="module")
def talker() -> Any:
    """The same with a chat template."""
    made = AutoTokenizer.from_pretrained(compress.demo.MODEL_DIR)
    made.chat_template = TEMPLATE
    return made


def lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def loaded(file: Path, tokenizer: Any, **options: Any) -> list[int]:
    """The first window."""
    return list(compress.load_tokens(str(file), tokenizer, samples=1, length=60, **options)[0].tolist())


FILES: dict[str, tuple[str, bytes, str]] = {
    "a text": ("c.txt", TEXT.encode(), "text"),
    "a mark at the begin": ("c.txt", codecs.BOM_UTF8 + TEXT.encode(), "text"),
    "lines": ("c.jsonl", lines({"text": TEXT}), "text"),
    "lines of another system": ("c.jsonl", codecs.BOM_UTF8 + lines({"text": TEXT}, end="\r\n"), "text"),
    "capital letters": ("c.JSONL", lines({"text": TEXT}), "text"),
    "an array": ("c.json", json.dumps([{"text": TEXT}], indent=1).encode(), "text"),
    "an array in lines": ("c.jsonl", json.dumps([{"text": TEXT}], indent=1).encode(), "text"),
    "lines in .json": ("c.json", lines({"text": TEXT}), "text"),
    "another field": ("c.jsonl", lines({"body": TEXT}), "body"),
    "a field inside of another": ("c.jsonl", lines({"data": {"body": TEXT}}), "data.body"),
    "a name with a dot": ("c.jsonl", lines({"data.body": TEXT, "data": {}}), "data.body"),
}


@pytest.mark.parametrize(("name", "data", "field"), FILES.values(), ids=FILES.keys())
def test_the_same_text_in_any_file_is_the_same_tokens(
    name: str, data: bytes, field: str, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert loaded(tmp_path / name, tokenizer, field=field) == tokenizer(TEXT)["input_ids"][:60]


def test_ends_of_lines_are_one_whatever_the_system_and_wherever_a_piece_ends(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, text = tmp_path / "c.txt", "eins\r\n\r\nzwei ü\rdrei\n\n語\r"
    file.write_bytes(text.encode())
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(texts, "PIECE", size)
        assert "".join(texts._pieces(file)) == file.read_text(encoding="utf-8")


WRONG: dict[str, tuple[str, bytes, list[str]]] = {
    "UTF-16": ("c.txt", TEXT.encode("utf-16"), ["UTF-16", "iconv"]),
    "UTF-16 in lines": ("c.jsonl", lines({"text": TEXT}).decode().encode("utf-16"), ["UTF-16"]),
    "UTF-16 without a mark": ("c.txt", b"a\0b\0", ["byte 1 is 0"]),
    "latin-1": ("c.txt", "a café".encode("latin-1"), ["not UTF-8 at byte 5", "0xe9", "iconv"]),
    "latin-1 in lines": ("c.jsonl", lines({"text": "a"}) + b'{"text": "\xe9"}', ["not UTF-8 at byte 24"]),
    "half a character at the end": ("c.txt", "aü".encode()[:-1], ["not UTF-8 at byte 1"]),
    "random bytes": ("c.txt", bytes(range(128, 256)), ["not UTF-8 at byte 0"]),
    "an archive": ("c.jsonl.gz", b"\x1f\x8b", ["archive", "unpack"]),
    "another field": ("c.jsonl", lines({"prompt": TEXT, "n": 1}), ["c.jsonl:1", "'text'", "prompt, n", "field:"]),
    "an object as text": ("c.jsonl", lines({"text": {"de": "a"}}), ["an object", "de"]),
    "a chat without a template": ("c.jsonl", lines({"text": CHAT}), ["c.jsonl:1", "a chat", "no chat template"]),
    "another kind of chat": ("c.jsonl", lines({"text": [{"from": "a", "value": "b"}]}), ["a list", "role"]),
    "null": ("c.jsonl", lines({"text": TEXT}, {"text": None}), ["c.jsonl:2", "null", "leave such rows out"]),
    "half a pair": ("c.jsonl", b'{"text": "\\ud800"}', ["half a character"]),
    "endless nesting": ("c.json", b"[" * 100_000, ["not JSON"]),
    "an array of texts": ("c.json", b'["a", "b"]', ["c.json:1: row 1", "a text"]),
    "one object in many lines": ("c.json", b'{\n"text": "a"\n}', ["c.json:1", "or an array"]),
}


@pytest.mark.parametrize(("name", "data", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_text_is_refused_with_its_place(
    name: str, data: bytes, words: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        loaded(tmp_path / name, tokenizer)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_byte_that_is_wrong_far_into_a_file_is_named_by_its_place(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(codecs.BOM_UTF8 + "ü".encode() * texts.PIECE + b"\xff")
    with pytest.raises(DataError, match=f"byte {3 + 2 * texts.PIECE} .0xff"):
        loaded(tmp_path / "c.txt", tokenizer)


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_chats_are_rendered_by_the_template_of_the_tokenizer(name: str, talker: Any, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        write_table(tmp_path / name, messages=[CHAT])
    else:
        (tmp_path / name).write_bytes(lines({"messages": CHAT}))
    text = f"<user>{TEXT}\n<assistant>Yes.\n"
    assert loaded(tmp_path / name, talker, field="messages") == talker(text)["input_ids"][:60]


def test_messages_that_the_template_refuses_are_named(talker: Any, tmp_path: Path) -> None:
    talker = AutoTokenizer.from_pretrained(compress.demo.MODEL_DIR)
    talker.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "c.jsonl").write_bytes(lines({"messages": CHAT}))
    with pytest.raises(DataError, match=r"c\.jsonl:1: 'messages' holds a chat.*roles must alternate"):
        loaded(tmp_path / "c.jsonl", talker, field="messages")


def write_table(path: Path, **columns: list[Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def test_tables_are_read_row_by_row_also_inside_of_columns(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "ROWS_AT_ONCE", 1)
    file = write_table(tmp_path / "c.parquet", data=[{"text": TEXT}] * 3, empty=[None, None, TEXT], raw=[b"a"] * 3)
    assert loaded(file, tokenizer, field="data.text") == tokenizer(TEXT)["input_ids"][:60]
    for field, words in (
        ("text", "no field 'text'; it has data, empty, raw"),
        ("data.body", "row 1: no field 'data.body'"),
        ("empty", "row 1: 'empty' is null"),
        ("raw", "row 1: 'raw' is binary data"),
        ("data", "row 1: 'data' is an object.*text"),
    ):
        with pytest.raises(DataError, match=words):
            loaded(file, tokenizer, field=field)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer must be one of transformers"),
        ({"tokenizer": None}, "tokenizer must be one of transformers"),
        ({"length": 0}, "length must be a whole number"),
        ({"samples": -1}, "samples must be"),
        ({"samples": 2.5}, "samples must be"),
        ({"protocol": "c4"}, "protocol must be one of spread, wikitext"),
    ],
)
def test_loading_with_impossible_arguments_is_refused(
    changes: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "c.txt").write_text(TEXT, encoding="utf-8")
    options = {"tokenizer": tokenizer, "samples": 1, "length": 60} | changes
    with pytest.raises(DataError, match=words):
        compress.load_tokens(str(tmp_path / "c.txt"), **options)


# --- long texts -------------------------------------------------------------------------------------------------------


def trained(model: Any, trainer: Any, pre: Any = None, normal: Any = None, decoder: Any = None) -> Any:
    made = Tokenizer(model)
    if pre is not None:
        made.pre_tokenizer = pre
    if normal is not None:
        made.normalizer = normal
    if decoder is not None:
        made.decoder = decoder
    made.train_from_iterator([LONG], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def long_text() -> str:
    draw = torch.Generator().manual_seed(5)
    words = [
        "return",
        "the",
        "path",
        "naïve",
        "café",
        "語",
        "🙂",
        "  ",
        "\n\n",
        "a",
        "list",
        "of",
        "Straße",
        "x" * 9,
        "12",
    ]
    chosen = torch.randint(len(words), (9000,), generator=draw).tolist()
    return " ".join(words[i] for i in chosen)


LONG = long_text()


def kinds() -> dict[str, Callable[[], Any]]:
    from tokenizers import trainers

    options = {"vocab_size": 400, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    unigram = {**options, "unk_token": "<unk>"}
    return {
        "bytes": lambda: trained(
            models.BPE(), trainers.BpeTrainer(**options), pre_tokenizers.ByteLevel(add_prefix_space=False)
        ),
        "no words": lambda: trained(
            models.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(**options),
            normal=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
        "unigram": lambda: trained(models.Unigram(), trainers.UnigramTrainer(**unigram), pre_tokenizers.Metaspace()),
        "word pieces": lambda: trained(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**options),
            pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(), decoders.WordPiece(),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "no words", "unigram", "word pieces"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = kinds()[kind]()
    whole = tokenizer(LONG, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(tokens, "OVERLAP", 300)
    for size in (1000, 1777):
        monkeypatch.setattr(tokens, "PIECE", size)
        pieces = [LONG[i : i + size - 9] for i in range(0, len(LONG), size - 9)]
        found = list(tokens.tokens_of(tokenizer, pieces))
        assert [i for some in found for i in some] == whole
        assert len(found) > 10, "handed out while it was read"
        assert max(map(len, found)) < len(whole) / 8


def test_a_text_that_cannot_be_cut_is_tokenized_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "OVERLAP", 100)
    monkeypatch.setattr(tokens, "PIECE", 400)
    monkeypatch.setattr(tokens, "AGREED", 1 << 20)
    text = TEXT * 3
    assert [i for some in tokens.tokens_of(tokenizer, [text[:999], text[999:]]) for i in some] == tokenizer(text)[
        "input_ids"
    ]


# --- protocols --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beginning() -> Any:
    """A tokenizer that puts a token at the begin of a text by itself, as Llama's does."""
    made = AutoTokenizer.from_pretrained(compress.demo.MODEL_DIR)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 7)]
    )  # fmt: skip
    return made


ROWS = ["= A title =", "", "The first part of it, some words.", "The second part, of other words than before."] * 9


def test_the_windows_of_wikitext_are_those_of_the_joined_text(beginning: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(*({"text": row} for row in ROWS)))
    whole = torch.tensor(beginning("\n\n".join(ROWS))["input_ids"])
    found = compress.load_tokens(str(tmp_path / "c.jsonl"), beginning, samples=0, length=32, protocol="wikitext")
    assert whole[0] == 7
    assert torch.equal(found, whole[: len(whole) // 32 * 32].view(-1, 32))


def written_out(model: nn.Module, whole: Tensor, length: int) -> float:
    """The usual computation: windows side by side, the mean of their losses, its exponent."""
    losses = []
    for number in range(len(whole) // length):
        window = whole[None, number * length : (number + 1) * length]
        with torch.no_grad():
            found = model(window).logits.float().log_softmax(-1)
        losses.append(-found[0, :-1].gather(1, window[0, 1:, None]).mean())
    return math.exp(torch.stack(losses).mean())


def test_the_perplexity_of_wikitext_is_the_usual_one(
    beginning: Any, tmp_path: Path, llama_maker: Callable[..., Any]
) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(*({"text": row} for row in ROWS)))
    model = llama_maker(vocab_size=len(beginning))
    found = compress.load_tokens(str(tmp_path / "c.jsonl"), beginning, samples=0, length=32, protocol="wikitext")
    wanted = written_out(model, torch.tensor(beginning("\n\n".join(ROWS))["input_ids"]), 32)
    assert compress.evaluate(model, found).perplexity == pytest.approx(wanted, rel=1e-5)


def test_spread_windows_are_those_of_texts_that_end_with_the_end_token(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines(*({"text": row} for row in ROWS)))
    bare = (tokenizer(row, add_special_tokens=False)["input_ids"] for row in ROWS)
    whole = torch.tensor([i for row in bare for i in [*row, tokenizer.eos_token_id]])
    found = compress.load_tokens(str(tmp_path / "c.jsonl"), tokenizer, samples=3, length=16)
    available = len(whole) // 16
    assert torch.equal(
        found, torch.stack([whole[n * 16 : n * 16 + 16] for n in (0, available // 3, 2 * available // 3)])
    )


def test_what_comes_from_the_tokenizer_itself_is_found(beginning: Any, tokenizer: Any) -> None:
    assert tokens.special_tokens(beginning) == ([7], [])
    assert tokens.special_tokens(tokenizer) == ([], [])


def test_tokens_are_counted_only_until_there_are_enough(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(lines({"text": TEXT}) + b"not JSON\n")
    assert tokens.count_tokens(str(tmp_path / "c.jsonl"), tokenizer, 100, "calibration", "text", "spread") >= 100
    with pytest.raises(DataError, match="not JSON"):
        tokens.count_tokens(str(tmp_path / "c.jsonl"), tokenizer, 1 << 20, "calibration", "text", "spread")
