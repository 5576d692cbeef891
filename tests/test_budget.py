"""Choices under a budget: against every choice there is, and what holds for all of them."""

import itertools
import random
from collections.abc import Sequence

import pytest

from compress.errors import UsageError
from compress.planning import budget
from compress.planning.budget import Knapsack, Option


def drawn(seed: int) -> tuple[Knapsack, int]:
    """A few parts with a few options each, and a budget between the smallest choice and the largest."""
    random.seed(seed)
    parts = [
        [
            Option(random.randint(1, 60), random.choice([0.0, random.uniform(0, 100)]))
            for _ in range(random.randint(1, 4))
        ]
        for _ in range(random.randint(1, 5))
    ]
    knapsack = Knapsack(parts, sum(max(option.size for option in options) for options in parts))
    return knapsack, random.randint(knapsack.least, knapsack.most)


def best_of_all(parts: Sequence[Sequence[Option]], most: int) -> float:
    """The least loss of all choices within a budget."""
    fitting = (
        sum(option.loss for option in choice)
        for choice in itertools.product(*parts)
        if sum(option.size for option in choice) <= most
    )
    return min(fitting)


def improvements(parts: Sequence[Sequence[Option]], chosen: list[int]) -> list[int]:
    """Bytes of every step of one part to a better option."""
    return [
        other.size - options[now].size
        for options, now in zip(parts, chosen, strict=True)
        for other in options
        if other.loss < options[now].loss
    ]


def test_a_choice_is_the_best_of_all_within_the_budget() -> None:
    for seed in range(200):
        knapsack, most = drawn(seed)
        chosen = knapsack.choose(most)
        assert knapsack.size(chosen) <= most
        assert knapsack.loss(chosen) == pytest.approx(best_of_all(knapsack.parts, most), abs=1e-9)


def test_where_bytes_are_counted_in_large_units_no_better_option_would_still_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "MOST_CELLS", 5)
    rounded = 0
    for seed in range(200):
        knapsack, most = drawn(seed)
        chosen = knapsack.choose(most)
        left = most - knapsack.size(chosen)
        assert left >= 0
        assert all(step > left for step in improvements(knapsack.parts, chosen))
        smallest = [options[kept[0]].loss for options, kept in zip(knapsack.parts, knapsack.useful, strict=True)]
        assert knapsack.loss(chosen) <= sum(smallest) + 1e-9
        rounded += knapsack.loss(chosen) > best_of_all(knapsack.parts, most) + 1e-9
    assert rounded, "no case in which rounding matters"


def test_many_parts_are_chosen_for_in_time_and_within_one_step_of_the_budget() -> None:
    parts = [
        [Option(1000 * (i % 7 + 1) * bits + 17 * i, (i % 11 + 1) * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)]
        for i in range(500)
    ]
    knapsack = Knapsack(parts, sum(options[-1].size for options in parts))
    most = (knapsack.least + knapsack.most) // 2
    chosen = knapsack.choose(most)
    assert 0 <= most - knapsack.size(chosen) < min(improvements(parts, chosen))


def test_larger_budgets_never_lose_more() -> None:
    parts = [[Option(3 * bits + i, (1 + i) * 4.0**-bits) for bits in range(2, 9)] for i in range(6)]
    knapsack = Knapsack(parts, sum(options[-1].size for options in parts))
    losses = [knapsack.loss(knapsack.choose(most)) for most in range(knapsack.least, knapsack.most + 1)]
    assert losses == sorted(losses, reverse=True)


def test_a_budget_below_the_smallest_choice_is_refused_with_what_that_takes() -> None:
    knapsack = Knapsack([[Option(5, 1.0), Option(3, 2.0)], [Option(4, 1.0)]], 9)
    with pytest.raises(UsageError, match=r"6 bytes are less than the 7"):
        knapsack.choose(6)
