"""Which cases of a test `make test` runs; `make real` adds the others."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def only(quick: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases, those that are not among the quick ones marked `real`.

    Raises:
        AssertionError: none of the cases is quick.
    """
    cases = list(cases)
    assert any(case in quick for case in cases)
    return [case if case in quick else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.real)
