"""What is said of a pass that does not keep its promises."""

from __future__ import annotations


class BrokenPromiseError(AssertionError):
    """A pass does not do what every pass promises; says which promise, and where the class stands."""


def demand(kept: bool, said: str) -> None:
    """Refuse to go on where a promise is not kept; unlike `assert` also under `python -O`.

    Raises:
        BrokenPromiseError: says what is wrong.
    """
    if not kept:
        raise BrokenPromiseError(said)


__all__ = ["BrokenPromiseError", "demand"]
