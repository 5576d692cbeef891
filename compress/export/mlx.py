"""OUT/mlx: uniform codes as MLX keeps them, for mlx-lm on Macs.

| tensor   | type, shape               | what                                                        |
|----------|---------------------------|-------------------------------------------------------------|
| `weight` | uint32 (O, I * bits / 32) | the codes of a row are one stream, lowest bits first        |
| `scales` | (O, G)                    | as stored in OUT; float32 beside zero points                |
| `biases` | (O, G)                    | minus zero point times scale: value = code * scale + bias   |

A symmetric zero point is a power of two, and its bias a float16 as its scale is; other biases take float32. Where a
scale is no float16 itself, such a bias is the nearest float32.

Layout: `mlx.core.quantize` (affine) and `load_model` of mlx-lm 0.32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.export.bit_stream import unpacked
from compress.export.linear_layers import LinearLayers
from compress.export.pack_quantized import Scheme, own_schemes, packed_words
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.linear_layers import Contents, Leaves
    from compress.export.pack_quantized import Steps

WORD = 32  # bits


@dataclass(frozen=True, kw_only=True)
class Mlx(LinearLayers):
    """Uniform codes as MLX keeps them, embeddings included, for mlx-lm."""

    key: ClassVar[str] = "mlx"
    used: ClassVar[tuple[str, str]] = ("console", 'mlx_lm.generate --model FOLDER --prompt "Once upon a time"')
    title: ClassVar[str] = "MLX"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (32, 64, 128)

    def schemes(self, specs: Mapping[str, Spec]) -> dict[str, Scheme]:
        """A scale of more columns than MLX has groups of is repeated."""
        found = own_schemes(specs)
        for name, scheme in found.items():
            width = scheme.group_size or specs[name].shape[1]
            size = next((each for each in reversed(self.group_sizes) if width % each == 0), width)
            found[name] = Scheme(scheme.bits, scheme.symmetric, size)
        return found

    def leaves(self, spec: Spec, scheme: Scheme) -> Leaves:
        rows, columns = spec.shape
        groups, (_, stored) = scheme.groups(columns), spec.tensors()["scale"]
        kind = stored if scheme.symmetric else torch.float32
        return {
            "weight": ((rows, columns * scheme.bits // WORD), torch.uint32),
            "scales": ((rows, groups), kind),
            "biases": ((rows, groups), kind),
        }

    def packed(self, scheme: Scheme, steps: Steps) -> dict[str, Tensor]:
        scale = steps.scale if scheme.symmetric else steps.scale.float()
        return {
            "weight": packed_words(steps.codes, scheme.bits).view(torch.uint32),
            "scales": scale.contiguous(),
            "biases": _biases(scale, steps.zero),
        }

    def unpacked(self, scheme: Scheme, there: Mapping[str, Tensor]) -> Tensor:
        scale, bias = there["scales"], there["biases"]
        codes = unpacked(there["weight"].view(torch.int32), scheme.bits).float()
        # Code times scale plus bias is taken apart: a scale that is no float16 makes a bias that is rounded.
        zero = -(bias.double() / scale.double()).round()
        left = (bias - _biases(scale, zero)).float()
        grouped = codes.view(*scale.shape, -1)
        return ((grouped - zero.float()[..., None]) * scale.float()[..., None] + left[..., None]).view_as(codes)

    def sections(self, contents: Contents) -> dict[str, Any]:
        most = Counter((s.bits, s.group_size) for s in contents.schemes.values()).most_common(1)[0][0]
        said: dict[str, Any] = {**_said(*most), **dict.fromkeys(contents.dense(), False)}
        for name, scheme in contents.schemes.items():
            own = scheme.bits, scheme.group_size
            if own != most:
                said |= {each: _said(*own) for each in (name, contents.called[name])}
        return {"quantization": said}


def _said(bits: int, group_size: int | None) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _biases(scale: Tensor, zero: Tensor) -> Tensor:
    return (-scale.double() * zero.double()).to(scale.dtype)


__all__ = ["Mlx"]
