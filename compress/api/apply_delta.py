"""A base and a compressed delta, put together and written as a plain folder."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.output_folder import APPLIED, refuse_destination
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.delta.file import Delta, locate
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.opening import open_model
from compress.checkpoint.packed_layout import entries, stored_tensors
from compress.checkpoint.sources import SINGLE
from compress.errors import NonFiniteError, UsageError
from compress.io.atomic import publish, write_json, writing
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

    One tensor is in memory at a time. Configuration and tokenizer are the base's. The folder is written beside its
    final name, read back, compared, and renamed; its `delta.json` says what it was made from.

    Args:
        base: the very model that the delta was made from: `demo`, a local folder or a hub id.
        delta: a folder or hub id that holds a delta, or its file.
        out: the folder to write; must not exist.
        overwrite: replace an existing `out`.
        bars: progress; by default, bars where stderr is a terminal.

    Returns:
        How many tensors were read back equal, and the delta's size.

    Raises:
        UsageError: another base, a damaged delta, an `out` that would be lost: before anything is written.
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
    for given in (opened.folder, file):
        refuse_destination(destination, given, overwrite)
    if destination.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another -o, or give --overwrite")
    checked = Delta.open(file)
    checked.refuse_other(opened.artifact, str(delta))
    model = with_delta(opened.artifact, checked)
    layout, read = list(entries(model)), partial(_finite_tensor, model)
    unfinished = destination.parent / f"{destination.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with bars.shown():
            with writing(unfinished / SINGLE):
                write_tensors(layout, read, unfinished / SINGLE, bars, "weights")
            compared = compare_tensors(layout, read, unfinished / SINGLE, bars, "weights")
        write_json(opened.settings(opened.dtype), unfinished / "config.json")
        copy_companions(opened.folder, unfinished)
        facts = {"tensors_equal": compared, "delta": checked.facts()}
        about = {"base": str(base), "delta": str(delta), "method": checked.about["method"], **facts}
        write_json(about, unfinished / APPLIED)
        publish(unfinished / SINGLE, unfinished / SINGLE)
        if destination.exists():
            shutil.rmtree(destination)
        unfinished.rename(destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def _finite_tensor(model: Artifact, name: str) -> dict[str, Tensor]:
    """A tensor as it is written."""
    found = stored_tensors(model, name)
    for value in found.values():
        if not in_range(value):
            raise NonFiniteError(f"{name} holds NaN or infinity with the delta added; get a clean base")
    return found
