"""OUT/awq: uniform codes of four bits in the layout of AutoAWQ's GEMM kernels.

| tensor    | type, shape       | what                                              |
|-----------|-------------------|---------------------------------------------------|
| `qweight` | int32 (I, O / 8)  | the codes of eight rows of the weight in a word   |
| `qzeros`  | int32 (G, O / 8)  | zero points, as they are                          |
| `scales`  | (G, O)            | as stored in OUT                                  |

In a word the codes of rows 0, 2, 4, 6, 1, 3, 5 and 7 stand from the lowest bits on. Symmetric codes have zero point 8.
All layers have one group size: scales of more columns are repeated.

Layout: `WQLinear_GEMM` of AutoAWQ 0.2 and of GPTQModel 7.6, `auto_awq.py` of vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.export.gptq import ROW
from compress.export.linear_layers import LinearLayers
from compress.export.pack_quantized import Scheme, own_schemes, packed_words
from compress.export.refusals import refuse_apart, refuse_tables
from compress.lazy import np, torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.linear_layers import Contents, Leaves
    from compress.export.pack_quantized import Steps
    from compress.models.graph import Graph

BITS = 4
EACH = 8  # codes in a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the rows in a word


@dataclass(frozen=True, kw_only=True)
class AwqFormat(LinearLayers):
    """Uniform codes of 4 bits in the layout of AutoAWQ, for vLLM, SGLang, mlx-lm, and transformers with GPTQModel."""

    key: ClassVar[str] = "awq"
    used: ClassVar[tuple[str, str]] = ("console", "vllm serve FOLDER")
    title: ClassVar[str] = "the layout of AWQ"
    widths: ClassVar[tuple[int, ...]] = (BITS,)
    group_sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)

    def schemes(self, specs: Mapping[str, Spec]) -> dict[str, Scheme]:
        """One group size for all: the largest of which the columns of every scale are a multiple."""
        found = own_schemes(specs)
        grouped = any(scheme.group_size for scheme in found.values())
        size = math.gcd(*(scheme.group_size or specs[name].shape[1] for name, scheme in found.items()))
        symmetric = all(scheme.symmetric for scheme in found.values())
        return {name: Scheme(scheme.bits, symmetric, size if grouped else None) for name, scheme in found.items()}

    def misfits(self, graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
        yield from refuse_tables(graph, specs, "engines read no packed embeddings of AWQ")
        yield from super().misfits(graph, specs)
        yield from refuse_apart(graph, self.schemes(specs))
        broken = [(name, spec.shape[0]) for name, spec in specs.items() if spec.shape[0] % EACH]
        if broken:
            yield (
                f"{self.title} has {EACH} rows in a word, and {len(broken)} layers have another number of rows than a "
                f"multiple of that, such as {broken[0][0]} ({broken[0][1]}); `exclude` them in the quantizer"
            )

    def leaves(self, spec: Spec, scheme: Scheme) -> Leaves:
        rows, columns = spec.shape
        groups, (_, stored) = scheme.groups(columns), spec.tensors()["scale"]
        return {
            "qweight": ((columns, rows // EACH), torch.int32),
            "qzeros": ((groups, rows // EACH), torch.int32),
            "scales": ((groups, rows), stored),
        }

    def packed(self, scheme: Scheme, steps: Steps) -> dict[str, Tensor]:
        return {
            "qweight": _words(steps.codes.T),
            "qzeros": _words(steps.zero.T),
            "scales": steps.scale.T.contiguous(),
        }

    def unpacked(self, scheme: Scheme, there: Mapping[str, Tensor]) -> Tensor:
        codes, zero = _codes(there["qweight"]), _codes(there["qzeros"])
        grouped = (codes.view(len(zero), -1, codes.shape[1]) - zero[:, None]) * there["scales"].float()[:, None]
        return grouped.flatten(0, 1).T

    def sections(self, contents: Contents) -> dict[str, Any]:
        scheme = next(iter(contents.schemes.values()))
        said = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": scheme.group_size or ROW,
            "zero_point": True,
            "modules_to_not_convert": contents.dense(),
        }
        return {"quantization_config": said}


def _words(codes: Tensor) -> Tensor:
    """(R, N) uint8 codes below 16 -> (R, N / 8) int32."""
    rows = len(codes)
    return packed_words(codes.reshape(-1, EACH)[:, list(ORDER)].reshape(rows, -1), BITS)


def _codes(words: Tensor) -> Tensor:
    """(R, W) int32 -> (R, 8 W) float32, by shifts, each code to the place that it stands for."""
    array = words.numpy().view(np.uint32)
    found = np.empty((*array.shape, EACH), np.uint8)
    for place, row in enumerate(ORDER):
        found[..., row] = array >> np.uint32(BITS * place) & np.uint32(2**BITS - 1)
    return torch.from_numpy(found).flatten(1).float()


__all__ = ["AwqFormat"]
