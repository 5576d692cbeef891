"""What every exporter does: tensors written and read back one at a time, and the source's other files taken along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError, safe_open

from compress.errors import CheckpointError, CompressError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.progress import Bars

# What a header calls each type, and what torch does.
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

Entry: TypeAlias = "tuple[str, tuple[int, ...], torch.dtype]"
Layout = Sequence[tuple[str, list[Entry]]]  # (owner, its tensors as they stand in the file), in the file's order
Read: TypeAlias = "Callable[[str], Mapping[str, Tensor]]"  # owner -> its tensors by name


def type_name(dtype: torch.dtype) -> str:
    """What a header calls a type."""
    name = str(dtype).removeprefix("torch.")
    return next(header for header, ours in TYPES.items() if ours == name)


def write_tensors(layout: Layout, read: Read, file: Path, bars: Bars, heading: str) -> None:
    """Write a safetensors file, one owner's tensors in memory at a time."""
    # safetensors' own writer wants every tensor in memory; the format is a length, a header and the bytes in order.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for _, parts in layout:
        for name, shape, dtype in parts:
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": type_name(dtype), "shape": list(shape), "data_offsets": [position, end]}
            position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for owner, parts in bars.over(layout, len(layout), f"write: {heading}"):
            tensors = read(owner)
            for name, _, _ in parts:
                out.write(bytes_of(tensors[name]))


def compare_tensors(layout: Layout, read: Read, file: Path, bars: Bars, heading: str) -> int:
    """Re-open a written file and compare every tensor with what was meant; returns how many were compared.

    Raises:
        CompressError: a tensor differs.
    """
    count = 0
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        start = opened.tell()
        for owner, parts in bars.over(layout, len(layout), f"read back: {heading}"):
            meant = read(owner)
            for name, shape, dtype in parts:
                there = header[name]
                opened.seek(start + there["data_offsets"][0])
                found = opened.read(there["data_offsets"][1] - there["data_offsets"][0])
                same = found == bytes(bytes_of(meant[name]))
                if not same or there["shape"] != list(shape) or there["dtype"] != type_name(dtype):
                    raise CompressError(f"{file}: {name} reads back differently; the disk may be failing")
                count += 1
    return count


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """As they stand in a file."""
    array: Any = _raw(tensor).numpy()
    return memoryview(array)


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor of a safetensors file, after checking that the file is whole.

    Raises:
        CheckpointError: truncated, corrupt, or not a safetensors file.
    """
    try:
        with safe_open(file, "pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), getattr(torch, TYPES[part.get_dtype()]))
            return found
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; write or copy the folder again") from error
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file} ({size} bytes) is truncated or corrupt: {error}; fetch it again") from error
    except KeyError as error:
        raise CheckpointError(f"{file}: tensors of type {error} are not supported") from error


def data_offsets(file: Path) -> dict[str, int]:
    """Where in a safetensors file the bytes of every tensor begin."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {name: 8 + size + e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"}
