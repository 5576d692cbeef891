"""Sparse signs in bytes: exact, as small as the theory says, and the bytes are the documented ones."""

import math

import pytest
import torch
from torch import Tensor

from compress.encodings import rice
from compress.encodings.signs import Signs

# Share of entries that are not zero -> bits per entry: entropy, and what a Rice code with the best parameter needs.
EXPECTED = {0.01: (0.0908, 0.0911), 0.05: (0.336, 0.339), 0.1: (0.569, 0.576), 0.2: (0.922, 0.939),
            0.3: (1.181, 1.188), 0.5: (1.5, 1.5)}  # fmt: skip


def random_signs(total: int, share: float) -> Tensor:
    """Exactly that share of them is not zero."""
    signs = torch.zeros(total, dtype=torch.int8)
    chosen = torch.randperm(total)[: round(share * total)]
    signs[chosen] = torch.randint(2, (len(chosen),), dtype=torch.int8) * 2 - 1
    return signs


def back(signs: Tensor) -> Tensor:
    count, low, first, streams = rice.encode(signs)
    assert len(streams) == rice.coded_size(count, low, first)
    return rice.decode(torch.tensor(list(streams), dtype=torch.uint8), count, low, first, len(signs))


def one_by_one(signs: list[int], low: int) -> tuple[list[int], list[int], list[int]]:
    """The bits of the three streams, as the docstring says."""
    quotients, rest, plus, gap = [], [], [], 0
    for sign in signs:
        if sign == 0:
            gap += 1
            continue
        quotients += [0] * (gap >> low) + [1]
        rest += [gap >> i & 1 for i in range(low)]
        plus.append(int(sign > 0))
        gap = 0
    return quotients, rest, plus


@pytest.mark.parametrize("share", EXPECTED)
def test_random_signs_take_the_bits_of_the_table(share: float) -> None:
    entropy, expected = EXPECTED[share]
    signs = random_signs(1_000_000, share)
    bits = 8 * len(rice.encode(signs)[3]) / len(signs)
    assert bits == pytest.approx(expected, rel=0.01)
    assert bits > entropy * 0.99
    assert torch.equal(back(signs), signs)


@pytest.mark.parametrize("share", EXPECTED)
def test_the_parameter_is_the_one_that_needs_the_fewest_bits(share: float) -> None:
    def needed(low: int) -> float:
        return low + 1 / (1 - (1 - share) ** 2**low)

    best = min(range(12), key=needed)
    assert needed(rice.low_bits(round(1e6 * share), 1_000_000)) <= needed(best) * 1.0001


SIGNS = {
    "none": [],
    "one zero": [0],
    "one": [-1],
    "all zero": [0] * 1000,
    "one of many": [0] * 700 + [1] + [0] * 299,
    "the first": [1] + [0] * 999,
    "the last": [0] * 999 + [-1],
    "all": [1, -1, -1] * 100,
    "in a row": [0] * 500 + [1] * 9 + [0] * 491,
}


@pytest.mark.parametrize("signs", SIGNS.values(), ids=SIGNS)
def test_what_was_encoded_comes_back(signs: list[int]) -> None:
    given = torch.tensor(signs, dtype=torch.int8)
    assert torch.equal(back(given), given)


@pytest.mark.parametrize("total", [1, 7, 8, 9, 63, 1000, 4097])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.4, 0.9, 1.0])
def test_every_length_and_share_comes_back(total: int, share: float) -> None:
    signs = random_signs(total, share)
    assert torch.equal(back(signs), signs)


def test_the_bytes_are_the_documented_ones() -> None:
    signs = random_signs(500, 0.05)
    count, low, first, streams = rice.encode(signs)
    expected = b""
    for bits in one_by_one(signs.tolist(), low):
        padded = bits + [0] * (-len(bits) % 8)
        expected += bytes(sum(b << i for i, b in enumerate(padded[k : k + 8])) for k in range(0, len(padded), 8))
    assert (count, low) == (25, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(0.95))))
    assert streams == expected
    assert 0 < first < len(streams)


def test_streams_that_do_not_fit_are_refused() -> None:
    count, low, first, streams = rice.encode(random_signs(500, 0.05))
    stored = torch.tensor(list(streams), dtype=torch.uint8)
    with pytest.raises(ValueError, match="where 26 should be"):
        rice.decode(stored, count + 1, low, first, 500)
    with pytest.raises(ValueError, match="where 25 should be"):
        rice.decode(stored[:-1], count, low, first, 500)
    with pytest.raises(ValueError, match="an entry at"):
        rice.decode(stored, count, low, first, 100)


def test_a_sum_of_signs_is_added_up_in_order() -> None:
    signs = Signs(torch.tensor([1.0, 0.25]), torch.tensor([[1, -1, 0], [-1, -1, 1]], dtype=torch.int8))
    assert signs.value().tolist() == [0.75, -1.25, 0.25]
