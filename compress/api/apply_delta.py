"""A base and a compressed delta, put together and written as a plain folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.output_folder import (
    APPLIED,
    RESULT,
    clear_result,
    publish_folder,
    refuse_destination,
    working_for,
)
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.delta.file import Delta, locate
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.opening import open_model
from compress.checkpoint.packed_layout import entries, stored_tensors
from compress.checkpoint.sources import SINGLE
from compress.errors import NonFiniteError, UsageError
from compress.io.atomic import write_json, writing
from compress.io.keys import Watch
from compress.io.safetensors_file import compare_tensors, in_range, write_tensors
from compress.models.companions import copy_companions
from compress.progress import Bars

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoint.artifact import Artifact


@undisturbed()
def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, overwrite: bool = False, bars: Bars | None = None
) -> dict[str, Any]:
    """Write the model that a base and a compressed delta make, as a plain folder that transformers loads.

    One tensor is in memory at a time. Configuration and tokenizer are the base's. The folder is written into
    OUT.work, read back, compared, and moved; its `delta.json` says what it was made from.

    Args:
        base: the very model that the delta was made from: `demo`, a local folder or a hub id.
        delta: a folder or hub id that holds a delta, or its file.
        out: the folder to write; must not exist.
        overwrite: replace an existing `out`.
        bars: progress; by default, bars where stderr is a terminal.

    Returns:
        How many tensors were read back equal, and the delta's size.

    Raises:
        UsageError: another base, a damaged delta, an `out` that would be lost, or in which another process works:
            before anything is written.
        NonFiniteError: the sum does not fit into the base's type.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"compeft": {"models": ["demo"]}}]}, "demo", f"{folder}/made")
        ...     found = compress.apply_delta("demo", f"{folder}/made/delta", f"{folder}/out")
        >>> found["tensors_equal"] == report.verified["tensors_equal"]
        True
    """
    destination, bars = Path(out).absolute(), bars or Bars()
    opened = open_model(base)
    file = locate(str(delta))
    if not file.is_file():
        raise UsageError(
            f"{delta} is not a compressed delta; a merge with compeft or bitdelta writes one into OUT/delta"
        )
    refuse_destination(destination, {"model": opened.folders, "delta": [file]}, overwrite)
    _refuse_existing(destination, overwrite)
    checked = Delta.open(file)
    checked.refuse_other(opened.artifact, str(delta))
    model = with_delta(opened.artifact, checked)
    layout, read = list(entries(model)), partial(_finite_tensor, model)
    with working_for(destination) as work, clear_result(work), bars.shown():
        _refuse_existing(destination, overwrite)  # what another process may have made or put back
        watch = Watch.over([*model.source.files(), *opened.companions])
        made = work / RESULT
        made.mkdir()
        with writing(made / SINGLE):
            write_tensors(layout, read, made / SINGLE, bars, "weights")
        compared = compare_tensors(layout, read, made / SINGLE, bars, "weights")
        write_json(opened.settings(opened.dtype), made / "config.json")
        copy_companions(opened.folder, made, opened.tokenizer)
        facts = {"tensors_equal": compared, "delta": checked.facts()}
        about = {"base": str(base), "delta": str(delta), "method": checked.about["method"], **facts}
        write_json(about, made / APPLIED)
        watch.refuse_changed()
        publish_folder(made, destination)
    return facts


def _refuse_existing(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise UsageError(f"{destination} exists; choose another -o, or give --overwrite")


def _finite_tensor(model: Artifact, name: str) -> dict[str, Tensor]:
    """A tensor as it is written."""
    found = stored_tensors(model, name)
    for value in found.values():
        if not in_range(value):
            raise NonFiniteError(f"{name} holds NaN or infinity with the delta added; get a clean base")
    return found
