"""Tokens of texts, in one stream, and the windows that are cut from it.

A long text is tokenized in pieces that overlap: where the tokens of both agree for a while, the later piece goes on. So
the tokens are those of the whole text, and memory is a few bytes for each of them.

What a perplexity means depends on how the windows are made, the protocol; `PROTOCOLS` says it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

from compress.calibration.texts import read_texts, texts_given
from compress.errors import DataError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from compress.calibration.texts import Split, Texts, Ticking

Protocol = Literal["spread", "wikitext"]
PROTOCOLS: dict[str, str] = {
    "spread": "every text ends with the tokenizer's end token, no start token; windows spread evenly, none overlap",
    "wikitext": "texts joined by blank lines, the tokenizer's own start and end tokens; windows side by side from the "
    "first token on",
}
WIKITEXT_LENGTH = 2048  # tokens of a window, unless another length is given
BETWEEN = "\n\n"  # texts of `wikitext`

PIECE = 1 << 16  # characters that are tokenized at once; shorter texts are never cut
OVERLAP = 1 << 12  # characters that two pieces share
AGREED = 16  # tokens one after the other that must be the same in both


def load_tokens(
    source: str | Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    split: Split = "calibration",
    field: str = "text",
    subset: str | None = None,
    protocol: Protocol = "spread",
    over: Ticking | None = None,
) -> Tensor:
    """Windows of token ids, evenly spread over the source.

    Args:
        source: `demo`, a .txt, .jsonl, .json or .parquet file in UTF-8, or the id of a Hugging Face data set; or a list
            of texts.
        tokenizer: of the model that will see the tokens.
        samples: number of windows; 0 for all that there are.
        length: tokens per window.
        split: for `demo`, which half of the standard library's documentation; for a data set id, its `train` split
            calibrates and its `test` split evaluates.
        field: the field or column that holds the text, or the messages of a chat, which the tokenizer's chat template
            makes a text of; `a.b` is the field b inside of a.
        subset: the configuration name of a data set id.
        protocol: `spread`: every text ends with the tokenizer's end token. `wikitext`: texts are joined by blank lines,
            and the whole begins and ends as the tokenizer does it, as published perplexities have it.
        over: draws progress over the texts: (texts, how many or None, label).

    Returns:
        (samples, length) int64.

    Raises:
        DataError: nothing there, no such field, not a text, or fewer tokens than asked for.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise DataError(f"tokenizer must be one of transformers, of the model; got {type(tokenizer).__name__}")
    for name, value, least in (("samples", samples, 0), ("length", length, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"{name} must be a whole number, at least {least}; got {value!r}")
    if protocol not in get_args(Protocol):
        raise DataError(f"protocol must be one of {', '.join(get_args(Protocol))}; got {protocol!r}")
    if isinstance(source, str):
        texts, name = read_texts(source, split, field, subset, lambda messages: rendered(tokenizer, messages)), source
    else:
        texts = texts_given(source)
        name = f"the list of {texts.count} texts"
    ids = array("i")
    for some in token_stream(tokenizer, texts, protocol, over, f"tokenize {split}: texts"):
        ids.extend(some)
    return windows(torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0), samples, length, name)


def count_tokens(source: str, tokenizer: Any, most: int, split: Split, field: str, protocol: Protocol) -> int:
    """How many tokens a source has, at least; it is read only until there are `most`.

    Raises:
        DataError: as `load_tokens`, of what was read.
    """
    texts, found = read_texts(source, split, field, None, lambda messages: rendered(tokenizer, messages)), 0
    for some in token_stream(tokenizer, texts, protocol):
        found += len(some)
        if found >= most:
            break
    return found


def windows(stream: Tensor, samples: int, length: int, source: str) -> Tensor:
    """(samples, length) windows of a (T,) stream of tokens, evenly spread, none overlapping; all for 0 samples.

    Raises:
        DataError: the stream is too short.
    """
    available = len(stream) // length
    if available < max(1, samples):
        raise DataError(too_few(source, len(stream), samples, length))
    wanted = samples or available
    chosen = [i * available // wanted for i in range(wanted)]
    return stream[: available * length].view(available, length)[chosen].long()


def too_few(source: str, tokens: int, samples: int, length: int) -> str:
    """What is said of a source that has not enough tokens."""
    asked = f"{samples} were asked for" if samples else "one at least is needed"
    return (
        f"{source} holds {tokens} tokens, {tokens // length} windows of {length}; {asked}: lower samples or length, or "
        "give more text"
    )


def rendered(tokenizer: Any, messages: Any) -> str:
    """A chat as a text, by the tokenizer's chat template.

    Raises:
        DataError: it has none, or one that refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template to make a text of it; name a field that holds a text")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like, and the library raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the tokenizer's chat template cannot make a text of it: {reason}") from error


def token_stream(
    tokenizer: Any, texts: Texts, protocol: Protocol, over: Ticking | None = None, label: str = ""
) -> Iterator[list[int]]:
    """Token ids of all texts, a list at a time.

    Args:
        tokenizer: of the model that will see them.
        texts: of the source.
        protocol: how texts are put together.
        over: draws progress over the texts, with `label`.
    """
    rows = texts.rows if over is None else over(texts.rows, texts.count, label)
    if protocol == "wikitext":
        begin, end = special_tokens(tokenizer)
        yield begin
        yield from tokens_of(tokenizer, chain.from_iterable(_joined(rows)))
        yield end
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        yield from tokens_of(tokenizer, row)
        yield end


def _joined(rows: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
    for number, row in enumerate(rows):
        if number:
            yield (BETWEEN,)
        yield row


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text by itself."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def tokens_of(tokenizer: Any, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of one text that comes in pieces: those that the whole text has.

    A tokenizer that does not say where its tokens lie is given the whole text.
    """
    held = _Tokenized(tokenizer, "")
    waiting, size = "", PIECE
    for piece in pieces:
        waiting += piece
        if len(waiting) >= size and _tells_places(tokenizer):
            held, done = held.followed_by(waiting)
            yield done
            # What could not be cut is tried again when it is twice as long.
            waiting, size = "", PIECE if done else max(PIECE, len(held.text))
    if waiting:
        held, done = held.followed_by(waiting)
        yield done
    yield held.rest()


def _tells_places(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "is_fast", False))


class _Tokenized:
    """The piece of a text that was tokenized last, and its tokens from the first that is not handed out yet."""

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer, self.text, self.start = tokenizer, text, 0
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        if text:
            placed = {"return_offsets_mapping": True} if _tells_places(tokenizer) else {}
            found = tokenizer(text, add_special_tokens=False, verbose=False, **placed)
            self.ids, self.spans = found["input_ids"], found["offset_mapping"] if placed else []

    def rest(self) -> list[int]:
        """The tokens that are not handed out."""
        return self.ids[self.start :]

    def followed_by(self, more: str) -> tuple[_Tokenized, list[int]]:
        """The piece that holds the text behind this one, and the tokens before those it goes on with."""
        if self.text and self.spans:
            shared = self.text[-OVERLAP:]
            after = _Tokenized(self.tokenizer, shared + more)
            place = self._agreement(after, len(self.text) - len(shared))
            if place is not None:
                done, after.start = self.ids[self.start : place[0]], place[1]
                return after, done
        whole = _Tokenized(self.tokenizer, self.text + more)
        whole.start = self.start
        return whole, []

    def _agreement(self, after: _Tokenized, shift: int) -> tuple[int, int] | None:
        """(number here, number there) of a token from which on both have the same; the middle of the overlap first.

        `shift`: where the other piece begins in this one.
        """
        ours = {}
        for number in range(len(self.ids) - AGREED, self.start, -1):
            begin = self.spans[number][0] - shift
            if begin < 0:
                break
            ours[begin] = number
        middle = OVERLAP // 2
        for begin in sorted(ours, key=lambda place: abs(place - middle)):
            here, there = ours[begin], after._at(begin)
            if there is not None and self._same(after, here, there, shift):
                return here, there
        return None

    def _at(self, begin: int) -> int | None:
        """The number of the first token that begins at a place."""
        number = bisect_left(self.spans, (begin, -1))
        return number if number < len(self.spans) and self.spans[number][0] == begin else None

    def _same(self, after: _Tokenized, here: int, there: int, shift: int) -> bool:
        if self.ids[here : here + AGREED] != after.ids[there : there + AGREED]:
            return False
        moved = [(a + shift, b + shift) for a, b in after.spans[there : there + AGREED]]
        return [tuple(span) for span in self.spans[here : here + AGREED]] == moved
