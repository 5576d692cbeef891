"""Floats in the compressed-tensors library's formats: FP8, NVFP4 and MXFP4, and FP8 inputs.

| weights                     | format                 | tensors of a layer of O rows and I columns           |
|-----------------------------|------------------------|------------------------------------------------------|
| fp8, a scale for the tensor | `float-quantized`      | `weight` F8_E4M3 (O, I), `weight_scale` (1,)         |
| fp8, a scale for each row   | `float-quantized`      | `weight`, `weight_scale` (O, 1)                      |
| fp8, a scale for a block    | `float-quantized`      | `weight`, `weight_scale` (O / 128, I / 128)          |
| nvfp4                       | `nvfp4-pack-quantized` | `weight_packed` uint8 (O, I / 2), `weight_scale`     |
|                             |                        | F8_E4M3 (O, I / 16), to be divided by the float32    |
|                             |                        | `weight_global_scale` (1,)                           |
| mxfp4                       | `mxfp4-pack-quantized` | `weight_packed`, `weight_scale` uint8 (O, I / 32)    |

Of two codes in a byte the first is in the low bits. Static FP8 inputs have `input_scale` (1,) beside these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.encodings.bits import pack_bits, row_bytes
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings import InputForm, Spec, Weight
    from compress.io.safetensors_file import Entry

Strategy = Literal["tensor", "channel", "block", "tensor_group", "group"]

FP8, NVFP4, MXFP4 = "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
SIDE = 128  # of a block
GROUP = {NVFP4: 16, MXFP4: 32}  # columns that share a scale


@dataclass(frozen=True)
class FloatScheme:
    """What readers are told about a layer.

    Attributes:
        format: of its tensors.
        strategy: what shares a scale.
        inputs: how its inputs are rounded; None where they are not.
    """

    format: str
    strategy: Strategy
    inputs: Literal["token", "tensor"] | None = None

    def __str__(self) -> str:
        """The scheme in words."""
        inputs = f" with inputs per {self.inputs}" if self.inputs else ""
        return f"{self.format} per {self.strategy}{inputs}"

    def to_json(self) -> dict[str, Any]:
        """The entry `weights` of a config group."""
        bits = 8 if self.format == FP8 else 4
        found: dict[str, Any] = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": self.strategy}
        found["group_size"] = GROUP.get(self.format)
        if self.strategy == "block":
            found["block_structure"] = [SIDE, SIDE]
        if self.format in GROUP:
            found["scale_dtype"] = "torch.float8_e4m3fn" if self.format == NVFP4 else "torch.uint8"
        return found

    def inputs_json(self) -> dict[str, Any] | None:
        """The entry `input_activations`."""
        if self.inputs is None:
            return None
        dynamic = self.inputs == "token"
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": self.inputs, "dynamic": dynamic}

    def entries(self, name: str, spec: Spec) -> list[Entry]:
        """What stands in the file of a layer."""
        rows, columns = spec.shape
        assert spec.form is not None
        (blocks, groups), stored = spec.form.tables(spec.shape)["scale"]
        if self.format == FP8:
            shape = (1,) if self.strategy == "tensor" else (blocks, groups)
            found = [("weight", (rows, columns), torch.float8_e4m3fn), ("weight_scale", shape, stored)]
        else:
            kind = torch.float8_e4m3fn if self.format == NVFP4 else torch.uint8
            packed = rows, row_bytes(columns, spec.form.bits)
            found = [("weight_packed", packed, torch.uint8), ("weight_scale", (rows, groups), kind)]
            found += [("weight_global_scale", (1,), torch.float32)] if self.format == NVFP4 else []
        found += [("input_scale", (1,), torch.float32)] if self.inputs == "tensor" else []
        return [(f"{name}.{leaf}", shape, dtype) for leaf, shape, dtype in found]

    def tensors(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of a layer."""
        encoding = weight.encoding
        assert encoding is not None
        codes, tables = encoding.codes, encoding.tables()
        if self.format == FP8:
            scale = tables["scale"]
            scale = scale.view(1) if self.strategy == "tensor" else scale
            found = {"weight": codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": scale}
        else:
            found = {"weight_packed": pack_bits(codes, encoding.form.bits), "weight_scale": tables["scale"]}
        if self.format == NVFP4:
            found["weight_scale"] = tables["scale"].view(torch.float8_e4m3fn)
            found["weight_global_scale"] = 1 / tables["outer_scale"]
        if self.inputs == "tensor":
            assert weight.inputs is not None
            found["input_scale"] = weight.inputs.tensors()["input_scale"]
        return {f"{name}.{leaf}": value for leaf, value in found.items()}


def float_schemes(specs: Mapping[str, Spec]) -> dict[str, FloatScheme]:
    """The scheme of every matrix that one of the formats holds, by name."""
    found = {name: _scheme_of(spec) for name, spec in specs.items()}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _scheme_of(spec: Spec) -> FloatScheme | None:
    form = spec.form
    if form is None or not form.floats:
        return None
    tables, (rows, columns) = form.tables(spec.shape), spec.shape
    (blocks, groups), stored = tables["scale"]
    each = rows // blocks, columns // groups
    if form.bits == 8 and stored != torch.uint8:
        strategies: dict[tuple[int, int], Strategy] = {
            (rows, columns): "tensor", (SIDE, SIDE): "block", (1, columns): "channel",
        }  # fmt: skip
        strategy = strategies.get(each)
        return None if strategy is None else FloatScheme(FP8, strategy, _inputs_of(spec.inputs))
    if form.bits == 4 and stored == torch.uint8:
        name = NVFP4 if "outer_scale" in tables else MXFP4
        if each == (1, GROUP[name]):
            return FloatScheme(name, "tensor_group" if name == NVFP4 else "group")
    return None


def _inputs_of(form: InputForm | None) -> Literal["token", "tensor"] | None:
    return form.scale if form is not None and form.grid == "fp8" else None


__all__ = ["FloatScheme", "float_schemes"]
