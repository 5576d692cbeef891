"""A command in a process of its own, forked from this one, which may take so much time and memory and no more."""

import contextlib
import io
import json
import os
import re
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

SECONDS = 10  # of processor time
PATIENCE = 180  # seconds of the clock: a machine may be busy with other things
MEMORY = 1 << 30  # bytes more than the process has at the start


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or what became of the process."""

    code: int | str
    out: str = ""
    err: str = ""


def forked(command: Callable[[], Any], folder: Path) -> Ended:
    """Run `command` with a working folder, in a child of this process."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not touch
        child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.chdir(folder)
            said = _limited(command)
        except BaseException:
            said = ["fell through the guard", "", traceback.format_exc()]
        with os.fdopen(writing, "w", encoding="utf-8", errors="backslashreplace") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writing)
    try:
        return _ended(child, reading)
    finally:
        os.close(reading)


def _limited(command: Callable[[], Any]) -> list[Any]:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, err = io.StringIO(), io.StringIO()
    sys.unraisablehook = lambda found: print(f"Exception ignored: {found.exc_value!r}", file=err)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command()
    return [code, out.getvalue()[-20000:], err.getvalue()[-20000:]]


def _ended(child: int, reading: int) -> Ended:
    """Read what the child says until it closes the pipe; kill it where that takes too long."""
    said = b""
    while True:
        ready, _, _ = select.select([reading], [], [], PATIENCE)
        piece = os.read(reading, 1 << 16) if ready else b""
        said += piece
        if not piece:
            break
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number in (signal.SIGXCPU, signal.SIGKILL)
        return Ended("hangs" if late else f"dies of {signal.Signals(number).name}")
    return Ended(*json.loads(said)) if said else Ended(f"exits with {os.WEXITSTATUS(status)} and says nothing")


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Path -> hash of every file below a folder; `without` are names at its top that are left out."""
    found = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in without]
        for name in files:
            path = Path(place) / name
            if path.is_file() and str(path.relative_to(folder)) not in without:
                found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    return found


# What no user should meet: tracebacks, options of other libraries.
FOREIGN = re.compile(r"Traceback|trust_remote_code|Exception ignored|save_pretrained\(|<class '|object at 0x")
