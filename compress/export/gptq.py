"""OUT/gptq: uniform codes in the layout of AutoGPTQ and GPTQModel, which vLLM, SGLang and transformers read.

| tensor    | type, shape             | what                                                                |
|-----------|-------------------------|---------------------------------------------------------------------|
| `qweight` | int32 (I * bits / 32, O)| the codes of a column of this matrix are one stream, lowest bits first |
| `qzeros`  | int32 (G, O * bits / 32)| zero points, streams along the rows; less one in version 1          |
| `scales`  | (G, O)                  | as stored in OUT                                                    |
| `g_idx`   | int32 (I,)              | the group of each column                                            |

A code of three bits may lie in two words. Version 1, which every engine reads, stores zero points less one: readers
that add one to a whole word of them carry into the next where a zero point is 0. So such a zero point is written as 1,
with codes that are one higher, which means the same; codes that are the highest already need version 2.

Layout: `qlinear` of AutoGPTQ 0.7 and of GPTQModel 7.6, `auto_gptq.py` of vLLM.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.encodings.format import version
from compress.errors import CompressError
from compress.export.bit_stream import unpacked
from compress.export.linear_layers import LinearLayers, distinct
from compress.export.pack_quantized import Scheme, own_schemes, packed_words
from compress.export.refusals import refuse_apart, refuse_tables
from compress.io.atomic import write_json
from compress.io.small_file import read_object
from compress.lazy import torch
from compress.models.fused import fused_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import PackedFolder
    from compress.export.linear_layers import Contents, Leaves
    from compress.export.pack_quantized import Steps
    from compress.models.graph import Graph
    from compress.progress import Bars

WORD = 32  # bits
ROW = -1  # the group size of layers with a scale for each row


@dataclass(frozen=True, kw_only=True)
class GptqFormat(LinearLayers):
    """Uniform codes in the layout of GPTQ, for vLLM, SGLang, and transformers with GPTQModel.

    Args:
        checkpoint_format: `gptq` stores zero points less one, and every engine reads it; `gptq_v2` as they are.
    """

    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"

    key: ClassVar[str] = "gptq"
    used: ClassVar[tuple[str, str]] = (
        "console",
        "vllm serve FOLDER   # symmetric codes of 4 and 8 bits; GPTQModel loads the others",
    )
    files: ClassVar[tuple[str, ...]] = (*LinearLayers.files, "quantize_config.json")
    title: ClassVar[str] = "the layout of GPTQ"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256, 512, 1024)

    def schemes(self, specs: Mapping[str, Spec]) -> dict[str, Scheme]:
        """Zero points are always stored, so only where all layers are symmetric does it matter."""
        found = own_schemes(specs)
        sizes = {scheme.group_size for scheme in found.values()}
        symmetric = all(scheme.symmetric for scheme in found.values())
        for name, scheme in found.items():
            columns = specs[name].shape[1]
            # One scale for a row of so many columns is one for a group, where others have groups of as many.
            size = columns if scheme.group_size is None and columns in sizes else scheme.group_size
            found[name] = Scheme(scheme.bits, symmetric, size)
        return found

    def misfits(self, graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
        yield from refuse_tables(graph, specs, "engines read no packed embeddings of GPTQ")
        yield from super().misfits(graph, specs)
        yield from refuse_apart(graph, self.schemes(specs))
        broken = [
            (name, spec) for name, spec in specs.items()
            if spec.form is not None and any(count * spec.form.bits % WORD for count in spec.shape)
        ]  # fmt: skip
        if broken:
            name, spec = broken[0]
            yield (
                f"{self.title} fills whole words of {WORD} bits with codes, and {len(broken)} layers have too few rows "
                f"or columns for that, such as {name} ({spec.shape[0]} x {spec.shape[1]}); multiples of {WORD} fit "
                "any number of bits, `exclude` others"
            )

    def leaves(self, spec: Spec, scheme: Scheme) -> Leaves:
        rows, columns = spec.shape
        groups, (_, stored) = scheme.groups(columns), spec.tensors()["scale"]
        return {
            "qweight": ((columns * scheme.bits // WORD, rows), torch.int32),
            "qzeros": ((groups, rows * scheme.bits // WORD), torch.int32),
            "scales": ((groups, rows), stored),
            "g_idx": ((columns,), torch.int32),
        }

    def packed(self, scheme: Scheme, steps: Steps) -> dict[str, Tensor]:
        codes, zero = steps.codes, steps.zero
        if self.checkpoint_format == "gptq":
            codes, zero = _less_one(codes, zero, scheme.bits)
        columns = codes.shape[1]
        return {
            "qweight": packed_words(codes, scheme.bits).T.contiguous(),
            "qzeros": packed_words(zero.T.contiguous(), scheme.bits),
            "scales": steps.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (scheme.group_size or columns),
        }

    def unpacked(self, scheme: Scheme, there: Mapping[str, Tensor]) -> Tensor:
        codes, zero = unpacked(there["qweight"].T, scheme.bits), unpacked(there["qzeros"], scheme.bits).T.float()
        group = there["g_idx"].long()
        if self.checkpoint_format == "gptq":
            zero += 1
        return (codes.float() - zero[:, group]) * there["scales"].T.float()[:, group]

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        super().write(made, folder, final, bars)
        config = read_object(folder / "config.json")["quantization_config"]
        write_json(config, folder / "quantize_config.json")  # where older readers look

    def sections(self, contents: Contents) -> dict[str, Any]:
        most = Counter(contents.schemes.values()).most_common(1)[0][0]
        head = contents.head()
        dense = [name for name in contents.dense() if name != head]
        found = {
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            **_said(most),
            "desc_act": False,
            "lm_head": head in contents.schemes,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"compress:{version()}"]},
        }
        # GPTQModel, vLLM and SGLang go by the first, transformers and vLLM by the second.
        dynamic: dict[str, Any] = {f"-:{_only(name)}": {} for name in _with_fused(dense)}
        for name, scheme in contents.schemes.items():
            if scheme != most:
                dynamic |= {f"+:{_only(each)}": _said(scheme) for each in _with_fused((name, contents.called[name]))}
        if dynamic:
            found["dynamic"] = dynamic
        if dense:
            found["modules_in_block_to_quantize"] = [distinct((*contents.schemes, *contents.called.values()))]
        return {"quantization_config": found}


def _said(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or ROW, "sym": scheme.symmetric}


def _with_fused(names: Iterable[str]) -> list[str]:
    """Names of layers, and those of the matrices that vLLM makes of them, by which it looks."""
    return distinct(each for name in names for each in (name, fused_name(name)) if each is not None)


def _only(name: str) -> str:
    return f"^{re.escape(name)}$"


def _less_one(codes: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) and zero points (O, G), to be stored less one."""
    lowest = zero == 0
    if not lowest.any():
        return codes, zero - 1
    grouped = codes.view(*zero.shape, -1)
    if int(grouped[lowest].max()) == 2**bits - 1:
        raise CompressError(
            "a zero point of 0 beside the highest code, which version 1 of the layout cannot hold; set "
            "checkpoint_format: gptq_v2, or quantize with symmetric: true"
        )
    return (grouped + lowest[..., None]).view_as(codes), torch.where(lowest, zero, zero - 1)


__all__ = ["GptqFormat"]
