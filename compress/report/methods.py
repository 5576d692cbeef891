"""What `compress list` says: methods with their options, ready-made pipelines, formats."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from compress.passes import Pass
from compress.passes.quantize.activations import ActivationOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compress.export import Exporter


def listing(passes: Sequence[type[Pass]], pipelines: Iterable[str], formats: Iterable[str]) -> str:
    """Everything a pipeline file can name.

    Args:
        passes: the methods.
        pipelines: names of ready-made ones.
        formats: as `signature` gives them.
    """
    every = [f.name for f in fields(Pass)]
    quantizers = [f.name for f in fields(ActivationOptions) if f.name not in every]
    lines, width = [], max(18, 2 + max(len(pass_.key) for pass_ in passes))
    for pass_ in passes:
        first = (pass_.__doc__ or "").strip().splitlines()[0]
        own = [f for f in fields(pass_) if f.name not in (*every, *quantizers) and f.default is not MISSING]
        lines += [f"{pass_.key:{width}}{first}", f"{'':{width}}{', '.join(f'{f.name}={f.default}' for f in own)}"]
    rest = {"pipelines": pipelines, "every method": every, "every quantizer": quantizers, "export": formats}
    return "\n".join([*lines, "", *(f"{f'{what}:':{width}}{', '.join(names)}" for what, names in rest.items())])


def signature(exporter: type[Exporter]) -> str:
    """The name of a format, with its options."""
    options = ", ".join(f"{f.name}={f.default}" for f in fields(exporter))
    return f"{exporter.key} ({options})" if options else str(exporter.key)
