"""An ONNX graph to disk, its constants in one file beside it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from compress.errors import CompressError
from compress.export.onnx.build import build_graph, computed, constants, parameters
from compress.export.onnx.names import DATA, MODEL
from compress.export.onnx.nan import refuse_nan
from compress.io.atomic import writing

if TYPE_CHECKING:
    from pathlib import Path

    from compress.export.base import PackedFolder
    from compress.export.onnx.products import Style
    from compress.progress import Bars

INLINE = 1024  # bytes of a constant that stands in the graph itself
PAGE, LARGE, ALIGNMENT = 4096, 1 << 20, 64  # large constants begin a page, so that they can be mapped


def write_graph(made: PackedFolder, style: Style, folder: Path, bars: Bars) -> None:
    """Write the graph and its constants, one of them in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in bars.over(range(1), 1, "trace: onnx"):
        model = build_graph(made, style)
    refuse_nan(model.graph.initializers.values())
    with writing(folder / DATA):
        write_constants(model, folder, bars)
    with writing(folder / MODEL):
        ir.save(model, folder / MODEL)


def write_constants(model: ir.Model, folder: Path, bars: Bars) -> None:
    """Write the large constants of a graph into one file, which the graph then points to."""
    large = [v for v in model.graph.initializers.values() if v.const_value and v.const_value.nbytes >= INLINE]
    with (folder / DATA).open("wb") as out:
        for value in bars.over(large, len(large), "write: onnx"):
            number = value.const_value
            assert number is not None
            out.write(bytes(-out.tell() % (PAGE if number.nbytes >= LARGE else ALIGNMENT)))
            start = out.tell()
            out.write(number.tobytes())
            shape = ir.Shape(number.shape.numpy())
            value.const_value = ir.ExternalTensor(
                DATA, start, out.tell() - start, number.dtype, shape=shape, name=value.name or "", base_dir=folder
            )


def compare(made: PackedFolder, style: Style, folder: Path, bars: Bars) -> int:
    """Re-open a written file and compare every stored tensor with what was meant; returns how many there are.

    Raises:
        CompressError: one differs, or is missing.
    """
    there = ir.load(folder / MODEL).graph.initializers
    packed, plain = constants(made, style), parameters(made) | computed(made)
    used = {name: value for name, value in plain.items() if name in there}  # what no output depends on is left out
    meant = packed | used
    with (folder / DATA).open("rb") as data:
        for name in bars.over(meant, len(meant), "read back: onnx"):
            number, wanted = there[name].const_value if name in there else None, meant[name].const_value
            assert wanted is not None
            if number is None or number.dtype != wanted.dtype or number.shape != wanted.shape:
                raise CompressError(f"{folder / MODEL}: {name} is missing, or of another shape; write it again")
            if isinstance(number, ir.ExternalTensor):  # read, not mapped: pages would stay in memory
                data.seek(number.offset or 0)
                found = data.read(number.length or 0)
            else:
                found = number.tobytes()
            if found != wanted.tobytes():
                raise CompressError(f"{folder / DATA}: {name} reads back differently; the disk may be failing")
    return len(meant)
