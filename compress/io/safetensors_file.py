"""Safetensors files: read and written here and nowhere else, one tensor at a time where they are large.

A file is the length of its header (8 bytes, little-endian), the header in JSON, and the bytes of all tensors. The
library of that name wants every tensor in memory to write them, and maps files to read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.errors import CheckpointError, CompressError, NonFiniteError
from compress.io.small_file import parse_object
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.progress import Bars

# What a header calls each type, and what torch does.
DTYPE_NAMES = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U32": "uint32", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
NARROW = ("F8", "F6", "F4", "E8M0", "I4", "U4")  # how names of types begin that only quantizers write
LENGTH = 8  # bytes of a header's length; headers are filled up to a multiple of it
LONGEST_HEADER = 100_000_000  # bytes, as in the library of that name
SEAL = "sha256"  # entry of a header's text: SHA-256 of the rest of the header and of the data
DIGEST = "0" * 64  # stands in for a digest until it is known
OFFSET = 10**15  # no offset takes more digits
WIDEST = {"dtype": "BF16", "shape": [OFFSET] * 4, "data_offsets": [OFFSET, OFFSET]}

Entry: TypeAlias = "tuple[str, tuple[int, ...], torch.dtype]"
Layout = Sequence[tuple[str, list[Entry]]]  # (owner, its tensors as they stand in the file), in the file's order
ReadTensors: TypeAlias = "Callable[[str], Mapping[str, Tensor]]"  # owner -> its tensors by name


def type_name(dtype: torch.dtype) -> str:
    """What a header calls a type."""
    name = str(dtype).removeprefix("torch.")
    return next(header for header, ours in DTYPE_NAMES.items() if ours == name)


def in_range(values: Tensor, most: float = math.inf) -> bool:
    """Whether no number is NaN, infinite, or larger than `most`; one pass, nothing the size of the values is made."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype.itemsize == 1:  # few of torch's operators take these
        values = values.float()
    most = min(most, torch.finfo(values.dtype).max)
    least, largest = torch.aminmax(values.detach())
    return bool(least >= -most and largest <= most)  # nor where they are NaN


def write_tensors(layout: Layout, read: ReadTensors, file: Path, bars: Bars, heading: str) -> None:
    """Write a safetensors file, one owner's tensors in memory at a time.

    Raises:
        NonFiniteError: one of them holds NaN or infinity.
    """
    entries = [entry for _, parts in layout for entry in parts]
    with file.open("wb") as out:
        out.write(_opening({"format": "pt"}, entries))
        for owner, parts in bars.over(layout, len(layout), f"write: {heading}", "end"):
            tensors = read(owner)
            for name, _, _ in parts:
                if not in_range(tensors[name]):
                    raise NonFiniteError(
                        f"{name} would be written to {file.name} with NaN or infinity; the numbers are too large for "
                        "the type they are stored in, or the checkpoint is damaged"
                    )
                out.write(bytes_of(tensors[name]))


def save_sealed(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> str:
    """Write a safetensors file of tensors that are in memory; returns its seal, which the header holds as well."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(bytes_of(tensor))
    entries = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    seal = _seal(metadata, _header_entries(entries), digest.hexdigest())
    with file.open("wb") as out:
        out.write(_opening({**metadata, SEAL: seal}, entries))
        for tensor in tensors.values():
            out.write(bytes_of(tensor))
    return seal


def write_as_made(
    file: Path,
    tensors: Iterable[tuple[str, Tensor]],
    names: Iterable[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a sealed safetensors file of tensors whose sizes are not known before they are made.

    Args:
        file: to write.
        tensors: each with its name; one in memory at a time.
        names: all of them, in their order.
        metadata: what the header says besides.
    """
    room = len(_encoded({**metadata, SEAL: DIGEST}, dict.fromkeys(names, WIDEST)))
    room += -room % LENGTH
    entries: dict[str, Any] = {}
    digest, position = hashlib.sha256(), 0
    with file.open("wb") as out:
        out.write(bytes(LENGTH + room))
        for name, value in tensors:
            data = bytes_of(value)
            entries[name] = _header_entry(value.dtype, tuple(value.shape), position)
            digest.update(data)
            out.write(data)
            position += len(data)
        out.seek(0)
        out.write(room.to_bytes(LENGTH, "little"))
        seal = _seal(metadata, entries, digest.hexdigest())
        out.write(_encoded({**metadata, SEAL: seal}, entries).ljust(room))


def seal_of(file: Path) -> str:
    """The seal that a file should have by what is in it now.

    Raises:
        CheckpointError: truncated or corrupt.
    """
    read_header(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH), "little")
        header = parse_object(opened.read(length), "the header")
        metadata = header.pop("__metadata__", {})
        metadata.pop(SEAL, None)
        return _seal(metadata, header, hashlib.file_digest(opened, "sha256").hexdigest())


def _seal(metadata: Mapping[str, str], entries: Mapping[str, Any], data: str) -> str:
    """`data`: SHA-256 of everything behind the header."""
    return hashlib.sha256(_encoded(metadata, entries) + data.encode()).hexdigest()


def _opening(metadata: Mapping[str, str], entries: Sequence[Entry]) -> bytes:
    """Everything before the data."""
    text = _encoded(metadata, _header_entries(entries))
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text


def _header_entries(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a header says of tensors that lie one behind the other."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape, dtype in entries:
        header[name] = _header_entry(dtype, shape, position)
        position = header[name]["data_offsets"][1]
    return header


def _header_entry(dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> dict[str, Any]:
    """What a header says of a tensor."""
    end = begin + math.prod(shape) * dtype.itemsize
    return {"dtype": type_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}


def _encoded(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()


def size_of_file(entries: Sequence[Entry]) -> int:
    """Bytes of the file that `write_tensors` writes, its header included."""
    data = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in entries)
    return len(_opening({"format": "pt"}, entries)) + data


def compare_tensors(layout: Layout, read: ReadTensors, file: Path, bars: Bars, heading: str) -> int:
    """Re-open a written file and compare every tensor with what was meant; returns how many were compared.

    Raises:
        CompressError: a tensor differs.
    """
    count, there = 0, read_header(file).tensors
    with file.open("rb") as opened:
        for owner, parts in bars.over(layout, len(layout), f"read back: {heading}"):
            meant = read(owner)
            for name, shape, dtype in parts:
                stored, wanted = there.get(name), bytes_of(meant[name])
                same = stored is not None and (stored.shape, stored.dtype) == (shape, dtype)
                if stored is not None and same:
                    opened.seek(stored.begin)
                    same = opened.read(wanted.nbytes) == bytes(wanted)
                if not same:
                    raise CompressError(f"{file}: {name} reads back differently; the disk may be failing")
                count += 1
    return count


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    array: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        begin: where in the file its bytes begin.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors by name, in its order, and any text."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """What is in a safetensors file, after checking that the file is whole.

    Raises:
        CheckpointError: truncated, corrupt, or not a safetensors file.
    """
    size = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            if length > size - LENGTH:
                raise ValueError("the header is incomplete")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            return _parsed(parse_object(opened.read(length), "the header"), LENGTH + length, size)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; write or copy the folder again") from error
    except (OSError, ValueError, TypeError, AttributeError, LookupError, CheckpointError) as error:
        raise CheckpointError(f"{file} ({size} bytes) is truncated or corrupt: {error}; fetch it again") from error
    except _UnknownTypeError as error:
        quantized = str(error).startswith(NARROW)
        why = "the checkpoint is already quantized; take the uncompressed model" if quantized else "not supported"
        raise CheckpointError(f"{file} holds tensors of type {error}: {why}") from error


class _UnknownTypeError(Exception):
    """A type that is not in the table."""


def _parsed(header: dict[str, Any], start: int, size: int) -> Header:
    """`start`: where the data begin; `size`: bytes of the file."""
    metadata = header.pop("__metadata__", {})
    found: dict[str, StoredTensor] = {}
    pieces = []
    for name, said in header.items():
        if said["dtype"] not in DTYPE_NAMES:
            raise _UnknownTypeError(said["dtype"])
        (begin, end), shape = said["data_offsets"], tuple(said["shape"])
        if not all(type(number) is int for number in (begin, end, *shape)):
            raise TypeError(f"{name} has sizes that are no whole numbers")
        found[name] = stored = StoredTensor(shape, getattr(torch, DTYPE_NAMES[said["dtype"]]), start + begin)
        if min((begin, *shape)) < 0 or end - begin != stored.count * stored.dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} cannot be {end - begin} bytes")
        pieces.append((begin, end))
    pieces.sort()
    ends = [0, *(end for _, end in pieces)]
    if [begin for begin, _ in pieces] != ends[:-1] or ends[-1] != size - start:
        raise ValueError("the data are incomplete, or some belong to no tensor")
    return Header(found, {str(key): str(value) for key, value in metadata.items()})


def read_tensor(file: Path, stored: StoredTensor) -> Tensor:
    """A tensor of a file, in memory of its own.

    Raises:
        CheckpointError: the file ended while it was read.
    """
    return read_piece(file, stored, 0, stored.count).view(stored.shape)


def read_piece(file: Path, stored: StoredTensor, start: int, stop: int) -> Tensor:
    """(stop - start,) elements of a flattened tensor of a file, in memory of their own.

    Raises:
        CheckpointError: the file ended while it was read.
    """
    found = torch.empty(stop - start, dtype=stored.dtype, device="cpu")
    # Read, not mapped: pages of a mapped file would pile up in memory.
    with file.open("rb") as opened:
        opened.seek(stored.begin + start * stored.dtype.itemsize)
        raw = bytes_of(found)
        if opened.readinto(raw) != raw.nbytes:
            raise CheckpointError(f"{file} ended while it was read; fetch it again")
    return found


def read_tensors(file: Path, names: Iterable[str] | None = None, seal: str = "") -> dict[str, Tensor]:
    """Some tensors of a small file, or all.

    Raises:
        CheckpointError: truncated or corrupt, one of them is missing, or the file bears another seal than this.
    """
    header = read_header(file)
    there = header.tensors
    if seal and header.metadata.get(SEAL) != seal:
        raise CheckpointError(f"{file} was replaced while this run was using it; give the same command again")
    wanted = list(there if names is None else names)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise CheckpointError(f"{file} has no tensor {missing[0]}; it was written by another program, or is damaged")
    return {name: read_tensor(file, there[name]) for name in wanted}


Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"


def refuse_other_tensors(there: Shapes, wanted: Shapes, optional: Collection[str], where: str) -> None:
    """Refuse a file that does not hold just what a model wants.

    Args:
        there: name -> shape of each tensor of the file.
        wanted: name -> shape of each tensor of the model.
        optional: those that may be missing.
        where: what the file is called.

    Raises:
        CheckpointError: one is missing, of another shape, or more than the model has.
    """
    damaged = "the folder is damaged: write it again"
    for name, shape in wanted.items():
        if name not in there:
            if name not in optional:
                raise CheckpointError(f"{where}: {name} is missing; {damaged}")
        elif there[name] != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {there[name]}, not {shape}: a mismatch with config.json; {damaged}"
            )
    more = sorted(there.keys() - wanted.keys())
    if more:
        raise CheckpointError(f"{where}: {more[0]} belongs to nothing that config.json describes; {damaged}")


def digest_of_data(file: Path) -> str:
    """SHA-256 of everything behind the header."""
    with file.open("rb") as opened:
        opened.seek(LENGTH + int.from_bytes(opened.read(LENGTH), "little"))
        return hashlib.file_digest(opened, "sha256").hexdigest()
