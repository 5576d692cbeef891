"""Every example in every docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
from selection import only

import compress
from compress.config.pipeline import METHODS


def examples() -> Iterator[doctest.DocTest]:
    for found in pkgutil.walk_packages(compress.__path__, "compress."):
        module = importlib.import_module(found.name)
        yield from (t for t in doctest.DocTestFinder().find(module) if t.examples)


EXAMPLES = list(examples())
# Of passes one of each kind; the others compress the bundled model too.
QUICK = ("quantize.gptq", "prune.wanda", "compensate.eora", "merge.ties", "retrain.perp")


def is_quick(test: doctest.DocTest) -> bool:
    if test.name == "compress.api.fit.fit":  # measures every layer of the bundled model in several widths
        return False
    return not test.name.startswith("compress.passes.") or test.name.removeprefix("compress.passes.").startswith(QUICK)


@pytest.mark.parametrize("test", only([t for t in EXAMPLES if is_quick(t)], EXAMPLES), ids=lambda t: t.name)
def test_the_example_in_the_docstring_runs(test: doctest.DocTest) -> None:
    report: list[str] = []
    known = dict(METHODS)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    for key in METHODS.keys() - known:  # passes of an example's own
        del METHODS[key]
    assert result.failed == 0, "".join(report)
