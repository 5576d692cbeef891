"""The console script: runs a command, and ends with one line and an exit code (see errors.py), whatever happens.

Nothing heavy is imported before the guard is up: Ctrl-C ends with one line while libraries are being imported, too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from compress.cli import ranks
from compress.cli.guard import guarded
from compress.cli.interrupts import Interrupts


def main() -> None:
    """The console script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    interrupts = Interrupts()
    code = guarded(lambda: _command(interrupts), interrupts)
    if code and "WORLD_SIZE" in os.environ:  # threads may wait for processes that are gone: nothing is left to tidy up
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _command(interrupts: Interrupts) -> Any:
    _open_streams()
    words = _words()
    here = ranks.place() if ranks.are_shared(words) else None
    if here is None:
        return _app(words)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # connections that break are said in our own words
    return ranks.shared(lambda: _app(words), here, interrupts)


def _app(words: list[str]) -> Any:
    from compress.cli.commands import app

    return app(words, standalone_mode=False)


def _open_streams() -> None:
    """Streams that were closed by the caller swallow what is printed; letters that they cannot show are spelled out."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _words() -> list[str]:
    """The words of the command line.

    Raises:
        UsageError: one is not UTF-8; its name could be written into no file of the result.
    """
    from compress.errors import UsageError

    for word in sys.argv[1:]:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            try:
                meant = word.encode(sys.getfilesystemencoding(), "surrogateescape").decode("utf-8")
            except UnicodeError as error:
                raise UsageError(f"{word!a} is not UTF-8; rename the file or folder") from error
            raise UsageError(f"{meant!a} cannot be a name where the system's encoding is not UTF-8; set PYTHONUTF8=1")
    return sys.argv[1:]


__all__ = ["guarded", "main"]
