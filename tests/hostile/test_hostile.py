"""Damaged files and impossible words, as many as there is time for; `make fuzz` tries more."""

import json
import os
from pathlib import Path
from random import Random

import cases
import mutations
import pytest
from fuzz import Fuzzer, wrong
from watched import Ended

CASES = 8
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are run in forked processes")


def test_damaged_input_is_read_or_refused_in_a_sentence_and_nothing_else_happens(
    one_thread: None, tmp_path: Path
) -> None:
    fuzzer = Fuzzer(tmp_path)
    faults = list(fuzzer.run(range(CASES)))
    assert not faults, "\n".join(map(str, faults))
    assert sum(fuzzer.endings.values()) >= CASES
    refused = sum(count for ending, count in fuzzer.endings.items() if ending.endswith(": 2"))
    assert refused > CASES / 4, "the damage does little"


def test_a_case_is_the_same_whenever_it_is_run_again() -> None:
    data = json.dumps({"a": [1, 2], "b": {"c": "text"}}).encode()
    for mutate in (mutations.of_bytes, mutations.of_json, mutations.of_lines):
        once, again = ([mutate(data, Random(f"1 {n}")) for n in range(30)] for _ in range(2))
        assert once == again
    assert cases.words(Random(5)) == cases.words(Random(5))


@pytest.mark.parametrize(
    "ended",
    [
        Ended("hangs"), Ended(70, "", "error: unexpected"), Ended(4, "", "error: out of memory"), Ended(2, "", ""),
        Ended(1, "", "error: Traceback (most recent call last)"), Ended(0, "\x1b[2J", ""),
        Ended(2, "", "error: set trust_remote_code=True"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_no_command_may_end_with_is_a_fault(ended: Ended) -> None:
    assert list(wrong(ended))
    assert not list(wrong(Ended(2, "", "error: no such file")))
    assert not list(wrong(Ended(0, "fine", "")))
