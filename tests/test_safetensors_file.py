"""The one reader and writer of safetensors headers agrees with the library of that name, in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import CheckpointError
from compress.io.safetensors_file import (
    DTYPE_NAMES,
    read_header,
    read_piece,
    read_tensor,
    read_tensors,
    save_sealed,
    seal_of,
    write_as_made,
)


def tensors() -> dict[str, Tensor]:
    """One of every type; also a scalar, an empty one, and one of an odd number of bytes before wider ones."""
    generator = torch.Generator().manual_seed(0)
    found = {"odd": torch.arange(3, dtype=torch.uint8), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    for name in DTYPE_NAMES.values():
        value = 100 * torch.rand(3, 5, generator=generator)
        found[name] = (value > 50) if name == "bool" else value.to(getattr(torch, name))
    return found | {"turned": torch.arange(6.0).view(2, 3).T}


def assert_equal(found: dict[str, Tensor], meant: dict[str, Tensor]) -> None:
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_what_is_written_here_is_what_the_library_reads(tmp_path: Path) -> None:
    file, meant = tmp_path / "a.safetensors", tensors()
    seal = save_sealed(meant, file, {"key": "value"})
    assert_equal(load_file(file), meant)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"key": "value", "sha256": seal}


def test_what_the_library_writes_is_what_is_read_here(tmp_path: Path) -> None:
    file, meant = tmp_path / "a.safetensors", {name: value.contiguous() for name, value in tensors().items()}
    save_file(meant, file, {"key": "value"})
    header = read_header(file)
    assert header.metadata == {"key": "value"}
    assert_equal(read_tensors(file), meant)
    assert_equal(read_tensors(file, ["bool", "scalar"]), {name: meant[name] for name in ("bool", "scalar")})
    for name, value in meant.items():
        assert torch.equal(read_tensor(file, header.tensors[name]), value)
        middle = slice(value.numel() // 3, value.numel() // 2)
        piece = read_piece(file, header.tensors[name], middle.start, middle.stop)
        assert torch.equal(piece, value.flatten()[middle])


def test_tensors_of_unknown_sizes_are_written_behind_a_sealed_header(tmp_path: Path) -> None:
    file, meant = tmp_path / "a.safetensors", tensors()
    write_as_made(file, iter(meant.items()), meant, {"more": "é"})
    assert_equal(load_file(file), meant)
    assert read_header(file).metadata == {"sha256": seal_of(file), "more": "é"}


def test_a_seal_stands_for_every_byte_that_means_anything(tmp_path: Path) -> None:
    file, meant = tmp_path / "a.safetensors", {"ab": torch.arange(4.0), "b": torch.ones(3, dtype=torch.bool)}
    seal = save_sealed(meant, file, {"key": "value"})
    assert read_tensors(file, seal=seal).keys() == meant.keys()
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            kept = read_header(file).metadata.get("sha256") == seal_of(file)
        except CheckpointError:
            continue
        assert not kept or read_header(file).metadata != {"key": "value", "sha256": seal}, position
    save_sealed({"ab": torch.zeros(4)}, file, {"key": "value"})
    with pytest.raises(CheckpointError, match="was replaced while this run was using it"):
        read_tensors(file, seal=seal)


def header_of(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(file: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", {"shape": [2, 3]}),
        ("a", {"shape": [-1, -4]}),
        ("a", {"shape": "4"}),
        ("a", {"data_offsets": [0, 8]}),
        ("a", {"data_offsets": [8, 24]}),
        ("a", {"data_offsets": [-16, 0]}),
        ("b", {"data_offsets": [0, 16]}),
        ("b", {"data_offsets": [16]}),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    file = tmp_path / "a.safetensors"
    save_sealed({"a": torch.ones(4), "b": torch.ones(4)}, file, {})
    header, data = header_of(file)
    put(file, header, data)
    assert read_tensors(file).keys() == {"a", "b"}
    header[name].update(change)
    put(file, header, data)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_header(file)


def test_a_file_that_is_cut_short_anywhere_or_goes_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_sealed({"a": torch.ones(4)}, file, {})
    whole = file.read_bytes()
    for data in (*(whole[:size] for size in range(len(whole))), whole + b"\0"):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{len(data)} bytes\) is truncated or corrupt"):
            read_header(file)
    headers: list[Any] = [[], 1, {"a": []}, {"a": {"dtype": "F32"}}]
    for header in headers:
        put(file, header, b"")
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            read_header(file)


def test_types_that_are_not_known_and_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    put(file, {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(CheckpointError, match="tensors of type F4: the checkpoint is already quantized"):
        read_header(file)
    save_sealed({"a": torch.ones(4)}, file, {})
    with pytest.raises(CheckpointError, match="has no tensor b"):
        read_tensors(file, ["a", "b"])
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "b.safetensors")
