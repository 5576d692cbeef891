"""Where NaN of a graph comes from: its constants, or what a node makes.

Infinity is left: masks are made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import onnx_ir as ir

from compress.errors import NonFiniteError
from compress.export.onnx.names import MODEL
from compress.export.onnx.session import Runner, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

LOOKED_AT = "looked_at.onnx"  # the graph with every value given out, while it is looked at


def refuse_nan(constants: Iterable[ir.Value]) -> None:
    """Refuse a constant that is no stored weight, such as a rotary frequency, and holds NaN.

    Raises:
        NonFiniteError: names it.
    """
    for value in constants:
        number = value.const_value
        wrong = 0 if isinstance(number, ir.LazyTensor) else _in_constant(number)
        if number is not None and wrong:
            raise NonFiniteError(
                f"the graph's constant {value.name}, which no file holds and the model's own code computes, has "
                f"{wrong} NaN among its {number.size} numbers; nothing was written"
            )


def first_nan(folder: Path, inputs: Tensor) -> str:
    """A sentence about the first NaN of a written graph for an input whose logits are not finite.

    Args:
        folder: of the export.
        inputs: token ids (rows, length), or images.
    """
    try:
        return _looked_at(folder, inputs)
    except Exception as error:  # what is told about has failed already
        return f"where they come from could not be looked at ({error!s:.200})"
    finally:
        (folder / LOOKED_AT).unlink(missing_ok=True)


def _looked_at(folder: Path, inputs: Tensor) -> str:
    model = ir.load(folder / MODEL)
    bad = [name for name, value in model.graph.initializers.items() if _in_constant(value.const_value)]
    if bad:
        return f"of its constants, {len(bad)} hold NaN: {', '.join(bad[:5])}"
    made = [value for node in model.graph for value in node.outputs if value.name]
    given = set(model.graph.outputs)
    model.graph.outputs.extend(value for value in made if value not in given)
    ir.save(model, folder / LOOKED_AT)
    runner = Runner(open_session(folder / LOOKED_AT))
    found = runner.values(inputs, [value.name or "" for value in made])
    for node in model.graph:
        if any(value.name in found and _count_nan(found[value.name]) for value in node.outputs):
            before = [value.name for value in node.inputs if value is not None]
            return f"none of its constants holds NaN; the first node that makes one is a {node.op_type} of {before}"
    return "none of its constants holds NaN, nor does what its nodes make when every value is asked for"


def _in_constant(number: ir.TensorProtocol | None) -> int:
    return 0 if number is None or not number.dtype.is_floating_point() else _count_nan(number.numpy())


def _count_nan(numbers: Any) -> int:
    """How many of them are NaN; numbers of an array, of a type of numpy or of ml_dtypes (kind V: bfloat16, float8)."""
    kind = numpy.asarray(numbers).dtype.kind
    if kind not in "fV":
        return 0
    return int(numpy.isnan(numbers.astype(numpy.float32) if kind == "V" else numbers).sum())
