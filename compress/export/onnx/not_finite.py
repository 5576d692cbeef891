"""Where numbers of a graph stop being numbers: in its constants, or in what a node makes."""

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


def refuse_not_a_number(constants: Iterable[ir.Value]) -> None:
    """Refuse a constant that is no stored weight, such as a rotary frequency, and holds NaN.

    Infinity is left: masks are made of it.

    Raises:
        NonFiniteError: names it.
    """
    for value in constants:
        number = value.const_value
        if number is None or isinstance(number, ir.LazyTensor) or not number.dtype.is_floating_point():
            continue
        wrong = int(numpy.isnan(number.numpy().astype(numpy.float32)).sum())
        if wrong:
            raise NonFiniteError(
                f"the graph's constant {value.name}, which no file holds and the model's own code computes, has "
                f"{wrong} NaN among its {number.size} numbers; nothing was written"
            )


def first_not_finite(folder: Path, inputs: Tensor) -> str:
    """A sentence about the first value of a written graph that is not finite for an input whose logits are not.

    Args:
        folder: of the export.
        inputs: token ids (rows, length), or images.
    """
    model = ir.load(folder / MODEL)
    bad = [name for name, value in model.graph.initializers.items() if _bad(_numbers(value))]
    if bad:
        return f"of its constants, {len(bad)} are not finite: {', '.join(bad[:5])}"
    made = [value for node in model.graph for value in node.outputs if value.name]
    given = set(model.graph.outputs)
    model.graph.outputs.extend(value for value in made if value not in given)
    try:
        ir.save(model, folder / LOOKED_AT)
        runner = Runner(open_session(folder / LOOKED_AT))
        found = runner.values(inputs, [value.name or "" for value in made])
    except Exception as error:  # what is told about has failed already
        return f"all its constants are finite; what its nodes make could not be looked at ({error!s:.200})"
    finally:
        (folder / LOOKED_AT).unlink(missing_ok=True)
    for node in model.graph:
        wrong = [value.name for value in node.outputs if value.name in found and _bad(found[value.name])]
        if wrong:
            before = [value.name for value in node.inputs if value is not None]
            return f"all its constants are finite; the first node that makes NaN is a {node.op_type} of {before}"
    return "all its constants are finite, and so is what its nodes make when every value is asked for"


def _numbers(value: ir.Value) -> Any:
    number = value.const_value
    return None if number is None or not number.dtype.is_floating_point() else number.numpy()


def _bad(numbers: Any) -> bool:
    """Whether there is NaN in it: infinity stands in masks."""
    if numbers is None or not numpy.issubdtype(numpy.asarray(numbers).dtype, numpy.inexact):
        return False
    return bool(numpy.isnan(numbers).any())
