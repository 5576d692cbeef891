"""Hadamard matrices: entries of 1 and -1, rows orthogonal to one another.

Source: doubling by Sylvester, 1867; sizes of a prime plus one by Paley, "On orthogonal matrices", 1933.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """(size, size) float64; None where this file knows none: sizes that are no power of two times a prime plus one."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = hadamard(size // 2) if size % 2 == 0 else None
    if half is not None:
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    return _paley(size - 1) if size % 4 == 0 and _is_prime(size - 1) else None


def _paley(prime: int) -> Tensor:
    """(prime + 1, prime + 1), for a prime that leaves 3 when divided by 4."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[numbers**2 % prime] = 1.0
    character[0] = 0.0
    made = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    made[1:, 0] = -1.0
    made[1:, 1:] = character[(numbers[:, None] - numbers) % prime] + torch.eye(prime, dtype=torch.float64)
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


__all__ = ["hadamard"]
