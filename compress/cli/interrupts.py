"""Ctrl-C and SIGTERM: at any moment they end a command with one line and an exit code of their own.

What is written is written whole or not at all, so a command may be left anywhere; the same command goes on.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = 5.0  # seconds after which a signal that some library has swallowed is raised again
SOON = 0.05  # the same, where Python itself says that it was swallowed
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}


class Stopped(BaseException):
    """A signal came. Neither `Exception` nor `KeyboardInterrupt`: what catches these would go on without a word."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def said(self) -> str:
        """What happened, in words."""
        return SAID.get(signal.Signals(self.number), f"stopped by signal {self.number}")


class Interrupts:
    """Turns signals into `Stopped`, and remembers them where a library makes another exception of it.

    Args:
        heard: which signals; none where a command is a part of another program.
    """

    def __init__(self, heard: Sequence[int] = tuple(SAID)) -> None:
        self.heard = heard
        self.stopped: Stopped | None = None
        self._before = sys.unraisablehook
        self._timers: list[threading.Timer] = []

    def listen(self) -> None:
        """From now on a signal is raised in the main thread."""
        if self.heard:
            sys.unraisablehook = self._unraisable
        for number in self.heard:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._interrupt)

    def stop(self, stopped: Stopped) -> None:
        """Raise this in the main thread, as if a signal had come; called from another one."""
        self.stopped = self.stopped or stopped
        _deliver(stopped.number)

    def ignore(self) -> None:
        """Nothing is left to interrupt: the process is ending."""
        for number in self.heard:
            signal.signal(number, signal.SIG_IGN)
        for timer in self._timers:
            timer.cancel()

    def _interrupt(self, number: int, _: Any) -> None:
        self.stopped = self.stopped or Stopped(number)
        self._raise_again(number, PATIENCE)
        raise self.stopped

    def _unraisable(self, found: Any) -> None:
        """Raised where nothing can be raised, such as while an object is deleted: raised again a little later."""
        if isinstance(found.exc_value, Stopped):
            self._raise_again(found.exc_value.number, SOON)
        else:
            self._before(found)

    def _raise_again(self, number: int, after: float) -> None:
        """Raise a signal again, if the command has not ended by then."""
        timer = threading.Timer(after, _deliver, [number])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _deliver(number: int) -> None:
    """Send a signal to the main thread, which wakes up where it sleeps, if the system knows how."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


@contextmanager
def keeping(text: str) -> Iterator[None]:
    """While open, `text` is what is said after an interruption: what is kept, and how to go on."""
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise
