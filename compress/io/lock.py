"""One run at a time works in a folder: the folder of unfinished work carries a lock, which is its mark as well.

The lock is the kernel's, on a file that says who holds it, so that two processes started together cannot both have it
and one that was killed has it no longer. Where a file system knows no locks, the file alone decides.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.logs import LOGGER

try:
    import fcntl
except ImportError:  # on Windows the file alone decides
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "lock.json"
FORMAT = "compress-work"
UNLOCKABLE = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)
SHARED, ALONE = (1, 2) if fcntl is None else (fcntl.LOCK_SH, fcntl.LOCK_EX)
ROOM = 512  # bytes of the file
PATIENCE = 1.0  # seconds until who has just taken a lock has said who it is


@dataclass(frozen=True)
class Holder:
    """A process that works in a folder.

    Attributes:
        pid: its number.
        host: its computer.
        start: when it was started, in the clock ticks that its system counts; a number is used again, this is not.
        since: when it took the lock, in words.
    """

    pid: int
    host: str
    start: int
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(pid, socket.gethostname(), _start_of(pid), since)

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.since}"

    @property
    def gone(self) -> bool:
        """Whether the process is known to have ended; of another computer nothing is known."""
        return self.host == socket.gethostname() and _start_of(self.pid) != self.start


def refuse_others(folder: Path) -> None:
    """Refuse a folder that this program has not made, that holds links, or that another process works in now.

    Raises:
        UsageError: says what it is, or which process.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder}, where unfinished work is kept, is a link; remove it, or choose another -o")
    if not os.path.lexists(folder):
        return
    names = sorted(os.listdir(folder)) if folder.is_dir() else [folder.name]
    if names and _read(folder / LOCK) is None:
        raise UsageError(
            f"{folder}, where unfinished work is kept, was not made by this version of compress: it holds {names[0]}; "
            "move or remove it yourself, or choose another -o"
        )
    for name in names:
        if (folder / name).is_symlink():
            raise UsageError(f"{folder / name} is a link, which compress never makes there; remove it")
    if names:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            _lock(descriptor, folder, SHARED)
        finally:
            os.close(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder of unfinished work, or take over one that was left; while open, no other process has it.

    Afterwards the folder is still there if anything besides its mark is in it.

    Raises:
        UsageError: another process has it, or it cannot be made.
    """
    refuse_others(folder)
    descriptor = _taken(folder)
    try:
        before = _read(folder / LOCK) or {}
        if before.get("holder"):
            LOGGER.warning("%s was left by %s, which has ended; it is taken over", folder, Holder(**before["holder"]))
        _say(descriptor, asdict(Holder.here()))
        yield
    finally:
        try:
            _say(descriptor, None)
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        except OSError:
            pass  # an empty folder may stay; what went wrong before is more important
        os.close(descriptor)


def _taken(folder: Path) -> int:
    """The descriptor of a lock that this process has."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:
            continue  # whoever had it has just removed it
        except OSError as error:
            raise UsageError(f"{folder}, where unfinished work is kept, cannot be made: {error.strerror}") from error
        try:
            _lock(descriptor, folder, ALONE)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed by whoever had it, after it was opened here


def _lock(descriptor: int, folder: Path, kind: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            _flock(descriptor, kind)
            return
        except OSError as error:
            holder = _holder(folder)
            if error.errno in UNLOCKABLE:
                if holder is None or holder.gone or holder.pid == os.getpid():
                    return
                advice = "" if holder.host == socket.gethostname() else f"; if it has ended, remove {folder / LOCK}"
                raise UsageError(f"{folder} is in use by {holder}{advice}") from error
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            # Whoever has just taken it has not said yet who it is, or only looks whether it is taken.
            if (holder is not None and not holder.gone) or time.monotonic() > end:
                who = holder or "another process"
                raise UsageError(
                    f"{folder} is in use by {who}; wait until it has ended, or choose another -o"
                ) from error
        time.sleep(0.01)


def _flock(descriptor: int, kind: int) -> None:
    """Take the kernel's lock of a file, or fail at once."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "there are no locks of files")
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)


def _holder(folder: Path) -> Holder | None:
    said = (_read(folder / LOCK) or {}).get("holder")
    return Holder(**said) if said else None


def _read(file: Path) -> dict[str, Any] | None:
    """What a lock says; None where there is none, or it is not this program's."""
    try:
        if file.is_symlink():
            return None
        text = file.read_text(encoding="utf-8")
        if not text and os.listdir(file.parent) == [LOCK]:
            return {"format": FORMAT, "holder": None}  # whoever made it has not said yet who it is
        found: dict[str, Any] = json.loads(text)
        if found["format"] != FORMAT:
            return None
        if found["holder"]:
            Holder(**found["holder"])
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _say(descriptor: int, holder: dict[str, Any] | None) -> None:
    data = json.dumps({"format": FORMAT, "holder": holder}).encode()
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data.ljust(ROOM))  # in one go, and never shorter than what stood there
    os.fsync(descriptor)


def _start_of(pid: int) -> int:
    """When a process was started; 0 where the system does not say, -1 where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        pass
    return 0
