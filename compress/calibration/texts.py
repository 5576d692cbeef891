"""Texts from files and data sets: which there are, in which field, and what is no text.

A file is UTF-8. A .txt file is one text, given in pieces; every row of the others is one. Whatever cannot be read is
refused with the place where it stands and what to do.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.demo import data as demo
from compress.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

Split = Literal["calibration", "evaluation"]
Render = Callable[[Any], str]  # messages of a chat -> its text
Ticking = Callable[[Iterable[Any], int | None, str], Iterator[Any]]
Rows = Iterator[tuple[str, Any]]  # where a row stands, and what it holds

IMAGE_SUFFIX = ".safetensors"
SELF = "self"  # the model writes the text itself
LOCAL = (".txt", ".jsonl", ".json", ".parquet", IMAGE_SUFFIX)
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
PIECE = 1 << 16  # bytes, of a long text
ROWS_AT_ONCE = 256  # of a table
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MOST_KEYS = 8  # that a message lists


@dataclass(frozen=True)
class Texts:
    """The texts of one source.

    Attributes:
        rows: every text, as the pieces that it is read in.
        count: how many texts there are, where that is known before they are read.
    """

    rows: Iterable[Iterable[str]]
    count: int | None = None


def is_images(source: str) -> bool:
    """Whether a source is a file of images."""
    return suffix_of(source) == IMAGE_SUFFIX


def suffix_of(source: str) -> str:
    """The end of a file's name, in small letters."""
    return Path(source).suffix.lower()


def check_source(source: str) -> str | None:
    """What is wrong with a `source`, before any of it is read; None if nothing can be seen."""
    if source in ("demo", SELF):
        return None
    path, suffix = Path(source), suffix_of(source)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        return f"cannot be looked up: {error}"
    if suffix in (*LOCAL, *PACKED) or there:
        return _check_file(path, suffix)
    if source.count("/") > 1 or source.startswith("."):
        return f"no such file: {source}"
    try:
        import datasets  # noqa: F401
    except ImportError:
        return (
            f"{source!r} is neither 'demo' nor a local {', '.join(LOCAL)} file; the id of a Hugging Face data set "
            "needs the extra: pip install 'compress-pipeline[datasets]'"
        )
    return None


def _check_file(path: Path, suffix: str) -> str | None:
    if not path.is_file():
        return f"no such file: {path}"
    if suffix in PACKED:
        return f"{path} is an archive; unpack it, and give the {', '.join(LOCAL)} file that is inside"
    if suffix not in LOCAL:
        return f"{path} is not one of {', '.join(LOCAL)}; save a plain text with the ending .txt"
    if path.stat().st_size == 0:
        return f"{path} is empty"
    return None


def read_texts(source: str, split: Split, field: str, subset: str | None, render: Render) -> Texts:
    """The texts of a source, read as they are asked for.

    Args:
        source: `demo`, a file, or the id of a data set.
        split: which half of `demo`, or of a data set.
        field: the field or column that holds the text, or the messages of a chat; `a.b` is the field b inside of a.
        subset: the configuration name of a data set id.
        render: makes the text of a chat.

    Raises:
        DataError: not there, or, while it is read, not a text.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    if is_images(source):
        raise DataError(f"{source} holds images; tokens come from a text")
    if source == SELF:
        raise DataError("`self` is text that a model writes for calibration; there is none to be read")
    if source == "demo":
        found = demo.texts(split)
        return Texts(((text,) for text in found), len(found))
    path, suffix = Path(source), suffix_of(source)
    if suffix == ".txt":
        return Texts([_pieces(path)], 1)
    if suffix == ".parquet":
        table = Table.of(path, field)
        if not {field, field.split(".")[0]} & {*table.columns}:
            raise DataError(f"{path}: {_no_field(field, table.columns)}")
        rows: Rows = table.rows([field if field in table.columns else field.split(".")[0]])
        count: int | None = table.count
    elif suffix in (".json", ".jsonl"):
        rows, count = json_rows(path, field), None
    else:
        rows, count = _hub(source, split, subset)
    return Texts(((_text_in(row, field, place, render),) for place, row in rows), count)


def texts_given(texts: Iterable[Any]) -> Texts:
    """Texts from Python, one after the other.

    Raises:
        DataError: something among them is no text, or there is none.
    """
    listed = list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise DataError(f"text {number} of the list is of type {type(text).__name__}; give texts alone")
    if not any(listed):
        raise DataError("the list of texts holds no text")
    return Texts(((text,) for text in listed), len(listed))


def _pieces(path: Path) -> Iterator[str]:
    """A plain text, with every end of a line as a line feed."""
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    decoder, read, piece = codecs.getincrementaldecoder("utf-8-sig")("strict"), 0, b"-"
    with path.open("rb") as file:
        _refuse_utf16(path, file)
        while piece:
            piece = file.read(PIECE)
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                held = len(error.object) - len(piece)  # the begin of a character, from the piece before
                raise _no_utf8(path, read - held + error.start, error) from error
            if "\0" in text:
                raise DataError(f"{path} is no text: byte {read + piece.find(0)} is 0")
            read += len(piece)
            yield lines.decode(text, final=not piece)


def _refuse_utf16(path: Path, file: BinaryIO) -> None:
    begin = file.read(2)
    file.seek(0)
    if begin in UTF16:
        raise DataError(f"{path} is UTF-16, and a text is read as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > FILE")


def _no_utf8(path: Path, place: int, error: UnicodeDecodeError) -> DataError:
    wrong = error.object[error.start] if error.start < len(error.object) else 0
    return DataError(
        f"{path} is not UTF-8 at byte {place} (0x{wrong:02x}): save it as UTF-8, for example with "
        f"iconv -f LATIN1 -t UTF-8 {path} > FILE, if it is a text at all"
    )


def json_rows(path: Path, field: str) -> Rows:
    """An object on each line, or one array of objects. `field`: that is looked for, for messages."""
    with path.open("rb") as file:
        _refuse_utf16(path, file)
        place = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(place)
        begin = file.read(64).lstrip()[:1]
        file.seek(place)
        if begin == b"[":
            rows = _parsed(file.read(), path, f"{path}:1", place, field)
            yield from ((f"{path}:1: row {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, path, f"{path}:{number}", place, field)
            place += len(line)


def _parsed(data: bytes, path: Path, where: str, start: int, field: str) -> Any:
    """JSON that begins at byte `start` of a file."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _no_utf8(path, start + error.start, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}); a file holds an object with the field {field!r} on each line, or an array"
        ) from error


@dataclass(frozen=True)
class Table:
    """A parquet file.

    Attributes:
        columns: the names of all.
        count: how many rows it has.
    """

    path: Path
    file: Any
    columns: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, path: Path, field: str) -> Table:
        """Reads what the file says of itself. `field`: that is looked for, for messages."""
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{path}: reading parquet needs: pip install 'compress-pipeline[parquet]'") from error
        try:
            file = pyarrow.parquet.ParquetFile(path)
            return cls(path, file, tuple(file.schema_arrow.names), file.metadata.num_rows)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} is no parquet file that could be read for {field!r} ({error})") from error

    def rows(self, columns: Sequence[str], at_once: int = ROWS_AT_ONCE) -> Rows:
        """Every row, with some columns; so many are in memory at once."""
        import pyarrow

        number = 0
        try:
            for batch in self.file.iter_batches(at_once, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{self.path}: row {number}", row
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            said = f"column {columns[0]!r}" if len(columns) == 1 else f"columns {', '.join(columns)}"
            raise DataError(f"{self.path}: {said} cannot be read after row {number} ({error})") from error


def _hub(source: str, split: Split, subset: str | None) -> tuple[Rows, int]:
    import datasets

    half = "train" if split == "calibration" else "test"
    try:
        found = datasets.load_dataset(source, subset, split=half)
        return ((f"{source}: row {number}", row) for number, row in enumerate(found, 1)), len(found)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise DataError(
            f"data set {source!r}, its split {half} for {split}, could not be loaded: {error}; `subset` chooses one of "
            "its configurations"
        ) from error


def _text_in(row: Any, field: str, place: str, render: Render) -> str:
    """The text of a row, or of the chat in it.

    Raises:
        DataError: no such field, or no text in it.
    """
    value = value_in(row, field, place)
    if is_chat(value):
        try:
            value = render(value)
        except DataError as error:
            raise DataError(f"{place}: {field!r} holds a chat; {error}") from error
    return checked_text(value, field, place)


def checked_text(value: Any, field: str, place: str) -> str:
    """A value that is a text.

    Raises:
        DataError: it is none, or holds what is no character.
    """
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is {called(value)}, not a text; {_advice(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {field!r} holds half a character (a lone surrogate) at {error.start}") from error
    return value


def value_in(row: Any, field: str, place: str) -> Any:
    """What a row holds in a field; `a.b` is the field b inside of a.

    Raises:
        DataError: no such field.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {called(row)}, not an object with a {field!r} field")
    value: Any = row
    for part in (field,) if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(f"{place}: {_no_field(field, row)}")
        value = value[part]
    return value


def is_chat(value: Any) -> bool:
    """Whether a value is what a chat template is for: a list of {role, content}."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _no_field(field: str, keys: Iterable[Any]) -> str:
    names = [str(key) for key in keys]
    more = ", ..." if len(names) > MOST_KEYS else ""
    there = f"it has {', '.join(names[:MOST_KEYS])}{more}" if names else "it has none"
    return f"no field {field!r}; {there}. `field:` (of eval --field) names the one with the text, `a.b` one inside of a"


def called(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    kinds = {str: "a text", bytes: "binary data", list: "a list", dict: "an object", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _advice(value: Any) -> str:
    if value is None:
        return "leave such rows out"
    if isinstance(value, Mapping):
        return f"`field:` may name one inside of it: {', '.join(map(str, list(value)[:MOST_KEYS]))}"
    if isinstance(value, list):
        return "a chat is a list of {role: ..., content: ...}"
    return "store it as a text"
