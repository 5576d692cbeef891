"""Rows of a file that name or hold images and sounds, and perhaps texts: which there are, and what is in each.

A row is an object with `image`, `images` or `audio`, the field with the text or the messages of a chat, and `label`.
Nothing of an image or a sound is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.media import media_in
from compress.calibration.texts import Table, check_source, checked_text, is_chat, json_rows, suffix_of, value_in
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.calibration.media import Medium
    from compress.calibration.texts import Rows

FILES = (".jsonl", ".json", ".parquet")
IMAGES, SOUNDS, LABELS, CHAT, TEXT = ("image", "images"), ("audio",), ("label", "labels"), "messages", "text"
PATHS = ("image", "audio", "path", "url")  # where the content of a message may name its file, in this order
AT_ONCE = 16  # rows of a table, which may hold the bytes of images
Media = dict[str, "list[Medium]"]  # of a row, by kind


@dataclass(frozen=True)
class Row:
    """What a row holds.

    Attributes:
        place: where it stands, for messages.
        images: in order; those inside of messages among them.
        sounds: likewise.
        text: None of a row without one.
        messages: of a chat, every content a list of {type: text, text}, {type: image} and {type: audio}, with a place
            for each of the images, or for none, and likewise for sounds; None of a row without a chat.
        label: as it stands there.
        keys: what the row has, for messages.
    """

    place: str
    images: tuple[Medium, ...]
    sounds: tuple[Medium, ...]
    text: str | None
    messages: list[dict[str, Any]] | None
    label: Any
    keys: tuple[str, ...] = ()


def may_hold_media(source: str) -> bool:
    """Whether a source is a file whose rows may name images or sounds."""
    return suffix_of(source) in FILES


def holds_media(source: str, field: str) -> bool:
    """Whether any row of a file names an image or a sound; it is read until one does.

    Raises:
        DataError: it cannot be read.
    """
    return may_hold_media(source) and _holds_media(source, field, _state(source))


@lru_cache(maxsize=64)
def _holds_media(source: str, field: str, state: tuple[int, ...]) -> bool:
    """The answer for a file in one state: planning and reading ask again and again."""
    return any(_media_of(row, field) for _, row in _rows(source, field))


def _state(source: str) -> tuple[int, ...]:
    """What tells a file from what it was before."""
    try:
        found = Path(source).stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def only_media(source: str, field: str) -> bool:
    """Whether the first row of a file names an image or a sound, and has no text."""
    first = next(_rows(source, field, whole=True), ("", None))[1]
    return (
        isinstance(first, Mapping)
        and _media_of(first, field)
        and all(first.get(key) is None for key in (field, field.split(".")[0]))
    )


def rows_in(source: str, samples: int, field: str) -> tuple[list[Row], int]:
    """Rows, evenly spread over a file.

    Args:
        source: a .jsonl, .json or .parquet file.
        samples: how many rows; 0 for all.
        field: the field with the text, or with the messages of a chat.

    Returns:
        The rows, and how many the file has.

    Raises:
        DataError: fewer rows than asked for, or one that is not what a row is.
    """
    count = sum(1 for _ in _rows(source, field))
    if count < max(1, samples):
        asked = f"{samples} were asked for" if samples else "one at least is needed"
        raise DataError(f"{source} holds {count} rows; {asked}: lower samples, or give more")
    wanted = samples or count
    chosen = {i * count // wanted for i in range(wanted)}
    folder = Path(source).parent
    rows = (row for number, row in enumerate(_rows(source, field, whole=True)) if number in chosen)
    return [_row(place, values, folder, field) for place, values in rows], count


def _rows(source: str, field: str, whole: bool = False) -> Rows:
    """Every row; of a table without its media, where these are columns, unless it is to be `whole`."""
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    if suffix_of(source) != ".parquet":
        yield from json_rows(Path(source), field)
        return
    table = Table.of(Path(source), field)
    known = [name for name in (*IMAGES, *SOUNDS, *LABELS, CHAT, field, field.split(".")[0]) if name in table.columns]
    media = [name for name in known if name in (*IMAGES, *SOUNDS)]
    known = list(dict.fromkeys(known))
    if not whole and media and any(v is not None for _, row in table.rows(media, 1) for v in row.values()):
        # Bytes that nobody asks for are not read; columns of nothing are as if they were not there.
        yield from ((f"{source}: row {i + 1}", dict.fromkeys(media, "")) for i in range(table.count))
    elif known:
        yield from table.rows(known, AT_ONCE)
    else:
        yield from ((f"{source}: row {i + 1}", dict.fromkeys(table.columns)) for i in range(table.count))


def _media_of(row: Any, field: str) -> bool:
    if not isinstance(row, Mapping):
        return False
    if any(row.get(key) is not None for key in (*IMAGES, *SOUNDS)):
        return True
    return any(
        isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "audio")
        for key in (CHAT, field)
        if is_chat(row.get(key))
        for message in row[key]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _row(place: str, values: Any, folder: Path, field: str) -> Row:
    if not isinstance(values, Mapping):
        value_in(values, field, place)  # says what it is
    images = tuple(m for key in IMAGES for m in media_in(values.get(key), folder, place, key))
    sounds = tuple(m for key in SOUNDS for m in media_in(values.get(key), folder, place, key))
    label = next((values[key] for key in LABELS if values.get(key) is not None), None)
    keys = tuple(map(str, values))
    said = _said(values, field, place)
    if not is_chat(said):
        text = None if said is None else checked_text(said, field, place)
        return Row(place, images, sounds, text, None, label, keys)
    waiting: Media = {"image": [*images], "audio": [*sounds]}
    found: Media = {"image": [], "audio": []}
    messages = [_message(each, waiting, found, folder, place) for each in said]
    left = {kind: media for kind, media in waiting.items() if media}
    if any(found[kind] for kind in left):
        kind = next(kind for kind in left if found[kind])
        raise DataError(
            f"{place} holds {len(found[kind]) + len(left[kind])} of {kind}, and its messages have places for "
            f"{len(found[kind])}: put {{type: {kind}}} where each belongs"
        )
    every = {kind: tuple(found[kind] + waiting[kind]) for kind in found}
    return Row(place, every["image"], every["audio"], None, messages, label, keys)


def _said(values: Mapping[str, Any], field: str, place: str) -> Any:
    """The text or the messages of a row; None where neither is there, and none was asked for."""
    if field != TEXT:
        return value_in(values, field, place)
    return next((values[key] for key in (TEXT, CHAT) if values.get(key) is not None), None)


def _message(message: Mapping[str, Any], waiting: Media, found: Media, folder: Path, place: str) -> dict[str, Any]:
    """A message whose content is a list; its media are added to `found`, from those `waiting` where it names none."""
    content = message.get("content")
    if not isinstance(content, list):
        text = "" if content is None else checked_text(content, "content", place)
        return {**message, "content": [{"type": "text", "text": text}]}
    return {**message, "content": [_part(part, waiting, found, folder, place) for part in content]}


def _part(part: Any, waiting: Media, found: Media, folder: Path, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    kind = "image" if kind == "image_url" else kind
    if kind == "text":
        return {"type": "text", "text": checked_text(part.get("text"), "text", place)}
    if kind not in found:
        raise DataError(f"{place}: a part of a message must be of type text, image or audio; got {part!r}"[:300])
    named = next((part[key] for key in PATHS if part.get(key) is not None), None)
    named = part["image_url"].get("url") if isinstance(part.get("image_url"), Mapping) else named
    media = media_in(named, folder, place, kind) or tuple(waiting[kind][:1])
    if len(media) != 1:
        raise DataError(f"{place}: a message has a place for one more {kind} than the row holds")
    del waiting[kind][: 1 if named is None else 0]
    found[kind] += media
    return {"type": kind}
