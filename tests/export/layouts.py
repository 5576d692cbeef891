"""Layers of the folders `gptq`, `awq` and `mlx` as their layouts are documented, read a word and a code at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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


def values(there: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one layer of a file, by what they are in it."""
    leaves = {key.rpartition(".")[2]: value for key, value in there.items() if key.rpartition(".")[0] == name}
    return {leaf: value for leaf, value in leaves.items() if leaf != "bias"}
