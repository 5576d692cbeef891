"""What every exporter does: tensors written and read back one at a time, and the source's other files taken along."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.ledger import writing
from compress.progress import Bars

# What travels along from the source folder: never weights, never code.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.model",
              "generation_config.json", "chat_template*", "preprocessor_config.json")  # fmt: skip
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Entry = tuple[str, tuple[int, ...], torch.dtype]
Layout = Sequence[tuple[str, list[Entry]]]  # (owner, its tensors as they stand in the file), in the file's order
Read = Callable[[str], Mapping[str, Tensor]]  # owner -> its tensors by name


def write_tensors(layout: Layout, read: Read, file: Path, bars: Bars, heading: str) -> None:
    """Write a safetensors file, one owner's tensors in memory at a time."""
    # safetensors' own writer wants every tensor in memory; the format is a length, a header and the bytes in order.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for _, parts in layout:
        for name, shape, dtype in parts:
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
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
                if not same or there["shape"] != list(shape) or there["dtype"] != NAMES[dtype]:
                    raise CompressError(f"{file}: {name} reads back differently; the disk may be failing")
                count += 1
    return count


def write_json(data: Mapping[str, Any], file: Path) -> None:
    """Write a configuration."""
    with writing(file):
        file.write_text(json.dumps(data, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and their like."""
    for found in sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if p.is_file()}):
        with writing(folder / found.name):
            shutil.copyfile(found, folder / found.name)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """As they stand in a file."""
    array: Any = _raw(tensor).numpy()
    return memoryview(array)
