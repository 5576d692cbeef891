"""Tests for passes of your own: what every pass promises, checked on small tensors and a tiny model.

    from compress.testing import check_pass

    def test_it_keeps_what_every_pass_promises():
        check_pass(PowersOfTwo(exponents=4))

Needs no pytest: a promise that is not kept raises an AssertionError that names it, with the file and line of the class.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.io.source_code import place_of
from compress.testing.broken import BrokenPromiseError
from compress.testing.promises import known, promises_of
from compress.testing.runs import check_runs
from compress.testing.trial import SHAPES, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from compress.passes import Pass

WITHOUT_RUN = ("norms",)  # what passes that need another kind of model see at once


def check_pass(
    pass_: Pass,
    *,
    model: str | Path | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    runs: bool = True,
) -> None:
    """Check everything that a pass promises.

    On small random matrices: options are described and survive a pipeline file; the same input gives the same result
    and is left as it was; a matrix does not depend on others; no zero comes back; edits have the right shape, type and
    kind; tensors of two devices do not mix. On a model: `plan` knows the size, a run that was interrupted ends
    bit-identical, and the packed result loads.

    Args:
        pass_: with the options to try; call it again for others.
        model: a folder for the whole runs; by default a tiny random one is made.
        shapes: name -> (out, in) of the matrices.
        runs: whether whole models are run, which takes seconds.

    Raises:
        BrokenPromiseError: an AssertionError: a promise is not kept.
        UsageError: the pass cannot be registered, or not work on the model.

    Example:
        >>> import compress
        >>> from compress.testing import check_pass
        >>> check_pass(compress.Rtn(bits=4), runs=False)
    """
    with known(type(pass_)):
        check_tensors(pass_, shapes)
        if runs and pass_.reach not in WITHOUT_RUN:
            _kept(pass_, "a whole run", lambda: check_runs(pass_, model))


def check_tensors(pass_: Pass, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> None:
    """Check what a pass promises about tensors and options; see `check_pass`."""
    trial = Trial(pass_, shapes)
    with _one_thread():
        for promise in promises_of(pass_):
            _kept(pass_, promise.said, partial(promise.kept, trial))


@contextmanager
def _one_thread() -> Iterator[None]:
    """While open, sums are not split among threads, of which a busy machine may take more or fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kept(pass_: Pass, said: str, check: Callable[[], None]) -> None:
    """Run a check; a promise that is not kept is said with whose it is."""
    try:
        check()
    except BrokenPromiseError as error:
        promise = said.rstrip(".")
        raise BrokenPromiseError(
            f"{pass_.key} breaks a promise ({promise}): {error}; {place_of(type(pass_))}"
        ) from None


__all__ = ["BrokenPromiseError", "check_pass", "check_runs", "check_tensors"]
