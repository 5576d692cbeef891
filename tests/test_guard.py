"""The outermost guard: what a command ends with, whatever happens in it; signals; readers that are gone."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compress import cli, logs
from compress.cli.guard import shortened
from compress.cli.interrupts import Interrupts, Stopped, keeping
from compress.errors import CompressError, UsageError

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'compress'; from compress.cli import main; main()"]


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.fixture
def handlers() -> Iterator[None]:
    """Whatever a test listens to is let go of again."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no such layer"), 2), (CompressError("the solver failed"), 1), (MemoryError(), 4),
        (OSError(errno.ENOSPC, "full"), 4), (OSError(errno.EIO, "broken disk"), 1),
        (PermissionError(errno.EACCES, "not allowed", "place"), 2), (IsADirectoryError(errno.EISDIR, "a folder"), 2),
        (KeyError("lost"), 70), (RecursionError("too deep"), 70), (AssertionError(), 70),
    ],
    ids=lambda x: repr(x),
)  # fmt: skip
def test_an_error_is_one_line_with_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert ("report" in err) == (code == 70)


@pytest.mark.parametrize("error", [UsageError("no such layer"), KeyError("lost")], ids=repr)
def test_the_traceback_is_shown_where_everything_is(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    cli.guarded(raising(error), level=10)
    assert "in command" in capsys.readouterr().err


def test_what_ended_a_run_stands_in_its_log_file_with_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError), logs.kept_in(tmp_path / "log.txt"):
        raising(KeyError("lost"))()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "in command" in log
    assert "KeyError: 'lost'" in log


def test_a_terminal_is_given_nothing_to_obey_and_nobody_too_much_to_read() -> None:
    assert shortened("a \x1b[2J\x07 name\rwith ü") == "a \\x1b[2J\\x07 name\nwith ü"
    assert shortened("\udcff") == "\\udcff"
    many = shortened("line\n" * 1000 + "x" * 10**6)
    assert many.endswith("and 951 lines more")
    assert len(shortened("x" * 10**6)) < 3000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_that_says_what_is_kept_whatever_a_library_makes_of_it(
    number: signal.Signals, code: int, handlers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        with keeping("everything is kept"):
            try:
                signal.raise_signal(number)
            except BaseException as error:
                raise ValueError("a library's own words") from error

    assert cli.guarded(command, Interrupts()) == code
    err = capsys.readouterr().err
    assert err.endswith("; everything is kept\n")
    assert err.count("\n") == 1
    assert "library" not in err


def test_a_signal_that_a_library_swallows_comes_again(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.cli.interrupts.PATIENCE", 0.05)
    swallowed = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            swallowed.append(error)
        time.sleep(30)

    assert cli.guarded(command, Interrupts()) == 143
    assert len(swallowed) == 1


def test_a_signal_while_an_object_is_deleted_comes_again(handlers: None, capsys: pytest.CaptureFixture[str]) -> None:
    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def command() -> None:
        Deleted()
        time.sleep(30)

    assert cli.guarded(command, Interrupts()) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_signal_after_the_end_changes_nothing(handlers: None) -> None:
    assert cli.guarded(lambda: None, Interrupts()) == 0
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def test_a_signal_that_the_caller_ignores_is_ignored(handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert cli.guarded(lambda: signal.raise_signal(signal.SIGINT), Interrupts()) == 0


def test_nothing_that_catches_exceptions_catches_a_signal() -> None:
    assert not issubclass(Stopped, (Exception, KeyboardInterrupt))


def test_a_reader_that_is_gone_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(raising(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""


def test_the_real_command_is_quiet_where_its_reader_is_gone_or_its_streams_are_closed(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        ended = subprocess.run([*COMMAND, "list"], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (141, "")
    closing = f"exec '{sys.executable}' -c \"{COMMAND[2]}\" list >&- 2>&-"
    assert subprocess.run(["sh", "-c", closing], timeout=60).returncode == 0


def test_a_word_that_is_no_utf_8_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", "check", os.fsdecode(b"\xff.yaml")])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert cli.guarded(lambda: cli._command(Interrupts(heard=()))) == 2
    assert "'\\udcff.yaml' is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["compress", "check", "ü.yaml".encode().decode("ascii", "surrogateescape")])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert cli.guarded(lambda: cli._command(Interrupts(heard=()))) == 2
    assert "'\\xfc.yaml' cannot be a name where the system's encoding is not UTF-8" in capsys.readouterr().err


def test_no_timer_is_left_behind(handlers: None) -> None:
    assert cli.guarded(lambda: signal.raise_signal(signal.SIGTERM), Interrupts()) == 143
    left = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(thread.daemon and thread.finished.is_set() for thread in left)
