"""Layers of the folders `gptq`, `awq` and `mlx` as their layouts are documented, read a word and a code at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compress.encodings import Uniform, fit, quantize

WORD = 32
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: which of eight neighbouring codes stands where in a word, lowest first


def stream(words: Iterable[int], bits: int) -> list[int]:
    """The codes of a stream of words, the first in the lowest bits of the first."""
    words = [word % 2**WORD for word in words]
    whole = sum(word << (WORD * i) for i, word in enumerate(words))
    return [(whole >> (bits * i)) % 2**bits for i in range(len(words) * WORD // bits)]


def along(words: Tensor, bits: int) -> Tensor:
    """Each row is a stream."""
    return torch.tensor([stream(row, bits) for row in words.tolist()])


def gptq(there: Mapping[str, Tensor], bits: int, less: int = 1) -> Tensor:
    """(O, I) of a layer of GPTQ; `less`: what zero points are stored less."""
    codes, zero = along(there["qweight"].T, bits), along(there["qzeros"], bits).T + less
    group = there["g_idx"].long()
    return ((codes - zero[:, group]) * there["scales"].double().T[:, group]).float()


def awq(there: Mapping[str, Tensor]) -> Tensor:
    """(O, I) of a layer of AWQ."""

    def codes(words: Tensor) -> Tensor:
        found = torch.empty(len(words), 8 * words.shape[1])
        for place, row in enumerate(NIBBLES):
            found[:, row::8] = along(words, 4)[:, place::8].float()
        return found

    each = len(there["qweight"]) // len(there["scales"])
    zero, scale = (part.repeat_interleave(each, 0) for part in (codes(there["qzeros"]), there["scales"].double()))
    return ((codes(there["qweight"]) - zero) * scale).T.float()


def mlx(there: Mapping[str, Tensor], bits: int) -> Tensor:
    """(O, I) of a layer of MLX."""
    codes = along(there["weight"], bits)
    each = codes.shape[1] // there["scales"].shape[1]
    scale, bias = (there[leaf].double().repeat_interleave(each, 1) for leaf in ("scales", "biases"))
    return (codes * scale + bias).float()


def rounded(bits: int, symmetric: bool, groups: int, rows: int = 32, columns: int = 64) -> Uniform:
    """A random matrix on a grid."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    scale, zero = fit(weight, bits, groups=groups, symmetric=symmetric)
    return Uniform(quantize(weight, scale, zero, bits), scale, zero, bits, symmetric)


def values(there: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one layer of a file, by what they are in it."""
    leaves = {key.rpartition(".")[2]: value for key, value in there.items() if key.rpartition(".")[0] == name}
    return {leaf: value for leaf, value in leaves.items() if leaf != "bias"}
