"""Quantized inputs: options that every quantizer has.

A quantizer's own algorithm knows nothing of them: the grid is fitted to what calibration saw of a layer's inputs, or to
each token as it comes, and kept beside the weight (`encodings/inputs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from compress.encodings import InputForm
from compress.encodings.inputs import OLIVE, GridKind, Scale
from compress.encodings.rounded_inputs import E4M3
from compress.passes.base import ModelPass, OptionError, Pass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.calibration.statistics import Statistics
    from compress.encodings import Weight
    from compress.passes.base import Edit


@dataclass(frozen=True, kw_only=True)
class ActivationOptions(Pass):
    """Rounds the inputs of its layers too, while the model runs.

    Args:
        activation_bits: 2 to 8 (on the olive grid 4 or 8, as floats 8); None leaves inputs as they are.
        activation_scale: one for each `token`, found when it comes, or one for the `tensor`, from calibration data.
        activation_grid: `int` has even steps; `olive` keeps outliers at the cost of their neighbours; `power` has
            levels that a power spaces, denser near zero. These two have one scale for the tensor. `fp8`: E4M3 numbers.
    """

    activation_bits: Annotated[int, Ge(2), Le(8)] | None = None
    activation_scale: Scale = "token"
    activation_grid: GridKind = "int"

    @property
    def ranged(self) -> bool:
        """Whether the inputs of some layer are rounded to a grid that calibration fixes."""
        forms = (self._changed(o.options).input_form() for o in self.overrides)
        return any(form is not None and form.static for form in (self._changed({}).input_form(), *forms))

    @property
    def calibrated(self) -> bool:
        return super().calibrated or self.ranged

    def input_form(self) -> InputForm | None:
        if self.activation_bits is None:
            return None
        return InputForm(bits=self.activation_bits, grid=self.activation_grid, scale=self.activation_scale)

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        bits, olive = self.activation_bits, self.activation_grid == "olive"
        if bits is None:
            return
        if olive and bits not in OLIVE:
            yield OptionError("activation_bits", f"{bits} is not 4 or 8, which the olive grid has")
        if self.activation_grid == "fp8" and bits != E4M3.bits:
            yield OptionError("activation_bits", f"{bits} is not 8, the bits of fp8")
        if self.activation_scale == "token" and self.activation_grid not in ("int", "fp8"):
            grid = self.activation_grid
            yield OptionError("activation_scale", f"the {grid} grid has one scale for the tensor; set it to tensor")
        elif self.activation_scale == "tensor" and isinstance(self, ModelPass):
            yield OptionError("activation_scale", f"tensor needs the range of inputs, and {self.key} sees none")

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        bits = [self.activation_bits, *(o.options.get("activation_bits") for o in self.overrides)]
        if not any(bits):
            for option in ("activation_scale", "activation_grid"):
                if option in self.options():
                    yield OptionError(option, "changes nothing without activation_bits")

    def _changed(self, options: Any) -> ActivationOptions:
        return replace(self, overrides=(), **options)


def attached(pass_: Pass, weight: Weight, edit: Edit, seen: Statistics | None) -> tuple[Weight, dict[str, str]]:
    """A weight with what becomes of its inputs, if a pass changes them, and notes for the report.

    Args:
        pass_: with the options of this very site.
        weight: that it made.
        edit: that it made it by.
        seen: statistics of the inputs; a static grid takes their range.
    """
    form = pass_.input_form()
    if form is None:
        return weight, {}
    if edit.inputs is not None:
        inputs = edit.inputs
    elif not form.static:
        inputs = form.input_grid({})
    elif seen is not None and seen.range is not None and not edit.keeps:
        inputs = seen.range.grid(form)
    else:
        return weight, {"fallback": "its inputs stay as they are: none ever reached it"}
    return replace(weight, inputs=inputs), {"inputs": str(inputs.form)}
