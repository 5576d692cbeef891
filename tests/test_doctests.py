"""Every example in every docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import compress
from compress.config.pipeline import METHODS


def examples() -> Iterator[doctest.DocTest]:
    for found in pkgutil.walk_packages(compress.__path__, "compress."):
        module = importlib.import_module(found.name)
        yield from (t for t in doctest.DocTestFinder().find(module) if t.examples)


@pytest.mark.parametrize("test", list(examples()), ids=lambda t: t.name)
def test_the_example_in_the_docstring_runs(test: doctest.DocTest) -> None:
    report: list[str] = []
    known = dict(METHODS)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    for key in METHODS.keys() - known:  # passes of an example's own
        del METHODS[key]
    assert result.failed == 0, "".join(report)
